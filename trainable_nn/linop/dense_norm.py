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
from .definite import definiteness_error, raised_level
from .norm import LOST, U

MOST_ENTRIES = 2**22  # of A, and of all E_j
FEW_ROWS = 128  # for which LAPACK's eigenvalues are a cheaper guess than Lanczos' algorithm, and an exact one
CLOSE = 1e-9  # relative, of the level above such a guess


def dense_flops(shape: tuple[int, ...], axes: tuple[Axis, ...]) -> float:
    """About the flops of ``dense_norm_at_most``; infinite where the matrix has too many entries.

    Shape:
        shape: (groups, rows, columns, taps) of the kernel.
    """
    groups, rows, columns, taps = shape
    tables = [reads(axis).shape[1] for axis in axes]
    outputs, inputs = math.prod(tables), math.prod(axis.n for axis in axes)
    small, large = sorted((rows * outputs, columns * inputs))
    if groups * small * large > MOST_ENTRIES or outputs * inputs * taps > MOST_ENTRIES:
        return math.inf
    return groups * small * (large * (small + 2.0 * taps) + small**2)


def dense_norm_at_most(kernel: Tensor, axes: tuple[Axis, ...], used: list[np.ndarray], slack: float) -> float:
    """At least the norm of the convolution, and rarely more than 1 + slack / 4 times it.

    Shape:
        kernel: (groups, rows, columns, taps), float64, entries at most 1 and one of 1/2 or more.
        used: the numbers of the taps on each axis that the kernel has.
    """
    joins = _joins([reads(axis)[taps] for axis, taps in zip(axes, used)], [axis.n for axis in axes])
    outputs, inputs, taps = joins.shape
    groups, rows, columns, _ = kernel.shape
    matrix = joins.flatten(0, 1) @ kernel.permute(3, 0, 1, 2).reshape(taps, -1)
    matrix = matrix.reshape(outputs, inputs, groups, rows, columns)
    wide = rows * outputs <= columns * inputs
    matrix = matrix.permute(*((2, 0, 3, 1, 4) if wide else (2, 1, 4, 0, 3)))
    matrix = matrix.reshape(groups, matrix.shape[1] * matrix.shape[2], -1)
    _, s, n = matrix.shape
    a = matrix.numpy()
    gram = torch.from_numpy(np.matmul(a, a.transpose(0, 2, 1)))
    guess = float(torch.linalg.eigvalsh(gram).max()) * (1 + min(CLOSE, slack / 8)) if s <= FEW_ROWS else 0.0
    level, _ = raised_level(gram, guess, slack / 2)
    squared = level * (1 + definiteness_error(s)) + 2 * _gamma(n) * _squares(matrix) + LOST * n * s
    together = int(joins.sum(2).max())
    lost = _gamma(together) * math.sqrt(together * outputs * _squares(kernel)) if together > 1 else 0.0
    return (math.sqrt(squared) + lost) * (1 + 32 * U)


def _joins(tables: list[np.ndarray], sizes: list[int]) -> Tensor:
    """E_j: (outputs, inputs, taps), from which pixel each tap and output reads, axis by axis."""
    joins = torch.ones(1, 1, 1, dtype=torch.float64, device="cpu")
    for table, n in zip(tables, sizes):
        one = torch.from_numpy((table.T[:, None] == np.arange(n)[None, :, None]).astype(np.float64))
        joins = joins[:, None, :, None, :, None] * one[None, :, None, :, None]
        joins = joins.flatten(4).flatten(2, 3).flatten(0, 1)
    return joins


def _squares(a: Tensor) -> float:
    """At least the squared Frobenius norm of each matrix, or kernel, along the first axis."""
    return float(torch.linalg.vector_norm(a.flatten(1), dim=1).max()) ** 2 * (1 + 8 * a[0].numel() * U) + a[0].numel() * LOST


def _gamma(n: int) -> float:
    return n * U / (1 - n * U)
