r"""A proved upper bound of the eigenvalues of many Hermitian matrices at once, by Cholesky factors that exist.

Where Cholesky's algorithm runs to its end on A in floats, R^* R = A + E with |E| <= g |R|^* |R| entry by
entry, so ||E|| <= g ||R||_F^2 and ||R||_F^2 = tr(A + E) <= tr A / (1 - g): A has no eigenvalue below
-g tr A / (1 - g). With A = t Id - G this proves max eigenvalue(G) <= t + g / (1 - g) tr A + u t, the last
term for the rounded diagonal. An inner product of c complex terms has g <= sqrt(2) gamma_2c, with or without
fused multiply-adds; square root and division, perhaps by a reciprocal, add four roundings. CONSTANT (c + 8) u
is more than that.

Which t to try is guessed by Lanczos; a wrong guess costs another factorisation and enters no bound.

Assumes IEEE float64 with rounding to nearest, and products and factors by inner products (no Strassen, no complex
product by three real ones), as every CPU library of torch has them; so all of it runs on the CPU.

Source: Rump (2006), Verification of positive definiteness, BIT 46; Higham (2002), theorem 10.3.
"""

import math

import numpy as np
import torch
from torch import Tensor

from .norm import U

CONSTANT = 8
CANDIDATES = 4  # matrices that Lanczos looks at before a level is tried
LANCZOS_STEPS = 40
TINY = 2.0**-900
NUMPYS = range(20, 200)  # channels of the factors that numpy's LAPACK makes faster than torch's; measured


def definiteness_error(c: int) -> float:
    """e with: max eigenvalue(G) <= (1 + e) t, where Cholesky ends on t Id - G, G is c x c and its trace at least -c t."""
    return 3 * CONSTANT * (c + 8) * U * c


def raised_level(grams: Tensor, level: float, slack: float, ceiling: float = math.inf) -> tuple[float, int | None]:
    """At least ``level``, and proved in floats: Cholesky ends on t Id - G for each G, or ||G||_F <= t.

    With it, the number of the matrix that raised it last, if one did.

    Shape:
        grams: (batch, c, c), Hermitian to rounding, of complex128 or float64; t is the first number returned. Its values are kept.
    Cost:
        A Cholesky factor of each matrix whose Frobenius norm is above the level; few are factored twice.
        Stops with infinity once a matrix has a Rayleigh quotient above ``ceiling``: its level is of no use.
    """
    unproved, tries, peak = _above(grams, level), 0, None
    if level > 0:
        unproved = _not_definite(grams, unproved, level)
    while unproved.numel():
        guesses = rayleigh_quotients(grams[unproved[:CANDIDATES]], LANCZOS_STEPS << tries)
        guess, peak = float(guesses.max()), int(unproved[guesses.argmax()])
        if guess > ceiling:
            return math.inf, peak
        level = max(level * (1 + slack * 2.0 ** (tries - 4)), guess * (1 + slack / 2), TINY)
        tries += 1
        unproved = _not_definite(grams, unproved[torch.isin(unproved, _above(grams, level))], level)
    return level, peak


def _above(grams: Tensor, level: float) -> Tensor:
    """The matrices whose Frobenius norm, or at least c^-1/2 times the trace, is above the level; the largest first."""
    c = grams.shape[-1]
    sizes = grams.diagonal(dim1=1, dim2=2).real.sum(1) / math.sqrt(c)
    low = (sizes <= level).nonzero().flatten()
    if len(low):
        part = grams if len(low) == len(grams) else grams[low]
        part = torch.view_as_real(part) if part.is_complex() else part
        sizes[low] = torch.linalg.vector_norm(part.flatten(1), dim=1) * (1 + 8 * c * c * U)
    order = sizes.argsort(descending=True)
    return order[~(sizes[order] <= level)]


def _not_definite(grams: Tensor, which: Tensor, level: float) -> Tensor:
    """Which of some matrices Cholesky stops on."""
    if len(which) == len(grams):
        return not_definite(grams, torch.tensor([level], dtype=torch.float64, device="cpu"))
    if not len(which):
        return which
    return which[not_definite(grams[which], torch.tensor([level], dtype=torch.float64, device="cpu"))]


def not_definite(grams: Tensor, levels: Tensor) -> Tensor:
    """The matrices on which Cholesky stops; each becomes t Id - G in place, and G again. levels: (batch,) or (1,)."""
    diagonal = grams.diagonal(dim1=1, dim2=2)
    kept = diagonal.clone()
    grams.neg_()
    diagonal.copy_(levels[:, None] - kept)
    ends = _factors(grams)
    grams.neg_()
    diagonal.copy_(kept)
    return (~ends).nonzero().flatten()


def _factors(a: Tensor) -> Tensor:
    """For which matrices Cholesky's algorithm ends."""
    if a.shape[-1] in NUMPYS:
        try:
            factor = torch.from_numpy(np.linalg.cholesky(a.numpy()))
            return torch.isfinite(factor.diagonal(dim1=1, dim2=2).real).all(1)
        except np.linalg.LinAlgError:  # on one of them; the other library says on which
            pass
    factor, info = torch.linalg.cholesky_ex(a)
    return (info == 0) & torch.isfinite(factor.diagonal(dim1=1, dim2=2).real).all(1)


def top_vector(gram: Tensor, level: float, steps: int = 8) -> Tensor:
    """About the top eigenvector (c, 1) of one Hermitian matrix, by inverse iteration at a level just above its norm."""
    shifted = -gram
    shifted.diagonal().add_(level)
    factor, info = torch.linalg.cholesky_ex(shifted)
    if int(info) != 0:  # the level is the norm, to rounding
        return torch.linalg.eigh(gram)[1][:, -1:]
    v = _start(gram)
    for _ in range(steps):
        v = torch.cholesky_solve(v, factor)
        v = v / torch.linalg.vector_norm(v)
    return v


def _start(grams: Tensor) -> Tensor:
    c = grams.shape[-1]
    generator = torch.Generator("cpu").manual_seed(c)
    return torch.randn(c, 1, generator=generator, dtype=torch.float64, device="cpu").to(grams.dtype)


def rayleigh_quotients(grams: Tensor, steps: int = LANCZOS_STEPS, start: Tensor | None = None) -> Tensor:
    """An estimate of the largest eigenvalue of each matrix, from below, by Lanczos without reorthogonalisation."""
    batch, c, _ = grams.shape
    v = (_start(grams) if start is None else start).expand(batch, c, 1)
    v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True)
    before, beta, alphas, betas = torch.zeros_like(v), 0.0, [], []
    for _ in range(min(c, steps)):
        w = grams @ v - beta * before
        alpha = (v.conj() * w).sum(1, keepdim=True).real
        w = w - alpha * v
        beta = torch.linalg.vector_norm(w, dim=1, keepdim=True)
        alphas.append(alpha.flatten())
        betas.append(beta.flatten())
        before, v = v, w / beta.clamp_min(1e-290)
        if float(beta.max()) <= 1e-14 * float(alphas[0].abs().max()):
            break
    tridiagonal = torch.diag_embed(torch.stack(alphas, 1))
    for offset in (-1, 1):
        tridiagonal += torch.diag_embed(torch.stack(betas, 1)[:, : len(alphas) - 1], offset)
    return torch.linalg.eigvalsh(tridiagonal)[:, -1]
