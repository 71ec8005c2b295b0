"""Both ends of the spectrum of a symmetric map, by Lanczos with full orthogonalisation and thick restarts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CHECK_EVERY = 10
KEPT = (12, 4)  # Ritz vectors that a restart keeps at the lower and at the upper end


@dataclass(frozen=True)
class Found:
    """Smallest and largest Ritz value, their residuals, whether they converged, and the products it took."""

    values: tuple[float, float]
    residuals: tuple[float, float]
    converged: tuple[bool, bool]
    products: int


def lanczos_extremes(
    product: Callable[[Tensor], Tensor], n: int, device, tol: float, most_products: int, basis: int, seed: int
) -> Found:
    """Products with unit float64 vectors (n,); two of them measure the residuals at the end."""
    space = _Space(product, n, min(n, basis), device, seed)
    while not space.complete and space.products < most_products - 2:
        if space.size == space.room:
            space.restart()
        space.extend()
        if (space.size % CHECK_EVERY == 0 or space.size == space.room) and all(space.converged(tol)):
            break
    values, vectors = space.ends()
    residuals = tuple(float(torch.linalg.vector_norm(product(v) - s * v)) for s, v in zip(values, vectors))
    return Found(values, residuals, space.converged(tol, residuals), space.products + 2)


class _Space:
    """Orthonormal rows V and the matrix V K V^T, with K V^T - V^T H = beta next e_last^T."""

    def __init__(self, product, n: int, room: int, device, seed: int) -> None:
        self.product, self.room, self.products, self.size, self.complete = product, room, 0, 0, False
        self.draw = torch.Generator("cpu").manual_seed(seed)
        self.v = torch.zeros(room, n, dtype=torch.float64, device=device)
        self.h = torch.zeros(room, room, dtype=torch.float64)
        self.next, self.beta = self._random(), 0.0

    def extend(self) -> None:
        j = self.size
        self.v[j] = self.next
        w = self.product(self.next)
        self.products += 1
        basis = self.v[: j + 1]
        along = basis @ w
        w = w - along @ basis
        again = basis @ w
        w = w - again @ basis
        along = (along + again).cpu()
        self.h[j, : j + 1] = self.h[: j + 1, j] = along
        self.size = j + 1
        self.beta = float(torch.linalg.vector_norm(w))
        if self.size == self.v.shape[1]:
            self.complete, self.beta = True, 0.0
        elif self.beta <= 1e-14 * float(self.h[: j + 1, : j + 1].abs().max()):  # the start reaches no further
            self.beta, self.next = 0.0, self._random()
        else:
            self.next = w / self.beta

    def restart(self) -> None:
        values, q = self._ritz()
        low, high = (min(k, self.size // 3) for k in KEPT)
        kept = [*range(low), *range(self.size - high, self.size)]
        self.v[: len(kept)] = q[:, kept].T.to(self.v.device) @ self.v[: self.size]
        self.h.zero_()
        self.h[range(len(kept)), range(len(kept))] = values[kept]
        self.size = len(kept)

    def converged(self, tol: float, residuals: tuple[float, float] | None = None) -> tuple[bool, bool]:
        """By r^2 / gap, or r where that is less: the error of a Ritz value to second and to first order."""
        values, q = self._ritz()
        if self.complete:
            return True, True
        if self.size < 3:
            return False, False
        r = residuals or tuple(self.beta * float(q[-1, i].abs()) for i in (0, -1))
        gaps = float(values[1] - values[0]), float(values[-1] - values[-2])
        errors = [min(x, x * x / max(gap - x, 1e-300)) if gap > x else x for x, gap in zip(r, gaps)]
        return tuple(e <= tol * abs(float(values[i])) for e, i in zip(errors, (0, -1)))

    def ends(self) -> tuple[tuple[float, float], list[Tensor]]:
        values, q = self._ritz()
        vectors = [q[:, i].to(self.v.device) @ self.v[: self.size] for i in (0, -1)]
        return (float(values[0]), float(values[-1])), [v / torch.linalg.vector_norm(v) for v in vectors]

    def _ritz(self) -> tuple[Tensor, Tensor]:
        return torch.linalg.eigh(self.h[: self.size, : self.size])

    def _random(self) -> Tensor:
        """A unit vector, orthogonal to those that are there."""
        w = torch.randn(self.v.shape[1], generator=self.draw, dtype=torch.float64).to(self.v.device)
        for _ in range(2):
            w = w - (self.v[: self.size] @ w) @ self.v[: self.size]
        return w / torch.linalg.vector_norm(w)
