r"""A proved upper bound of a small convolution's norm by its own matrix, whatever its padding and geometry.

A = sum_j E_j x K_j for the taps j, E_j the 0-1 matrix of the pairs (output pixel, input pixel) that tap j joins, the
Kronecker product of the axes' own. Where padding copies pixels, up to m taps meet in one entry and are added: it errs by
at most gamma_m times the sum of their moduli, so A in the Frobenius norm by gamma_m sqrt(m P) F, for P outputs of a
channel and a kernel of Frobenius norm F; products with 0 and 1 round nothing, and where m = 1 A is exact.

With s the smaller side and n the other, G = fl(A A^T) is within gamma_n ||A||_F^2 of A A^T (``norm``), and twice that if its
upper triangle is not the lower one, which alone is read. A Cholesky factor of t Id - G proves ||G|| <= t
(``definite``, whose constant for complex numbers is more than that for real ones); t is guessed.
"""

import math

import numpy as np
import torch
from torch import Tensor

from .axes import Axis, reads
from .definite import definiteness_error, not_definite, raised_level
from .norm import LOST, U

MOST_ENTRIES = 2**22  # of A, and of all E_j
FEW_ROWS = 128  # for which LAPACK's eigenvalues are a cheaper guess than Lanczos' algorithm, an exact one, and many
# layers at once are faster than one by one: 32 of them 2.3 times at 32 rows, 1.9 at 64, 1.5 at 128, 1.0 at 256
CLOSE = 1e-9  # relative, of the level above such a guess


def sides(shape: tuple[int, ...], axes: tuple[Axis, ...]) -> tuple[int, int]:
    """The smaller and the larger side of one group's matrix, for a kernel (groups, rows, columns, taps)."""
    outputs, inputs = math.prod(reads(axis).shape[1] for axis in axes), math.prod(axis.n for axis in axes)
    small, large = sorted((shape[1] * outputs, shape[2] * inputs))
    return small, large


def dense_flops(shape: tuple[int, ...], axes: tuple[Axis, ...]) -> float:
    """About the flops of ``dense_norms_at_most`` for one layer; infinite where its matrix has too many entries."""
    (small, large), (groups, rows, columns, taps) = sides(shape, axes), shape
    if max(groups * small * large, small * large // (rows * columns) * taps) > MOST_ENTRIES:
        return math.inf
    return groups * small * (large * (small + 2.0 * taps) + small**2)


def dense_norms_at_most(kernels: Tensor, axes: tuple[Axis, ...], used: list[np.ndarray], slack: float) -> list[float]:
    """At least the norm of each of some convolutions of one geometry, and rarely more than 1 + slack / 4 times it.

    Shape:
        kernels: (layers, groups, rows, columns, taps), float64; of each layer the entries are at most 1 and one 1/2 or more.
        used: the numbers of the taps on each axis that the kernels have.
    """
    joins = _joins([reads(axis)[taps] for axis, taps in zip(axes, used)], [axis.n for axis in axes])
    (outputs, inputs, taps), (layers, groups, rows, columns, _) = joins.shape, kernels.shape
    matrices = joins.flatten(0, 1) @ kernels.permute(4, 0, 1, 2, 3).reshape(taps, -1)
    matrices = matrices.reshape(outputs, inputs, layers * groups, rows, columns)
    wide = rows * outputs <= columns * inputs
    matrices = matrices.permute(*((2, 0, 3, 1, 4) if wide else (2, 1, 4, 0, 3)))
    matrices = matrices.reshape(layers * groups, matrices.shape[1] * matrices.shape[2], -1)
    _, s, n = matrices.shape
    a = matrices.numpy()
    grams = torch.from_numpy(np.matmul(a, a.transpose(0, 2, 1)))
    levels = _levels(grams.unflatten(0, (layers, groups)), slack)
    squared = [
        level * (1 + definiteness_error(s)) + 2 * _gamma(n) * f + LOST * n * s
        for level, f in zip(levels, _squares(matrices.unflatten(0, (layers, groups))))
    ]
    m = int(joins.sum(2).max())
    lost = [_gamma(m) * math.sqrt(m * outputs * f) if m > 1 else 0.0 for f in _squares(kernels)]
    return [(math.sqrt(x) + y) * (1 + 32 * U) for x, y in zip(squared, lost)]


def _levels(grams: Tensor, slack: float) -> list[float]:
    """For each layer a proved level of its matrices: (layers, groups, s, s)."""
    layers, groups, s, _ = grams.shape
    if s > FEW_ROWS:
        return [raised_level(part, 0.0, slack / 2)[0] for part in grams]
    guesses = torch.linalg.eigvalsh(grams)[..., -1].amax(1) * (1 + min(CLOSE, slack / 8))
    failed = not_definite(grams.flatten(0, 1), guesses.repeat_interleave(groups)) // groups
    levels = guesses.tolist()
    for layer in set(failed.tolist()):
        levels[layer] = raised_level(grams[layer], levels[layer], slack / 2)[0]
    return levels


def _joins(tables: list[np.ndarray], sizes: list[int]) -> Tensor:
    """E_j: (outputs, inputs, taps), from which pixel each tap and output reads, axis by axis."""
    joins = torch.ones(1, 1, 1, dtype=torch.float64, device="cpu")
    for table, n in zip(tables, sizes):
        one = torch.from_numpy((table.T[:, None] == np.arange(n)[None, :, None]).astype(np.float64))
        joins = joins[:, None, :, None, :, None] * one[None, :, None, :, None]
        joins = joins.flatten(4).flatten(2, 3).flatten(0, 1)
    return joins


def _squares(a: Tensor) -> list[float]:
    """For each layer at least the squared Frobenius norm of any group: (layers, groups, ...)."""
    count = a[0, 0].numel()
    norms = torch.linalg.vector_norm(a.flatten(2), dim=2).amax(1).tolist()
    return [f * f * (1 + 8 * count * U) + count * LOST for f in norms]


def _gamma(n: int) -> float:
    return n * U / (1 - n * U)
