r"""A proved upper bound of a matrix's largest singular value, by Gram iteration in float64.

For any matrix H, \|\|H\|\|^2 = \|\|H H^T\|\|. In floats, G = fl(H H^T) obeys, for n columns and any order
of summation, \|G - H H^T\| <= gamma_n \|H\| \|H\|^T entry by entry, gamma_n = n u / (1 - n u), so

    \|\|H\|\|^2 <= \|\|G\|\| + gamma_n \|\|H\|\|_F^2  (+ what underflowed),

and the same again for G. After j steps \|\|G\|\| <= \|\|G\|\|_F closes the chain; the Frobenius norm is at
most rank^(1/2) too large, and j square roots make that rank^(2^-(j+1)). Before each step the
matrix is scaled by a power of two, which rounds nothing, so nothing overflows, and what is
lost below 2^-1022 is added to the bound.

Assumes IEEE float64 with rounding to nearest and a matrix product by inner products (no
Strassen), as every CPU library of torch has it; so the product always runs on the CPU.

Source: Delattre et al. (2023), arXiv:2305.16173, for the iteration; the rounding terms are ours.
"""

import math

import torch
from torch import Tensor

U = 2.0**-53
LOST = 2.0**-1020  # an underflow loses less than 2^-1022, even where denormals are flushed; and a margin
MOST_STEPS = 24


def matrix_norm_at_most(matrix: Tensor, *, rtol: float = 1e-3) -> float:
    """A float that is at least the spectral norm of the matrix of floats, and rarely more than 1 + rtol times it.

    Shape:
        matrix: (m, n), of any floating dtype, on any device; (m, n, ...) is read as (m, n * ...).
    Cost:
        One Gram product of the smaller side, then about log2(ln(rank) / rtol) squarings of it, at most 24.
        Random 512 x 512: eight squarings.
    Raises:
        ValueError: an entry is NaN or infinite, or the tensor has fewer than two axes.
        TypeError: the entries are no real floats.
    """
    if not matrix.is_floating_point():
        raise TypeError(
            f"matrix_norm_at_most: the entries must be real floats, got {matrix.dtype}. Convert them first."
        )
    if matrix.dim() < 2:
        raise ValueError(f"matrix_norm_at_most: a matrix is needed, got shape {tuple(matrix.shape)}. Add an axis of 1.")
    h = matrix.detach().to("cpu", torch.float64).flatten(1)
    if not torch.isfinite(h).all():
        raise ValueError("matrix_norm_at_most: the matrix has entries that are NaN or infinite. Replace them first.")
    h = h.T if h.shape[0] > h.shape[1] else h
    mantissa, exponent = _norm(h.contiguous(), MOST_STEPS, 1.0, rtol)
    try:
        bound = math.ldexp(mantissa, exponent)
    except OverflowError:
        return math.inf  # the norm is past the largest float, or within its rounding
    return math.nextafter(bound, math.inf) if 0 < mantissa and bound < 2.0**-1021 else bound  # ldexp rounds there


def _norm(h: Tensor, steps: int, power: float, rtol: float) -> tuple[float, int]:
    """(a, e) with norm(h) <= a 2^e; h stands for the ``power``-th power of the wanted norm."""
    h, exponent = _scaled(h)
    if exponent is None:
        return 0.0, 0
    lost = LOST * math.sqrt(h.numel())
    frobenius = _frobenius_at_most(h)
    if steps == 0 or h.shape[0] == 1 or _settled(h, frobenius, power, rtol):
        return _up(frobenius + lost), exponent
    product = h @ h.T
    n = h.shape[1]
    error = _up(n * U / (1 - n * U) * frobenius**2 + LOST * n * h.shape[0])
    a, e = _norm(product, steps - 1, 2 * power, rtol)
    squared = _up(math.ldexp(a, e) + error)
    return _up(_up(math.sqrt(squared)) + lost), exponent


def _scaled(h: Tensor) -> tuple[Tensor, int | None]:
    """h 2^-e with its largest entry in [1/2, 1), and e; None for a zero or empty matrix."""
    largest = max(map(abs, map(float, h.aminmax()))) if h.numel() else 0.0
    if largest == 0.0:
        return h, None
    exponent = math.frexp(largest)[1]
    if abs(exponent) < 1000:
        return h * 2.0**-exponent, exponent
    half = -exponent // 2  # in two factors: 2^1074, for denormals, is itself past the largest float
    return h * 2.0**half * 2.0 ** (-exponent - half), exponent


def _frobenius_at_most(h: Tensor) -> float:
    """An upper bound of sqrt(sum h^2), for entries in [-1, 1] with at least one of 1/2 or more."""
    n = h.numel()
    return _up(math.sqrt(float(torch.sum(h * h)) * (1 + 2 * n * U) + n * LOST))


def _settled(h: Tensor, frobenius: float, power: float, rtol: float) -> bool:
    """Whether the Frobenius norm is close enough: for h >= 0, F^2 / trace <= norm(h) <= F. Steers only the cost."""
    if power == 1.0:  # not a Gram matrix yet
        return False
    trace = float(h.diagonal().sum())
    return math.log(trace / frobenius) <= power * math.log1p(rtol)


def _up(x: float) -> float:
    """At least the exact value of an expression of at most eight rounded operations on numbers >= 0."""
    return x * (1 + 16 * U)
