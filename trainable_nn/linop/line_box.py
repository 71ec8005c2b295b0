r"""A bound of a padded convolution below its symbol's maximum: vectors are held to the pixels that exist on one axis.

Let the circle of one axis (``axes``) have one place more than pixels. Vectors y on the pixels leave a place of it free,
which a shift brings to 0, so their Fourier sums y_f have sum_f y_f = 0, f the frequencies of this axis, for each
frequency of the others. With G = M M^* (``symbol``), let U_f be of q columns in all, those of f zero beside f, and

    N_f = t - G_f + U_f U_f^* > 0,   V_f = U_f + L,   rho = ||sum_f V_f^* N_f^{-1} V_f||,

L any matrix (c, q), the same for all f. As sum_f U_f^* y_f = sum_f V_f^* y_f,

    sum_f y_f^* (t - G_f) y_f = sum_f y_f^* N_f y_f - |sum_f V_f^* y_f|^2 >= (1 - rho) sum_f y_f^* N_f y_f,

so rho <= 1 proves ||T^* y||^2 <= t ||y||^2. U spans what G has above t, or little below; with the best L,
(sum_f N_f^{-1}) L = -sum_f N_f^{-1} U_f, every t above the maximum over such y is proved, and with many channels one
step of conjugate gradients is near enough. With random weights the largest singular vectors at the frequencies are in
general position, and t falls by 6 % on a circle of 5 places. How U, L and t were found enters no proof.

Rounding: N' are the floats for N, which Cholesky's algorithm ends on, so N' >= -a (``definite``), and ||N' - N|| <= e.
The level that is proved is t + s, s > a + e: there N + s is at least b = s - a - e. For floats x_f and
r_f = V_f - (N_f + s) x_f exactly, V^* (N + s)^{-1} V = V^* x + x^* r + r^* (N + s)^{-1} r, hence, with r' = V - N' x,

    rho <= ||sum V^* x|| + sum ||x|| (||r'|| + e ||x||) + sum (||r'|| + (s + e) ||x||)^2 / b,

in Frobenius norms but for the first, where the Hermitian part counts. V is rounded once, which adds at most
u ||V|| / b^{1/2} to the root of rho.

Source: ours.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .definite import CONSTANT, definiteness_error, raised_level
from .grid_choice import Choice
from .norm import U
from .symbol import Grid, frequencies
from .symbol_gram import Gram

MOST_PLACES = 6  # of the axis; with more of them the free one counts for less
KEPT = 2**22  # complex numbers of N: 64 MiB
LEVEL = 0.965  # of the circle's maximum
NEAR = 0.98  # of the level: what is above goes into U
RAISED = 0.25  # of the level, that N has in the directions of U at least
VECTORS = 10  # most columns of U at one frequency
DEGREE, EDGE = 9, 0.87  # of a polynomial of G, and below how much of the maximum it is small
SHIFT = 1e-8  # s over t
SUMS = 64  # roundings beside those of long sums, at most


def line_maximum(gram: Gram, choice: Choice, box: tuple[int, ...]) -> float:
    """At least ||T||^2; infinity where no axis fits, or where this level is not proved.

    Shape:
        box: numbers of pixels on each axis that hold the vectors on the side of G.
    Cost:
        A factor of N and about 3 q products with it at each frequency, and a few tens of products of G with vectors.
    """
    grid, fits = choice.grid, [n - pixels == 1 and n <= MOST_PLACES for n, pixels in zip(choice.grid[0], box)]
    count = len(frequencies(*grid)) * gram.channels**2
    if not any(fits) or gram.symbol.groups > 1 or count > KEPT or not choice.estimate > 0:
        return math.inf
    axis = min((a for a, fit in enumerate(fits) if fit), key=lambda a: grid[0][a])
    level, found = LEVEL * choice.estimate, []
    for _, grams in gram.chunks(grid):
        some = _factored(grams, level, choice.estimate)
        if some is None:
            return math.inf
        found += some
    error = gram.error + max(one.error for one in found)
    below, shift = max(one.below for one in found), SHIFT * level
    if not below + error < shift / 2:
        return math.inf
    for members in _lines(grid, axis):
        line = [found[k].conj() if turned else found[k] for k, turned in members]
        if not _holds(line, shift, error, shift - below - error):
            return math.inf
    return (level + shift) * (1 + 16 * U)


@dataclass(frozen=True)
class _Raised:
    """N' at one frequency, its Cholesky factor, U, and ||N'||_F at most; N' >= -below; error of N' beside that of G."""

    n: Tensor
    factor: Tensor
    u: Tensor
    size: float
    below: float
    error: float

    def conj(self) -> "_Raised":
        return replace(self, n=self.n.conj(), factor=self.factor.conj(), u=self.u.conj())


def _factored(grams: Tensor, level: float, largest: float) -> list[_Raised] | None:
    """Some frequencies, whose G become N' in place; None where U would be wide, or N not positive."""
    n, c = grams.neg_(), grams.shape[-1]
    spanned = _above(n, level, largest)
    if spanned is None:
        return None
    diagonal = n.diagonal(dim1=1, dim2=2)
    parts = diagonal.abs().sum(1) + _sizes(spanned).square() + level * math.sqrt(c)  # G >= 0: its size is at most its trace
    errors = (16 * (spanned.shape[2] + SUMS) * U * parts).tolist()
    n.baddbmm_(spanned, spanned.mH)
    diagonal.add_(level)
    factors, info = torch.linalg.cholesky_ex(n)
    if bool(info.any()) or not bool(torch.isfinite(factors.diagonal(dim1=1, dim2=2).real).all()):
        return None
    traces = diagonal.real.sum(1)
    below = 2 * CONSTANT * (c + 8) * U * traces
    sizes = (traces + 2 * c * below).tolist()  # as N' >= -below
    used = [u[:, u.abs().amax(0) > 0] for u in spanned]
    return [_Raised(*one) for one in zip(n, factors, used, sizes, below.tolist(), errors)]


def _above(negative: Tensor, level: float, largest: float) -> Tensor | None:
    """U: about the eigenvectors of G above NEAR of the level, long enough to raise N; None where there are too many.

    By a Chebyshev polynomial of G = -negative on a block of vectors, in float32.
    """
    g = negative.to(torch.complex64)
    generator = torch.Generator("cpu").manual_seed(g.shape[-1])
    half = EDGE * largest / 2
    block = g.shape[-1], min(VECTORS, g.shape[-1])
    before = torch.randn(block, generator=generator, dtype=torch.float32, device="cpu").to(g.dtype)
    before = before.expand(len(g), *block)
    v = _centred(g, before, half)
    for _ in range(DEGREE - 1):
        before, v = v, 2 * _centred(g, v, half) - before
        size = torch.linalg.vector_norm(v, dim=(1, 2), keepdim=True).clamp_min(2.0**-100)
        before, v = before / size, v / size
    basis, _ = torch.linalg.qr(v)
    small = basis.mH @ (g @ basis)
    if not bool(torch.isfinite(torch.view_as_real(small)).all()):
        return None
    values, vectors = torch.linalg.eigh(small)  # of -G: the least come first
    high = -values.double()
    wanted = high > NEAR * level
    if g.shape[-1] > VECTORS and bool(wanted[:, -1].any()):
        return None
    most = max(1, int(wanted.sum(1).max()))
    lengths = torch.where(wanted, (high - level).clamp_min(0.0) + RAISED * level, 0.0).sqrt()[:, :most]
    return (basis @ vectors[..., :most]).to(negative.dtype) * lengths[:, None]


def _centred(negative: Tensor, v: Tensor, half: float) -> Tensor:
    return (negative @ v).neg_().sub_(half * v).div_(half)


def _lines(grid: Grid, axis: int) -> Iterator[list[tuple[int, bool]]]:
    """For each frequency of the other axes, up to sign, those of this one: numbers in half of the grid; opposite?"""
    turn = 2 * np.array(grid[0])
    half = frequencies(*grid)
    number = {}
    for turned, numerators in ((True, -half % turn), (False, half)):
        number.update((tuple(m), (k, turned)) for k, m in enumerate(numerators.tolist()))
    lines: dict[tuple[int, ...], list[tuple[int, bool]]] = {}
    for m, found in number.items():
        lines.setdefault((*m[:axis], *m[axis + 1 :]), []).append(found)
    others = np.delete(turn, axis)
    for line, members in lines.items():
        if line <= tuple((-np.array(line, dtype=np.int64) % others).tolist()):
            yield members


def _sizes(matrices: Tensor) -> Tensor:
    """At least the Frobenius norm of each."""
    return torch.linalg.vector_norm(torch.view_as_real(matrices).flatten(1), dim=1) * (1 + 2.0**-20)


def _holds(line: list[_Raised], shift: float, error: float, least: float) -> bool:
    """Whether rho <= 1 is proved on one line; least: N + shift at least."""
    solve = torch.cholesky_solve
    start = -torch.cat([solve(at.u, at.factor) for at in line], 1)
    if start.shape[1] == 0:
        return True  # N is t - G
    moved = sum(solve(start, at.factor) for at in line)
    length = (start.conj() * start).real.sum(0) / (start.conj() * moved).real.sum(0)
    if _proves(line, start * torch.where(torch.isfinite(length), length, 0.0), shift, error, least):
        return True
    total, info = torch.linalg.cholesky_ex(sum(torch.cholesky_inverse(at.factor) for at in line))
    return int(info) == 0 and _proves(line, solve(start, total), shift, error, least)


def _proves(line: list[_Raised], shared: Tensor, shift: float, error: float, least: float) -> bool:
    """The same with this L."""
    solve = torch.cholesky_solve
    (c, q), done = shared.shape, 0
    total, rest, off = torch.zeros(q, q, dtype=shared.dtype, device="cpu"), 0.0, 0.0
    size = lambda a: float(_sizes(a[None]))
    for at in line:
        v = shared.clone()
        v[:, done : done + at.u.shape[1]] += at.u
        done += at.u.shape[1]
        x = solve(v, at.factor)
        total += v.mH @ x
        long, wide = size(x), size(v)
        rounded = 4 * (c + SUMS) * U
        left = size(v - at.n @ x) + rounded * (wide + at.size * long)
        rest += long * (left + error * long) + (left + (shift + error) * long) ** 2 / least + rounded * wide * long
        off += (U * wide) ** 2 / least
    if not math.isfinite(rest) or not bool(torch.isfinite(torch.view_as_real(total)).all()):
        return False
    room = (1 - math.sqrt(off)) ** 2 * (1 - 2.0**-20) - rest * (1 + 2.0**-20) if off < 1 else 0.0
    found = (total + total.mH) / 2
    if not room > 0 or not float(found.diagonal().real.sum()) >= 0:
        return False
    level = room / (1 + definiteness_error(q)) * (1 - 8 * U)
    return raised_level(found[None], level, 1e-3, level)[0] <= level
