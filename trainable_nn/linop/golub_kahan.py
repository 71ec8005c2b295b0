r"""Golub-Kahan-Lanczos bidiagonalisation with full reorthogonalisation and thick restarts.

It keeps orthonormal U, V with A V = U B, B upper triangular, and A^T U = V B^T + r e_last^T. A triplet
B q = s p gives one of A, (s, U p, V q), whose residual is \|r\| \|p_last\|. Both bases are orthogonalised in full,
twice. When they are full, the triplets at the wanted ends and r's direction start the next ones (a thick restart);
B stays upper triangular, with an arrow of the old triplets in front.

Source: Baglama and Reichel (2005), "Augmented implicitly restarted Lanczos bidiagonalization methods", SIAM J. Sci.
Comput. 27; the end that starts with A V = U B.
"""

import math

import torch
from torch import Tensor

from .products import Products

BASIS = {"largest": 24, "smallest": 64, "both": 64}  # vectors a side; of them a restart keeps a quarter at each end
CHECK_EVERY = 8


def lanczos(
    products: Products, tol: float, which: str, most_products: int, seed: int, start: Tensor | None = None
) -> dict:
    """{end: (value, residual)}, from the side with fewer columns, until the wanted ends converge or the budget is spent.

    ``start`` is a vector of that side; a random one is drawn without it.
    """
    forward, back, (rows, columns) = products.mv, products.rmv, products.shape
    if rows < columns:
        forward, back, rows, columns = back, forward, columns, rows
    bases = Bases(forward, back, rows, columns, BASIS[which], products, seed, start)
    every = CHECK_EVERY if start is None else 1
    while not bases.complete and products.count + 2 <= most_products - 4:  # the last four measure the residuals
        if bases.size == bases.room:
            bases.restart(which)
        bases.extend()
        if (bases.size % every == 0 or bases.size == bases.room) and bases.converged(tol, which):
            break
    ends = ("smallest", "largest") if which == "both" else (which,)
    found = {end: bases.measured(end) for end in ends}
    found.setdefault("largest", (bases.values_at("largest"), math.nan))
    found.setdefault("smallest", (math.nan, math.nan))
    return found


class Bases:
    """U, V and B of the module's first lines, for A with at least as many rows as columns."""

    def __init__(
        self, forward, back, rows: int, columns: int, room: int, products: Products, seed: int, start=None
    ) -> None:
        self.forward, self.back = forward, back
        self.room, self.eps = min(columns, room), products.eps
        self.u, self.v = products.empty(self.room, rows), products.empty(self.room, columns)  # one vector a row
        self.b = products.empty(self.room, self.room)
        self.size, self.beta, self.complete = 0, 0.0, False
        self.random = products.random(seed)
        start = self.random(columns) if start is None else start
        self.next = start / torch.linalg.vector_norm(start)

    def extend(self) -> None:
        """One vector more on both sides: A v = U h + alpha u, A^T u = V b^T + beta v_next."""
        j = self.size
        self.v[j] = self.next
        w, h = _orthogonalised(self.forward(self.next), self.u[:j])
        alpha = torch.linalg.vector_norm(w)
        scale = torch.linalg.vector_norm(h) + alpha
        if alpha <= 1e-14 * max(scale, self._scale()):  # A v lies in span U: any new direction will do
            alpha = torch.zeros_like(alpha)
            w = _orthogonalised(self.random(len(w)), self.u[:j])[0]
        self.u[j] = w / torch.linalg.vector_norm(w)
        self.b[:j, j], self.b[j, j] = h, alpha
        self.size = j + 1
        rest, _ = _orthogonalised(self.back(self.u[j]), self.v[: j + 1])
        self.beta = float(torch.linalg.vector_norm(rest))
        if self.size == self.v.shape[1] or self.beta <= 1e-14 * self._scale():
            self.beta, self.complete = 0.0, True  # V spans all that the start can reach
        else:
            self.next = rest / self.beta

    def converged(self, tol: float, which: str) -> bool:
        p, s, _ = self._triplets()
        residuals = self.beta * p[-1].abs()
        wanted = {"both": (0, -1), "largest": (0,), "smallest": (-1,)}[which]
        reachable = self.eps * s[0]
        return all(bool(residuals[i] <= max(0.5 * tol * s[i], reachable)) for i in wanted)

    def restart(self, which: str) -> None:
        """Keep the triplets nearest the wanted ends, and A^T's remainder as the next direction."""
        p, s, qh = self._triplets()
        kept = self.size // 4
        index = {
            "both": [*range(kept), *range(self.size - kept, self.size)],
            "largest": [*range(kept)],
            "smallest": [0, *range(self.size - kept, self.size)],
        }[which]
        self.u[: len(index)] = p[:, index].T @ self.u
        self.v[: len(index)] = qh[index].conj() @ self.v
        self.b.zero_()
        self.b[range(len(index)), range(len(index))] = s[index].to(self.b.dtype)
        self.size = len(index)

    def measured(self, end: str) -> tuple[float, float]:
        """The value at one end and its residual, by two products more."""
        value, (u, v) = self.values_at(end), self.vectors(end)
        forward = torch.linalg.vector_norm(self.forward(v) - value * u)
        back = torch.linalg.vector_norm(self.back(u) - value * v)
        return value, float(torch.maximum(forward, back))

    def vectors(self, end: str) -> tuple[Tensor, Tensor]:
        """(u, v) of the value at one end."""
        p, _, qh = self._triplets()
        i = 0 if end == "largest" else -1
        return p[:, i] @ self.u[: self.size], qh[i].conj() @ self.v[: self.size]

    def values_at(self, end: str) -> float:
        return float(self._triplets()[1][0 if end == "largest" else -1])

    def _triplets(self) -> tuple[Tensor, Tensor, Tensor]:
        k = self.size
        return torch.linalg.svd(self.b[:k, :k])

    def _scale(self) -> float:
        return float(self.b[: self.size, : self.size].abs().amax()) if self.size else 0.0


def _orthogonalised(w: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """w less its part in the rows of the basis, and that part; twice, which is enough."""
    h = basis.conj() @ w
    w = w - h @ basis
    again = basis.conj() @ w
    return w - again @ basis, h + again
