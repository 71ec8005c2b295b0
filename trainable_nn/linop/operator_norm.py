r"""A proved upper bound of the operator norm of a convolution as it is: padding, stride, dilation, groups.

Each axis becomes a piece of a circle (``axes``), so ||T|| <= factor * max over a grid of ||M(w)||, M the symbol of
the polyphase kernel. For a length beyond use, and for every length, the grid is a fixed one of G frequencies: a
trigonometric polynomial whose exponents lie in [-d, d] stays above its maximum times cos(pi d / G) at the
grid point next to the maximum (M. Riesz; for half-integer d by Duffin and Schaeffer, f'^2 + d^2 f^2 <= d^2 max f^2), which
costs 1 / cos(pi d / G) on each axis. ``symbol`` and ``definite`` prove the maximum in floats. im2col's bound, the
kernel's norm as a matrix times the root of the uses of one pixel, is exact where patches don't overlap, and
replaces the other where it is smaller. Where a singular value stands out at the grid's peak, its channels are held to the
pixels that exist (``channel_box``), not only to the circle; where none does and the image is small, all are on one axis
(``line_box``). A small convolution is bounded by its own matrix instead
(``dense_norm``), to rounding, whatever its padding. Groups are blocks of a block diagonal: their maximum.

Source: Sedghi et al. (2019), arXiv:1805.10408, for the symbol; Araujo et al. (2021), arXiv:2006.08391, for a grid.
The circle of the least size, its twisted seam and the rounding are ours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from .axes import Circle, circle_of, reads
from .channel_box import boxed_maximum
from .dense_norm import FEW_ROWS, dense_flops, dense_norms_at_most, sides
from .grid_choice import choose_grid
from .layers import Convolution, read_layer, read_weight, sizes_of
from .line_box import line_maximum
from .norm import U, _scaled, matrix_norm_at_most
from .one_thread import one_thread
from .symbol import Symbol, frequencies, symbol_of
from .symbol_gram import gram_of, grid_maximum
from .without_autocast import without_autocast

MOST_FREQUENCIES = 2**20  # of a fixed grid
CHEAP, DEAR = 2e7, 2e9  # multiplications of a grid; one with a place more is tried too where it is cheap, or where few
# points are high and it is not dear
LONGEST = 2**12  # pixels of an axis of a small image
MOST_DENSE = (2.5e9, 4e9)  # flops by the matrix itself: where no pixel is copied, and where one is
POWER_STEPS = 3  # before im2col's bound is proved
ROUGH = 3e-3  # relative error of an estimate, or so
LEAST_DEGREE = 1  # of three taps without a stride; with fewer so few taps meet the border that one axis gains nothing
COS_ERROR = 2.0**-45  # of 1 / cos, for angles of at most pi / 4


@without_autocast
def operator_norm_at_most(conv, input_shape: Sequence[int] | None, *, rtol: float = 0.05) -> float:
    """A float that is at least the operator norm of x -> conv(x) - conv(0), in the Euclidean norms of one sample.

    It bounds the exact norm of the float weights, for convolutions, transposed ones, linear layers, and subclasses
    with an ``effective_weight()``; how torch rounds while it convolves is not in it.

    Shape:
        input_shape: the image's sizes, with or without channels and batch before them; None bounds every size.
    Units:
        rtol: the work is set so that arithmetic and grid spend rtol / 40 of excess, or rtol / 4 for None; the rest
        is for the circle, whose excess falls as 1 / n^2 whatever rtol is. Measured with the default on a ResNet-18, random
        weights: 0.5 % at n = 16 and less above, 2 % at 8, 8 % at 4; under a rank-one spike 0.3 %, 3 % and 7 %.
        Padding by pixels costs more: at most the root of the copies of one pixel on each axis. A matrix with a smaller side
        of 1,000 or less, 1,200 where pixels are copied, is bounded within rtol / 40 whatever the geometry.
    Cost:
        For n x n outputs, c channels on the smaller side and C on the other: 2 c^2 C k^4 + n^2 c^3 flops, or so, or
        2 n^2 c^2 C where that is less and n small. A small matrix of sides s and t: s^2 (s + t), at most 4e9.
    Raises:
        ValueError: the weight is on the meta device, empty, NaN or infinite, or input_shape gives no output.
        TypeError: the weight holds no real floats; UnboundedError: the layer is none of these.
    """
    layer = read_layer(conv, input_shape)
    if isinstance(layer, Tensor):
        return matrix_norm_at_most(layer, rtol=_slack(rtol))
    return attained_bound(layer, _slack(rtol), boxed=True).bound


@without_autocast
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
    return attained_bound(Convolution.from_arguments(matrices, sizes, *geometry), _slack(rtol), boxed=True).bound


def _slack(rtol: float) -> float:
    if not 0 < rtol < math.inf:
        raise ValueError(f"operator_norm_at_most: rtol must be a number above 0, got {rtol}. The default is 0.05.")
    return max(min(rtol, 1.0) / 50, 1e-10)


@dataclass(frozen=True)
class Attained:
    """A bound, and which matrix has it: the symbol of one group at some turns of each axis (None: the kernel's matrix).

    taps: the numbers of the taps in use. positions: theirs on the axes; a step is a stride.
    """

    bound: float
    group: int
    taps: np.ndarray
    positions: np.ndarray
    strides: tuple[int, ...]
    turns: np.ndarray | None

    def waves(self) -> tuple[list[int], np.ndarray]:
        """For each tap in use the number of its block of columns, and the unit complex number that multiplies it."""
        if self.turns is None:
            return list(range(len(self.taps))), np.ones(len(self.taps))
        steps, phases = np.divmod(self.positions, np.array(self.strides))
        number = np.ravel_multi_index(tuple(phases.T), self.strides)
        return number.tolist(), np.exp(2j * np.pi * (steps * self.turns).sum(1))


@dataclass(frozen=True)
class Prepared:
    """A layer that was read: its taps in use, times 2^-exponent so that the largest entry is in [1/2, 1), and its circles.

    kernel: (groups, rows, columns, taps). exponent: None for a zero kernel. positions: of the taps. uses: of one pixel.
    """

    layer: Convolution
    circles: list[Circle]
    kernel: Tensor
    exponent: int | None
    positions: np.ndarray
    uses: int

    @classmethod
    def of(cls, layer: Convolution) -> "Prepared":
        circles = [circle_of(axis) for axis in layer.axes]
        uses = math.prod(circle.uses for circle in circles)
        used = [circle.taps for circle in circles]
        kernel = layer.kernel if uses else layer.kernel[..., :0]
        if uses and any(len(taps) < k for taps, k in zip(used, layer.kernel.shape[3:])):
            kernel = kernel[(slice(None),) * 3 + np.ix_(*used)]
        kernel, exponent = _scaled(kernel.flatten(3).contiguous())
        reach = np.stack(np.meshgrid(*(t * a.dilation for t, a in zip(used, layer.axes)), indexing="ij"), -1)
        return cls(layer, circles, kernel, exponent, reach.reshape(-1, len(layer.axes)), uses)

    @property
    def used(self) -> list[np.ndarray]:
        return [circle.taps for circle in self.circles]

    def attained(self, bound: float, group: int, turns: np.ndarray | None, narrow: float) -> Attained:
        """The bound given, or im2col's where that is less."""
        layer, taps = self.layer, np.arange(0)
        if self.uses:
            taps = np.ravel_multi_index(np.ix_(*self.used), layer.kernel.shape[3:]).ravel()
        groups, rows, *_ = self.kernel.shape
        matrices, overlap = self.kernel.reshape(groups, rows, -1), _up(math.sqrt(self.uses))
        if bound == math.inf or (bound > 0 and _stretch(matrices) * overlap < bound):
            norms = [matrix_norm_at_most(matrix, rtol=narrow) for matrix in matrices]
            norm, at = max(norms), norms.index(max(norms))
            norm = norm if self.uses == 1 else _up(norm * overlap)
            if norm < bound:
                bound, group, turns = norm, at, None
        bound = _shifted(bound, self.exponent or 0) if bound else 0.0
        return Attained(bound, group, taps, self.positions, tuple(axis.stride for axis in layer.axes), turns)


@one_thread
def attained_bound(layer: Convolution, slack: float, narrow: float | None = None, boxed: bool = False) -> Attained:
    """The bound for a layer that was read; ``narrow`` is the arithmetic's share, if not slack too.

    boxed: it may be less than what the matrix has, which then only tells where the bound before was (``channel_box``).
    """
    narrow, one = slack if narrow is None else narrow, Prepared.of(layer)
    bound, group, turns = math.inf, 0, None
    if one.exponent is None:
        bound = 0.0
    elif boxed and by_matrix(one):
        (bound,) = dense_norms_at_most(one.kernel[None], layer.axes, one.used, narrow)
    elif one.uses > 1:
        symbol = symbol_of(one.kernel, one.positions, tuple(axis.stride for axis in layer.axes))
        bound, group, turns = _circle_bound(symbol, one.circles, slack, narrow, boxed)
    return one.attained(bound, group, turns, narrow)


@one_thread
def equal_bounds(layers: Sequence[Prepared], rtol: float) -> list[float]:
    """``operator_norm_at_most`` of layers of one ``shape_of_matrix``, all at once."""
    kernels, first, slack = torch.stack([one.kernel for one in layers]), layers[0], _slack(rtol)
    bounds = dense_norms_at_most(kernels, first.layer.axes, first.used, slack)
    return [one.attained(bound, 0, None, slack).bound for one, bound in zip(layers, bounds)]


def shape_of_matrix(one: Prepared) -> tuple | None:
    """What layers have in common that are bounded faster together: small ones, by their matrices; None for others."""
    if not by_matrix(one) or sides(one.kernel.shape, one.layer.axes)[0] > FEW_ROWS:
        return None
    return one.kernel.shape, one.layer.axes


def by_matrix(one: Prepared) -> bool:
    """Whether the matrix itself costs little, or no more than the circle may lose where pixels are copied."""
    axes = one.layer.axes
    if one.exponent is None or any(axis.n is None or axis.n > LONGEST for axis in axes):
        return False
    if one.uses == 1 and all((reads(a)[c.taps] >= 0).all(0).any() for a, c in zip(axes, one.circles)):
        return False  # some output reads a pixel with every tap, and none is read twice: the kernel's own norm is attained
    return dense_flops(one.kernel.shape, axes) <= MOST_DENSE[any(circle.copies > 1 for circle in one.circles)]


def _circle_bound(
    symbol: Symbol, circles: list[Circle], slack: float, narrow: float, boxed: bool
) -> tuple[float, int, np.ndarray | None]:
    """factor * max ||M(w)|| over the best of the grids; the group and the turns of each axis where it is."""
    factor, choices = math.sqrt(math.prod(c.copies for c in circles)), []
    places = [circle.places or circle.degree for circle in circles]
    cost = _multiplications(symbol, places)
    for circle in circles:
        size, excess = _fixed_grid(circle, slack, len(circles))
        if circle.places is not None and circle.places <= size:
            size, excess = circle.places, 1.0
        factor *= excess
        free = circle.open and circle.places == size
        choices.append([(size + more, twist) for more in (0, 1) for twist in (0, 1)] if free else [(size, 0)])
    grids = [tuple(zip(*grid)) for grid in product(*choices)]
    short = [grid for grid in grids if grid[0] == grids[0][0]]
    longer = [grid for grid in grids if grid not in short] if cost < DEAR else []
    grids, longer = (short + longer, []) if cost < CHEAP else (short, longer)
    held = boxed and all(c.open and c.places is not None and c.places <= n for c, n in zip(circles, grids[0][0]))
    choice = choose_grid(symbol, grids, longer)
    gram = gram_of(symbol, len(frequencies(*choice.grid)))
    box, squared, peak = tuple(circle.box[symbol.by_inputs] for circle in circles), math.inf, choice.peak
    if held:
        squared = boxed_maximum(gram, choice, box, 2 * narrow)
    if held and squared == math.inf and min(circle.degree for circle in circles) >= LEAST_DEGREE:
        squared = line_maximum(gram, choice, box)
    safe = narrow > ROUGH / 10  # so wide that the estimate's error doesn't count
    if not squared < choice.estimate * (1 if safe else 1 - ROUGH):
        guess = choice.estimate * (1 + narrow / 2 if safe else 1 - ROUGH)
        circle, found = grid_maximum(gram, choice.grid, 2 * narrow, guess)
        squared, peak = min(squared, circle), found or peak
    turns = peak.numerators / (2 * np.array(choice.grid[0]))
    return _up(_up(math.sqrt(squared)) * factor), peak.group, turns


def _fixed_grid(circle: Circle, slack: float, axes: int) -> tuple[int, float]:
    """A number G of frequencies and at least 1 / cos(pi d / G)."""
    if circle.degree == 0:
        return 1, 1.0
    excess = (10 if circle.places is None else 0.5) * slack / axes
    most = max(int(MOST_FREQUENCIES ** (1 / axes)), math.ceil(4 * circle.degree))
    size = min(math.ceil(math.pi * circle.degree / math.sqrt(2 * excess)) + 1, most)
    size = max(size, math.ceil(4 * circle.degree))
    return size, 1 / math.cos(math.pi * circle.degree / size) * (1 + COS_ERROR)


def _multiplications(symbol: Symbol, sizes: Sequence[int]) -> float:
    """Of factors on a grid, and of sums for its matrices, at 25 lags."""
    c = symbol.channels
    return symbol.groups * math.prod(sizes) / 2 * (100 * c**2 + 4 * c**3)


def _stretch(matrices: Tensor) -> float:
    """A ratio ||A^T x|| / ||x|| that is near the largest norm of the matrices, for the three steps that it takes, and below it."""
    x = matrices.sum(2, keepdim=True) + matrices[:, :, :1]
    for _ in range(POWER_STEPS):
        x = matrices @ (matrices.mT @ x)
        x = x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(2.0**-500)
    return float(torch.linalg.vector_norm(matrices.mT @ x, dim=1).max())


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
