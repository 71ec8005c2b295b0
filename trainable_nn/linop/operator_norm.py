r"""A proved upper bound of the operator norm of a convolution as it is: padding, stride, dilation, groups.

Each axis becomes a piece of a circle (``axes``), so ||T|| <= factor * max over a grid of ||M(w)||, M the symbol of
the polyphase kernel. For a length beyond use, and for every length, the grid is a fixed one of G frequencies: a
trigonometric polynomial whose exponents lie in [-d, d] stays above its maximum times cos(pi d / G) at the
grid point next to the maximum (M. Riesz; for half-integer d by Duffin and Schaeffer, f'^2 + d^2 f^2 <= d^2 max f^2), which
costs 1 / cos(pi d / G) on each axis. ``symbol`` and ``definite`` prove the maximum in floats. im2col's bound, the
kernel's norm as a matrix times the root of the uses of one pixel, is exact where patches don't overlap, and
replaces the other where it is smaller. Groups are blocks of a block diagonal: their maximum.

Source: Sedghi et al. (2019), arXiv:1805.10408, for the symbol; Araujo et al. (2021), arXiv:2006.08391, for a grid.
The circle of the least size, its twisted seam and the rounding are ours.
"""

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
from torch import Tensor

from .axes import Axis, Circle, circle_of
from .layers import Convolution, read_layer, read_weight, sizes_of
from .norm import U, _scaled, matrix_norm_at_most
from .symbol import Gram, estimate_beside, gram_of, grid_maximum

MOST_FREQUENCIES = 2**20  # of a fixed grid
WORTH = (2, 5)  # slacks to be gained before another seam is tried, if it costs below DEAR and above
CHEAP, DEAR = 2e8, 2e9  # multiplications of a grid; a cheap one is tried with every seam all the same
COS_ERROR = 2.0**-45  # of 1 / cos, for angles of at most pi / 4


def operator_norm_at_most(conv, input_shape: Sequence[int] | None, *, rtol: float = 0.05) -> float:
    """A float that is at least the operator norm of x -> conv(x) - conv(0), in the Euclidean norms of one sample.

    It bounds the exact norm of the float weights, for convolutions, transposed ones, linear layers, and subclasses
    with an ``effective_weight()``; how torch rounds while it convolves is not in it.

    Shape:
        input_shape: the image's sizes, with or without channels and batch before them; None bounds every size.
    Units:
        rtol: the work is set so that arithmetic and grid spend rtol / 40 of excess, or rtol / 4 for None; the rest
        is for the circle, whose excess falls as 1 / n^2 whatever rtol is. Measured with the default on a ResNet-18, random
        weights: 0.4 % at n = 16 and less above, 2 % at 8, 10 % at 4; a smooth spike in space can cost three times
        that. Padding by pixels costs more: at most the root of the copies of one pixel on each axis.
    Cost:
        For n x n outputs, c channels on the smaller side and C on the other: 2 c^2 C k^4 + n^2 c^3 flops, or so.
    Raises:
        ValueError: the weight is on the meta device, empty, NaN or infinite, or input_shape gives no output.
        TypeError: the weight holds no real floats; UnboundedError: the layer is none of these.
    """
    layer = read_layer(conv, input_shape)
    if isinstance(layer, Tensor):
        return matrix_norm_at_most(layer, rtol=_slack(rtol))
    return _norm_of(layer, rtol)


def convolution_norm_at_most(
    weight: Tensor,
    input_shape: Sequence[int] | None,
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] | Sequence[tuple[int, int]] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    rtol: float = 0.05,
) -> float:
    """``operator_norm_at_most`` of the convolution with this weight; padding may be pairs (before, after) for each axis.

    Shape:
        weight: (out_channels, in_channels / groups, *kernel), one to three axes.
    """
    matrices = read_weight(weight, groups, "convolution_norm_at_most")
    geometry = (stride, padding, dilation, padding_mode)
    sizes = sizes_of(input_shape, weight.dim() - 2, groups * weight.shape[1], "convolution_norm_at_most")
    return _norm_of(Convolution.from_arguments(matrices, sizes, *geometry), rtol)


def _slack(rtol: float) -> float:
    if not 0 < rtol < math.inf:
        raise ValueError(f"operator_norm_at_most: rtol must be a number above 0, got {rtol}. The default is 0.05.")
    return max(min(rtol, 1.0) / 50, 1e-10)


def _norm_of(layer: Convolution, rtol: float) -> float:
    slack, circles = _slack(rtol), [circle_of(axis) for axis in layer.axes]
    uses = math.prod(circle.uses for circle in circles)
    used = [circle.taps for circle in circles]
    kernel = layer.kernel[(slice(None),) * 3 + np.ix_(*used)] if uses else layer.kernel[..., :0]
    kernel, exponent = _scaled(kernel.flatten(3).contiguous())
    if exponent is None:
        return 0.0
    bound = math.inf if uses == 1 else _circle_bound(kernel, used, layer.axes, circles, slack)
    overlap = _up(math.sqrt(uses))
    groups, rows, *_ = kernel.shape
    matrices = kernel.reshape(groups, rows, -1)
    least = float(matrices.square().sum((1, 2)).max()) / min(matrices.shape[1:])  # at most the squared norm
    if math.sqrt(least) * overlap < bound:
        norm = max(matrix_norm_at_most(matrix, rtol=slack) for matrix in matrices)
        bound = min(bound, norm if uses == 1 else _up(norm * overlap))
    return _shifted(bound, exponent)


def _circle_bound(
    kernel: Tensor, used: list[np.ndarray], axes: Sequence[Axis], circles: list[Circle], slack: float
) -> float:
    """factor * max ||M(w)|| over the best of the grids."""
    reach = np.stack(np.meshgrid(*(t * a.dilation for t, a in zip(used, axes)), indexing="ij"), -1)
    gram = gram_of(kernel, reach.reshape(-1, len(axes)), tuple(a.stride for a in axes))
    sizes, factor, twists = [], math.sqrt(math.prod(c.copies for c in circles)), []
    for circle in circles:
        size, cost = _fixed_grid(circle, slack, len(axes))
        if circle.places is not None and circle.places <= size:
            size, cost = circle.places, 1.0
        sizes.append(size)
        factor *= cost
        twists.append((0, 1) if circle.open and circle.places == size else (0,))
    squared = _least_maximum(gram, tuple(sizes), list(product(*twists)), slack)
    return _up(_up(math.sqrt(squared)) * factor)


def _least_maximum(gram: Gram, sizes: tuple[int, ...], seams: list[tuple[int, ...]], slack: float) -> float:
    """The least bound of max ||G(w)|| over the seams; dear ones are passed over if no better beside the first one's peak."""
    squared, peak = grid_maximum(gram, sizes, seams[0], 2 * slack)
    cost = _multiplications(gram, sizes)
    worth = 1 - 2 * slack * WORTH[cost > DEAR]
    for seam in seams[1:] if peak is not None else ():
        if cost < CHEAP or estimate_beside(gram, sizes, seam, peak) < squared * worth:
            squared = min(squared, grid_maximum(gram, sizes, seam, 2 * slack, squared)[0])
    return squared


def _fixed_grid(circle: Circle, slack: float, axes: int) -> tuple[int, float]:
    """A number G of frequencies and at least 1 / cos(pi d / G)."""
    if circle.degree == 0:
        return 1, 1.0
    excess = (10 if circle.places is None else 0.5) * slack / axes
    most = max(int(MOST_FREQUENCIES ** (1 / axes)), math.ceil(4 * circle.degree))
    size = min(math.ceil(math.pi * circle.degree / math.sqrt(2 * excess)) + 1, most)
    size = max(size, math.ceil(4 * circle.degree))
    return size, 1 / math.cos(math.pi * circle.degree / size) * (1 + COS_ERROR)


def _multiplications(gram: Gram, sizes: Sequence[int]) -> float:
    c = gram.channels
    return gram.even.shape[0] * math.prod(sizes) / 2 * (4 * gram.even.shape[1] * c**2 + 4 * c**3)


def _up(x: float) -> float:
    """At least the exact value of an expression of at most eight rounded operations on numbers >= 0."""
    return x * (1 + 16 * U)


def _shifted(mantissa: float, exponent: int) -> float:
    """At least mantissa 2^exponent."""
    try:
        bound = math.ldexp(mantissa, exponent)
    except OverflowError:
        return math.inf  # the norm is past the largest float, or within its rounding
    return math.nextafter(bound, math.inf) if bound < 2.0**-1021 else bound  # ldexp rounds there
