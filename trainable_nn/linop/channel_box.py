r"""A bound of a padded convolution with few outstanding singular values, below the maximum of its symbol on a circle.

For y on the box of pixels that exist, y^ its Fourier sums on a circle that holds it (``axes``), ||T^* y||^2 is at most
the mean of y^*^ G y^ over the circle's frequencies, G = M M^* (``symbol``). The maximum of ||G(w)|| lets y have any spectrum. Let P
(c, r) be real, E(w) Hermitian (r, r) with E(-w) its conjugate, and let

    G(w) + P E(w) P^T <= L for each frequency,    B(E) >= -m,  m >= 0,

B(E) the block Toeplitz matrix of E's Fourier coefficients on the box, real and of r times the pixels. Then
||T^* y||^2 <= L ||y||^2 - <P^T y, B(E) P^T y> <= (L + m ||P||^2) ||y||^2: channels that stand out are held to the box, all others
to the circle. With P = Id and the best E it is the norm on the box itself, and with E = 0 the maximum on the circle.

Every E gives a bound. The one taken is the Schur complement of t - G for the channels of P, the largest with L = t; t by
Newton's step from the circle's maximum to B(E) >= 0, where B's smallest eigenvalue is concave in t. Lanczos' algorithm by
blocks, from P, gives that complement for every t at once: with G V = V T, T of blocks A_k and B_k, V_1 = P,

    S_K = t - A_K,  S_k = t - A_k - B_{k+1}^* S_{k+1}^{-1} B_{k+1},  E = S_1 to what the steps after K would change.

L and m are proved by factors (``definite``); how E was found enters neither.

Source: ours.
"""

import math

import numpy as np
import torch
from torch import Tensor

from .definite import definiteness_error, raised_level
from .grid_choice import Choice
from .norm import U
from .symbol import Grid, angles, frequencies
from .symbol_gram import TABLE, Gram

MOST_UNKNOWNS = 600  # of B
MOST_VECTORS = 8  # of P
STANDS_OUT = 0.85  # the second eigenvalue at the peak over the first is less
BLOCK_STEPS, BLOCK_ERROR = 10, 1e-6  # most steps of Lanczos from P, and relative error of E at which they end
NEWTON_STEPS = 4
INVERSE_STEPS = 12  # of inverse iteration for B's smallest eigenvalue
KEPT = 2**22  # complex numbers of G: 64 MiB; beyond it G is made twice


def boxed_maximum(gram: Gram, choice: Choice, box: tuple[int, ...], slack: float) -> float:
    """At least ||T||^2; infinity where no channel stands out, or the box is large.

    Shape:
        box: numbers of pixels on each axis that hold the vectors on the side of G.
    Cost:
        A factor of G at each frequency, a few products with P, and factors of B, where one channel stands out.
    """
    unknowns = math.prod(box)
    if unknowns > MOST_UNKNOWNS or gram.symbol.groups > 1 or not choice.estimate > 0:
        return math.inf
    second, tops = choice.around_peak(gram.symbol.steps[0])
    if not second < STANDS_OUT:
        return math.inf
    p = _vectors(tops, min(MOST_VECTORS, MOST_UNKNOWNS // unknowns))
    where = _Box(frequencies(*choice.grid), choice.grid, box)
    kept = len(where.twice) * gram.channels**2 <= KEPT
    chunks = [grams for _, grams in gram.chunks(choice.grid)] if kept else None
    complement = _Complement(chunks or (grams for _, grams in gram.chunks(choice.grid)), p, _block_steps(second))
    level = choice.estimate
    for _ in range(NEWTON_STEPS):
        found = complement.at(level)
        if found is None:
            return math.inf
        smallest, vector = where.smallest(where.symmetric(found[0]))
        step = smallest / max(where.quadratic(found[1], vector), 1.0)
        level -= step
        if not abs(step) > 0.05 * slack * level:
            break
    found = complement.at(level)
    if found is None:
        return math.inf
    chunks = chunks or (grams for _, grams in gram.chunks(choice.grid))
    return _proved(gram, chunks, p, where.symmetric(found[0]), level, where, slack)


def _block_steps(second: float) -> int:
    """Of conjugate gradients on t - G without P's channels, for t somewhat below the peak."""
    root = math.sqrt(1 / (1 - min(1.1 * second, 0.99)))
    rate = ((root - 1) / (root + 1)) ** 2
    return min(BLOCK_STEPS, 2 + math.ceil(math.log(BLOCK_ERROR) / math.log(max(rate, BLOCK_ERROR))))


def _vectors(tops: Tensor, most: int) -> Tensor:
    """P: leading directions of the top eigenvectors at the peak and around it."""
    left, sizes, _ = torch.linalg.svd(torch.cat([tops.real, tops.imag], 1).double(), full_matrices=False)
    return left[:, : min(most, int((sizes > 1e-4 * sizes[0]).sum()))].contiguous()


class _Complement:
    """The Schur complement of t - G(w) for the channels of P at each frequency and for any t, by Lanczos' algorithm."""

    def __init__(self, chunks, p: Tensor, steps: int) -> None:
        steps = min(steps, max(1, p.shape[0] // p.shape[1]))
        parts = [self._blocks(grams.to(torch.complex64), p, steps) for grams in chunks]
        self.diagonal, self.below = (torch.cat(x, 1).to(torch.complex128) for x in zip(*parts))

    @staticmethod
    def _blocks(grams: Tensor, p: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """A_k and B_{k+1}: (steps, frequencies, r, r)."""
        first = v = p.to(torch.complex64).expand(len(grams), *p.shape)
        before = torch.zeros_like(v)
        b = v.new_zeros(len(v), v.shape[2], v.shape[2])
        diagonal, below = [], []
        for _ in range(steps):
            w = grams @ v - before @ b.mH
            a = v.mH @ w
            w = w - v @ a
            w = w - first @ (first.mH @ w)  # else what P holds comes back by rounding
            before, (v, b) = v, torch.linalg.qr(w)
            diagonal.append((a + a.mH) / 2)
            below.append(b)
        return torch.stack(diagonal), torch.stack(below)

    def at(self, t: float) -> tuple[Tensor, Tensor] | None:
        """E and dE / dt; None where another channel is above t."""
        one = torch.eye(self.diagonal.shape[-1], dtype=torch.complex128, device="cpu")
        s, slope = t * one - self.diagonal[-1], one.expand_as(self.diagonal[-1])
        for a, b in zip(self.diagonal[:-1].flip(0), self.below[:-1].flip(0)):
            factor, info = torch.linalg.cholesky_ex(s)
            if info.any():
                return None
            x = torch.cholesky_solve(b, factor)
            s, slope = t * one - a - b.mH @ x, one + x.mH @ slope @ x
        found = torch.isfinite(torch.view_as_real(s)).all() and torch.isfinite(torch.view_as_real(slope)).all()
        return ((s + s.mH) / 2, (slope + slope.mH) / 2) if found else None


class _Box:
    """B for half of a grid's frequencies, the others by conjugation."""

    def __init__(self, numerators: np.ndarray, grid: Grid, box: tuple[int, ...]) -> None:
        pixels = np.stack(np.meshgrid(*(np.arange(n) for n in box), indexing="ij"), -1).reshape(-1, len(box))
        opposite = (-numerators) % (2 * np.array(grid[0]))
        self.count = math.prod(grid[0])
        self.twice = torch.from_numpy(np.where((opposite == numerators).all(1), 1.0, 2.0))
        spans = 2 * np.array(box) - 1
        difference = pixels[:, None] - pixels[None] + np.array(box) - 1
        self.number = torch.from_numpy(np.ravel_multi_index(tuple(np.moveaxis(difference, -1, 0)), tuple(spans)))
        self.lags = np.stack(np.meshgrid(*(np.arange(1 - n, n) for n in box), indexing="ij"), -1).reshape(-1, len(box))
        self.angles = angles(numerators, self.lags, grid[0])

    def symmetric(self, e: Tensor) -> Tensor:
        """E(w), real where w is its own opposite."""
        return torch.where((self.twice == 1)[:, None, None], e.real.to(e.dtype), e)

    def coefficients(self, e: Tensor) -> Tensor:
        """(lags, r, r)"""
        weight = self.twice[:, None] / self.count
        real, imaginary = weight * torch.cos(self.angles), weight * torch.sin(self.angles)
        r = e.shape[-1]
        return (real.T @ e.real.flatten(1) - imaginary.T @ e.imag.flatten(1)).reshape(-1, r, r)

    def matrix(self, e: Tensor) -> Tensor:
        values = self.coefficients(e)[self.number]
        m, r = len(self.number), e.shape[-1]
        return values.permute(0, 2, 1, 3).reshape(m * r, m * r)

    def error(self, e: Tensor) -> float:
        """At least the norm of what rounds in ``matrix``: of each lag at most that of a sum of unit numbers times E."""
        largest = float(torch.linalg.vector_norm(torch.view_as_real(e).flatten(1), dim=1).max())
        terms = 2 * len(e) + 8
        return len(self.lags) * 3 * largest * (terms * U / (1 - terms * U) + 2 * TABLE) * (1 + 2.0**-20)

    def smallest(self, e: Tensor) -> tuple[float, Tensor]:
        """About the smallest eigenvalue of B and its vector, by inverse iteration in float32."""
        matrix = self.matrix(e).float()
        matrix = (matrix + matrix.T) / 2
        size = float(matrix.diagonal().mean().abs())
        for shift in (1e-3, 1e-2, 1e-1, 1.0, 10.0):
            shifted = matrix.clone()
            shifted.diagonal().add_(shift * size)
            factor, info = torch.linalg.cholesky_ex(shifted)
            if not info:
                break
        v = torch.linspace(1, 2, len(matrix), dtype=matrix.dtype, device="cpu")[:, None].cos()
        for _ in range(INVERSE_STEPS):
            v = torch.cholesky_solve(v, factor)
            v = v / torch.linalg.vector_norm(v)
        return float(v.T @ matrix @ v), v[:, 0].double()

    def quadratic(self, e: Tensor, vector: Tensor) -> float:
        return float(vector @ self.matrix(e) @ vector)


def _proved(gram: Gram, chunks, p: Tensor, e: Tensor, level: float, where: _Box, slack: float) -> float:
    """L + m ||P||^2, for the E given."""
    c, r = p.shape
    proved, start = level * (1 + slack / 8), level * (1 + slack / 8)
    done = 0
    for grams in chunks:
        part = e[done : done + len(grams)]
        done += len(grams)
        wide = p.to(e.dtype).expand(len(part), c, r)
        grams.baddbmm_(wide @ part, wide.mT)
        proved, _ = raised_level(grams, proved, slack, start * (1 + 8 * slack))
        if proved == math.inf:
            return math.inf
    stretch = float(p.square().sum()) * (1 + 4 * c * r * U)  # ||P||_F^2
    largest = float(torch.linalg.vector_norm(torch.view_as_real(e).flatten(1), dim=1).max()) * (1 + 8 * r * r * U)
    rounded = 4 * (c + 2 * r + 8) * U * (stretch * largest + 2 * c * proved) + gram.error
    least = proved + definiteness_error(c) * (proved + r * stretch * largest) + rounded
    below = -where.matrix(e)
    below = (below + below.T) / 2
    m, _ = raised_level(below[None], 1e-2 * slack * level, slack)
    m += definiteness_error(len(below)) * (m + 2 * largest) + where.error(e)
    return (least + m * (1 + 1e-9)) * (1 + 32 * U) if _orthonormal(p) else math.inf


def _orthonormal(p: Tensor) -> bool:
    """Whether ||P||^2 <= 1 + 1e-9, proved: ||P^T P - Id||_F is far less."""
    c, r = p.shape
    defect = p.T @ p - torch.eye(r, dtype=p.dtype, device="cpu")
    return float(defect.abs().sum()) + 4 * c * r * r * U <= 1e-9
