r"""Estimates, from below, of ||M(w)||^2 at many frequencies at once: Lanczos' algorithm in low precision, without a matrix.

M(w)^* u = sum_j e^{-i <w, b_j>} K_j^T u is one real product of the taps with the vectors of all frequencies, then a sum;
its adjoint the same backwards. What it finds chooses what is proved elsewhere, and enters no bound.
"""

import numpy as np
import torch
from torch import Tensor

from .symbol import Symbol

TINY = 1e-30


def _low_precision() -> torch.dtype:
    """bfloat16 where the processor multiplies it (twice as fast there, values within 5e-4), else float32."""
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.bfloat16 if found.get("avx512_bf16") or found.get("amx_bf16") else torch.float32


class RoughSymbol:
    """M M^* times vectors (groups, c, columns) of complex64, each at a frequency of its own."""

    def __init__(self, symbol: Symbol) -> None:
        groups, taps, c, width = symbol.taps.shape
        self.dtype = _low_precision() if c * width > 2**12 else torch.float32
        self.steps, self.phases = symbol.steps
        order = [tap for phase in self.phases for tap in phase]
        self.order, self.width = order, width
        rows = symbol.taps if order == sorted(order) else symbol.taps[:, order]
        self.back = rows.to(self.dtype).transpose(1, 2).reshape(groups, c, taps * width)
        self.forth = self.back.mT.contiguous()

    def gram_times(self, waves: Tensor, v: Tensor) -> Tensor:
        """waves: (taps, 1, columns), e^{i <w, b_j>} in the order of the taps here."""
        groups, _, columns = v.shape
        reached = self._product(self.forth, v).reshape(groups, -1, self.width, columns)
        out, start = torch.empty_like(reached), 0
        for taps in self.phases:
            part = slice(start, start + len(taps))
            one = (reached[:, part] * waves[part].conj()).sum(1, keepdim=True)
            torch.mul(waves[part], one, out=out[:, part])
            start += len(taps)
        return self._product(self.back, out.flatten(1, 2))

    def _product(self, a: Tensor, v: Tensor) -> Tensor:
        real = torch.view_as_real(v).flatten(2).to(self.dtype)
        return torch.view_as_complex((a @ real).float().unflatten(2, (-1, 2)))


class Lanczos:
    """Lanczos' algorithm for M M^* at many frequencies, without reorthogonalisation; columns may leave."""

    def __init__(
        self,
        rough: RoughSymbol,
        angles: Tensor,
        *,
        start: Tensor | None = None,
        keep_basis: bool = False,
        without: Tensor | None = None,
    ) -> None:
        """angles: (columns, taps), <w, b_j>. start: (groups, c, columns). without: (c, 1), a unit vector that is left out."""
        groups, c, _ = rough.back.shape
        self.rough, self.basis, self.without = rough, [] if keep_basis else None, without
        phase = angles[:, rough.order].T.to(torch.float32)
        self.waves = torch.polar(torch.ones_like(phase), phase)[:, None]
        if start is None:
            generator = torch.Generator("cpu").manual_seed(c)
            start = torch.randn(1, c, 1, generator=generator, dtype=torch.float32, device="cpu").to(torch.complex64)
        start = self._orthogonal(start)
        size = torch.linalg.vector_norm(start, dim=1, keepdim=True).clamp_min(TINY)
        self.v = (start / size).expand(groups, c, len(angles))
        self.before, self.beta = torch.zeros_like(self.v), torch.zeros(groups, 1, len(angles), device="cpu")
        self.alphas, self.betas = self.beta[None][:0], self.beta[None][:0]

    def run(self, steps: int) -> "Lanczos":
        alphas, betas = [], []
        for _ in range(steps):
            if self.basis is not None:
                self.basis.append(self.v)
            w = self.rough.gram_times(self.waves, self.v)
            w = self._orthogonal(w.sub_(self.beta * self.before))
            alpha = (torch.view_as_real(self.v) * torch.view_as_real(w)).sum((1, 3))[:, None]
            w -= alpha * self.v
            self.beta = torch.linalg.vector_norm(w, dim=1, keepdim=True)
            self.before, self.v = self.v, w / self.beta.clamp_min(TINY)
            alphas.append(alpha)
            betas.append(self.beta)
        self.alphas = torch.cat([self.alphas, torch.stack(alphas)])
        self.betas = torch.cat([self.betas, torch.stack(betas)])
        return self

    def _orthogonal(self, v: Tensor) -> Tensor:
        return v if self.without is None else v - self.without @ (self.without.mH @ v)

    def restrict(self, columns: np.ndarray) -> "Lanczos":
        self.basis, which = None, torch.from_numpy(columns)
        for name in ("waves", "v", "before", "beta", "alphas", "betas"):
            setattr(self, name, getattr(self, name)[..., which])
        return self

    def tridiagonals(self) -> Tensor:
        """(groups, columns, steps, steps)"""
        alphas, betas = (x[:, :, 0].permute(1, 2, 0).double() for x in (self.alphas, self.betas))
        t = torch.diag_embed(alphas)
        for offset in (-1, 1):
            t += torch.diag_embed(betas[..., :-1], offset)
        return t

    def values(self) -> Tensor:
        """The top Ritz values (groups, columns)."""
        return torch.linalg.eigvalsh(self.tridiagonals())[..., -1]

    def last_gain(self) -> float:
        """What the last step added to a top Ritz value, at most, relatively."""
        t = self.tridiagonals()
        now, before = (torch.linalg.eigvalsh(x)[..., -1] for x in (t, t[..., :-1, :-1]))
        return float(((now - before) / now.clamp_min(TINY)).amax())

    def tops(self) -> tuple[Tensor, Tensor]:
        """The top Ritz values (groups, columns), and vectors (groups, c, columns) in the basis that was kept."""
        values, vectors = torch.linalg.eigh(self.tridiagonals())
        last = vectors[..., -1].to(torch.complex64)
        return values[..., -1], sum(b * last[:, None, :, k] for k, b in enumerate(self.basis))
