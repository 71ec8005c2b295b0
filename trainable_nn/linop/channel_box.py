r"""A bound of a padded convolution with few outstanding singular values, below the maximum of its symbol on a circle.

For y on the box of pixels that exist, y^ its Fourier sums on a circle that holds it (``axes``), ||T^* y||^2 is at most
the mean of y^*^ G y^ over the circle's frequencies, G = M M^* (``symbol``). The maximum of ||G(w)|| lets y have any spectrum. Let P
(c, r) be real, E(w) Hermitian (r, r) with E(-w) its conjugate, and let

    G(w) + P E(w) P^T <= L for each frequency,    B(E) >= -m,  m >= 0,

B(E) the block Toeplitz matrix of E's Fourier coefficients on the box, real and of r times the pixels. Then
||T^* y||^2 <= L ||y||^2 - <P^T y, B(E) P^T y> <= (L + m ||P||^2) ||y||^2: channels that stand out are held to the box, all others
to the circle. With P = Id and the best E it is the norm on the box itself, and with E = 0 the maximum on the circle.

Every E gives a bound. The one taken is the Schur complement of t - G for the channels of P, the largest with L = t; t by
Newton's step from the circle's maximum to B(E) >= 0, where B's smallest eigenvalue is concave in t. L and m are
proved by factors (``definite``); how E was found enters neither.

Source: ours.
"""

import math

import numpy as np
import torch
from torch import Tensor

from .definite import _factorise, definiteness_error, raised_level, rayleigh_quotients, top_vector
from .norm import U
from .symbol import CHUNK, TABLE, Gram, Grid, Peak, _angles, _values, frequencies

MOST_UNKNOWNS = 600  # of B
MOST_VECTORS = 4  # of P
STANDS_OUT = 0.85  # the second eigenvalue at the peak over the first is less
SECOND_STEPS = 10  # of Lanczos for it
NEWTON_STEPS = 2
LIFT = 2.0  # of the channels of P over t, so that the shifted G is definite


def boxed_maximum(gram: Gram, grid: Grid, peak: Peak, squared: float, box: tuple[int, ...], slack: float) -> float:
    """At least ||T||^2, and less than ``squared``, the proved maximum of ||G|| on the grid; or infinity.

    Shape:
        box: numbers of pixels on each axis that hold the vectors on the side of G.
    Cost:
        Three factors of G at each frequency, and eigenvalues of B, where one channel stands out; none elsewhere.
    """
    unknowns = math.prod(box)
    if unknowns > MOST_UNKNOWNS or gram.even.shape[0] > 1:
        return math.inf
    vectors = _vectors(gram, grid, peak, squared, min(MOST_VECTORS, MOST_UNKNOWNS // unknowns))
    if vectors is None:
        return math.inf
    best, level, where = math.inf, squared, _Box(frequencies(*grid), grid, box)
    for _ in range(NEWTON_STEPS):
        found = _schur(gram, grid, vectors, level)
        if found is None:
            break
        e, slope = where.symmetric(found[0]), found[1]
        smallest, vector = where.smallest(e)
        level -= smallest / max(where.quadratic(slope, vector), 1.0)
        if not smallest > 1e-3 * slack * level:
            break
    found = _schur(gram, grid, vectors, level)
    if found is not None:
        best = _proved(gram, grid, vectors, where.symmetric(found[0]), level, where, slack)
    return best


def _vectors(gram: Gram, grid: Grid, peak: Peak, squared: float, most: int) -> Tensor | None:
    """P: leading directions of the top eigenvectors at the peak and at the grid's points around it."""
    (g,) = _values(gram, grid[0], peak.numerators[None])
    v = top_vector(g, squared)
    first = float((v.mH @ g @ v).real)
    second = float(rayleigh_quotients((g - first * (v @ v.mH))[None], SECOND_STEPS)[0]) if len(g) > 1 else 0.0
    if not 0 < first or second > STANDS_OUT * first:
        return None
    steps = 2 * np.stack(np.meshgrid(*([-1, 0, 1] for _ in grid[0]), indexing="ij"), -1).reshape(-1, len(grid[0]))
    tops = []
    for g in _values(gram, grid[0], (peak.numerators + steps) % (2 * np.array(grid[0]))):
        u = v
        for _ in range(6):
            u = g @ u
            u = u / torch.linalg.vector_norm(u).clamp_min(1e-100)
        tops.append(u * math.sqrt(max(float((u.mH @ g @ u).real) / first, 0.0)) ** 8)
    tops = torch.cat(tops, 1)
    left, sizes, _ = torch.linalg.svd(torch.cat([tops.real, tops.imag], 1), full_matrices=False)
    return left[:, : min(most, int((sizes > 1e-6 * sizes[0]).sum()))].contiguous()


def _schur(gram: Gram, grid: Grid, p: Tensor, level: float) -> tuple[Tensor, Tensor] | None:
    """E(w) = (P^T (t - G)^-1 P)^-1 for half of the grid and dE / dt, by factors in float32; None where another channel is above t."""
    lift, e, slopes = LIFT * level, [], []
    for start, grams in _chunks(gram, grid):
        a = grams.to(torch.complex64).neg_()
        a.diagonal(dim1=1, dim2=2).add_(level)
        a += (lift * (p @ p.T)).to(a.dtype)
        if not _factorise(a).all():
            return None
        r = a.triu_()
        w = torch.linalg.solve_triangular(r.mH, p.to(r.dtype).expand(len(r), *p.shape), upper=False)
        z = torch.linalg.solve_triangular(r, w, upper=True)
        w, z = w.to(torch.complex128), z.to(torch.complex128)
        inverse, info = torch.linalg.inv_ex(w.mH @ w)
        if not torch.isfinite(torch.view_as_real(inverse)).all() or info.any():
            return None
        e.append(inverse - lift * torch.eye(p.shape[1], device="cpu"))
        slopes.append(inverse @ (z.mH @ z) @ inverse)
    e, slopes = torch.cat(e), torch.cat(slopes)
    return (e + e.mH) / 2, (slopes + slopes.mH) / 2


def _chunks(gram: Gram, grid: Grid):
    numerators, c = frequencies(*grid), gram.channels
    step = max(1, CHUNK // (c * c))
    for start in range(0, len(numerators), step):
        yield start, _values(gram, grid[0], numerators[start : start + step])


class _Box:
    """B for half of a grid's frequencies, the others by conjugation."""

    def __init__(self, numerators: np.ndarray, grid: Grid, box: tuple[int, ...]) -> None:
        pixels = np.stack(np.meshgrid(*(np.arange(n) for n in box), indexing="ij"), -1).reshape(-1, len(box))
        opposite = (-numerators) % (2 * np.array(grid[0]))
        self.count = math.prod(grid[0])
        self.twice = torch.from_numpy(np.where((opposite == numerators).all(1), 1.0, 2.0))
        difference = pixels[:, None] - pixels[None]
        self.lags, self.number = np.unique(difference.reshape(-1, len(box)), axis=0, return_inverse=True)
        self.number = torch.from_numpy(self.number.reshape(len(pixels), len(pixels)))
        self.angles = _angles(numerators, self.lags, grid[0])

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
        matrix = self.matrix(e)
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        return float(values[0]), vectors[:, 0]

    def quadratic(self, e: Tensor, vector: Tensor) -> float:
        return float(vector @ self.matrix(e) @ vector)


def _proved(gram: Gram, grid: Grid, p: Tensor, e: Tensor, level: float, where: _Box, slack: float) -> float:
    """L + m ||P||^2, for the E given."""
    c, r = p.shape
    proved, start = level * (1 + slack / 2), level * (1 + slack / 2)
    for start_at, grams in _chunks(gram, grid):
        part = e[start_at : start_at + len(grams)]
        grams += p.to(e.dtype) @ part @ p.T.to(e.dtype)
        proved, _ = raised_level(grams, proved, slack, start * (1 + 8 * slack))
        if proved == math.inf:
            return math.inf
    stretch = float(p.square().sum()) * (1 + 4 * c * r * U)  # ||P||_F^2
    largest = float(torch.linalg.vector_norm(torch.view_as_real(e).flatten(1), dim=1).max()) * (1 + 8 * r * r * U)
    rounded = 4 * (c + 2 * r + 8) * U * (stretch * largest + 2 * c * proved) + gram.error
    least = proved + definiteness_error(c) * (proved + r * stretch * largest) + rounded
    below = -where.matrix(e).to(torch.complex128)
    below = (below + below.mH) / 2
    m, _ = raised_level(below[None], 1e-6 * slack * level, slack, math.inf)
    m += definiteness_error(len(below)) * (m + 2 * largest) + where.error(e)
    return (least + m * (1 + 1e-9)) * (1 + 32 * U) if _orthonormal(p) else math.inf


def _orthonormal(p: Tensor) -> bool:
    """Whether ||P||^2 <= 1 + 1e-9, proved: ||P^T P - Id||_F is far less."""
    c, r = p.shape
    defect = p.T @ p - torch.eye(r, dtype=p.dtype, device="cpu")
    return float(defect.abs().sum()) + 4 * c * r * r * U <= 1e-9
