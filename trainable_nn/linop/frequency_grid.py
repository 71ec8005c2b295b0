r"""A smooth bound of a convolution's norm for every input size: sup ||M(w)|| from the 2p-th powers on a coarse grid.

M(w) = sum_j K_j e^{i <w, b_j>} is the symbol of the polyphase kernel, and ||T|| <= factor * sup ||M(w)|| (``axes``). On an
axis let the exponents b lie in an interval of length 2 d, and the grid have G frequencies, h = 2 pi / G apart. With unit
vectors u, v that reach the supremum s at w*, |u^* M(w) v| >= s cos(d (w - w*)) where |w - w*| <= pi / (2 d): a real function of
exponential type d obeys f'^2 + d^2 f^2 <= d^2 max f^2 (Duffin and Schaeffer). Not only the grid point next to w* but each
one within reach counts, so for any offset of the grid

    sum over the grid of ||M(w)||^2p >= c s^2p,  c = min over t of sum_j cos^2p(d (t + j h))_+,

and axis by axis, with the supremum over the later axes taken at each frequency of the former, the product of
their c. Since tr (M M^*)^p >= ||M||^2p,

    ||T|| <= factor * (prod c)^(-1/(2p)) * (sum over the grid of tr (M M^*)^p)^(1/(2p)),

a Schatten norm of the kernel times a constant: smooth, and as tight as its rank and 2 d sqrt(pi p)
frequencies an axis allow, (rank * frequencies)^(1/(2p)) at worst. A maximum over the grid needs 1 / cos(pi d / G) instead of c, and is
not smooth. The grid is shifted by h / 2, so that no frequency but those of an axis with d = 0 is its own opposite; M(-w) is the
conjugate of M(w), and half of the grid counts twice.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from ..ops.eager import may_look_at
from .axes import Axis, circle_of

WASTE = 0.04  # of an axis against the limit of fine grids, in the bound
SAMPLES = 2**13  # offsets of the grid that are looked at; between them the slope is bounded
ROUNDING = 2.0**-40  # relative, more than all roundings in c and the factor


@dataclass(frozen=True)
class FrequencyGrid:
    """Where the symbol of a convolution's kernel is looked at; ||T|| <= factor * S for each group.

    power: p, which the factor is for.  turns: frequencies of half of the grid, in turns; each stands for ``copies``.
    blocks: b_j of each tap, in the order of the kernel's entries.  phases: its place among the polyphase columns.
    taps: the largest number of taps of a phase.
    """

    power: int
    factor: float
    turns: tuple[tuple[float, ...], ...]
    copies: float
    blocks: tuple[tuple[int, ...], ...]
    phases: tuple[int, ...]

    @property
    def points(self) -> int:
        """Frequencies of the whole grid."""
        return int(self.copies) * len(self.turns)

    @property
    def taps(self) -> int:
        """The largest number of taps that share a phase."""
        return max(self.phases.count(phase) for phase in set(self.phases))

    def symbol(self, kernel: Tensor) -> tuple[Tensor, Tensor]:
        """Real and imaginary part of M at the frequencies of half of the grid.

        Shape:
            kernel: (groups, rows, columns, taps) -> (groups, frequencies, rows, phases * columns), twice.
        """
        groups, rows, columns, taps = kernel.shape
        number, frequencies = max(self.phases) + 1, len(self.turns)
        table = torch.from_numpy(self._kept_table) if may_look_at(kernel) else self._table
        table = table.to(kernel.device, kernel.dtype).expand(groups, -1, -1)
        values = table @ kernel.reshape(groups, rows * columns, taps).mT
        parts = values.reshape(groups, 2, frequencies, number, rows, columns)
        if number == 1:  # each matrix lies in one piece: of others torch makes products one by one
            return parts[:, :, :, 0].unbind(1)
        return parts.permute(0, 1, 2, 4, 3, 5).reshape(groups, 2, frequencies, rows, number * columns).unbind(1)

    @property
    def _table(self) -> Tensor:
        """(2 * frequencies * phases, taps): the cosine and the sine of <w, b_j>, at the phase of tap j, in float64."""
        wide = {"dtype": torch.float64, "device": "cpu"}
        angle = torch.tensor(self.turns, **wide) @ torch.tensor(self.blocks, **wide).T * (2 * math.pi)
        phases = range(max(self.phases) + 1)
        which = torch.tensor([[float(phase == q) for phase in self.phases] for q in phases], **wide)
        return (torch.stack([torch.cos(angle), torch.sin(angle)])[:, :, None] * which).reshape(-1, len(self.phases))

    @cached_property
    def _kept_table(self) -> np.ndarray:
        """The same, kept: an array, which no mode or transform of torch takes hold of."""
        angle = 2 * math.pi * (np.array(self.turns) @ np.array(self.blocks, dtype=float).T)
        which = np.arange(max(self.phases) + 1)[:, None] == np.array(self.phases)
        return (np.stack([np.cos(angle), np.sin(angle)])[:, :, None] * which).reshape(-1, len(self.phases))


def frequency_grid(
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    padding_mode: str,
    power: int,
) -> FrequencyGrid:
    """The grid for a convolution with this geometry, on images of every size; padding is (before, after) of each axis."""
    geometry = zip(kernel_size, stride, padding, dilation)
    axes = [Axis(None, k, s, before, after, d, padding_mode) for k, s, (before, after), d in geometry]
    circles = [circle_of(axis) for axis in axes]
    sizes = [_size(circle.degree, power) for circle in circles]
    count = math.prod(count_at_least(n, circle.degree, power) for n, circle in zip(sizes, circles))
    factor = math.sqrt(math.prod(circle.copies for circle in circles)) * count ** (-0.5 / power) * (1 + ROUNDING)
    turns = [[(2 * m + 1) / (2 * n) if n > 1 else 0.0 for m in range(n)] for n in sizes]
    first = next((a for a, n in enumerate(sizes) if n > 1), None)
    if first is not None:
        turns[first] = turns[first][: sizes[first] // 2]
    places = list(itertools.product(*([divmod(j * a.dilation, a.stride) for j in range(a.kernel)] for a in axes)))
    phases = [tuple(phase for _, phase in place) for place in places]
    number = {phase: i for i, phase in enumerate(dict.fromkeys(phases))}
    return FrequencyGrid(
        power,
        factor,
        tuple(itertools.product(*turns)),
        1.0 if first is None else 2.0,
        tuple(tuple(block for block, _ in place) for place in places),
        tuple(number[phase] for phase in phases),
    )


@lru_cache(maxsize=256)
def _size(degree: float, power: int) -> int:
    """The least even number of frequencies that wastes at most WASTE against the limit c / G -> binom(2p, p) / (2 d 4^p)."""
    if degree == 0:
        return 1
    log_limit = math.lgamma(2 * power + 1) - 2 * math.lgamma(power + 1) - power * math.log(4) - math.log(2 * degree)
    size = 2 * math.floor(degree) + 2
    while math.log(max(count_at_least(size, degree, power), 1e-300) / size) < log_limit + 2 * power * math.log1p(-WASTE):
        size += 2
    return size


@lru_cache(maxsize=1024)
def count_at_least(size: int, degree: float, power: int) -> float:
    """At most c, the least sum of cos^2p(d (t + j h))_+ over the points of a grid, whatever its offset t.

    The sum is even in t with period h. cos^2p(d x) has a slope of at most d sqrt(2 p), and G / (2 d) + 1 points or
    fewer are within reach.
    """
    if degree == 0:
        return 1.0
    step = 2 * math.pi / size
    spacing = step / 2 / (SAMPLES - 1)
    offsets = np.linspace(0, step / 2, SAMPLES)
    reach = math.ceil(size / (4 * degree)) + 1
    angles = degree * (offsets[:, None] + step * np.arange(-reach, reach + 1)[None])
    inside = np.abs(angles) < math.pi / 2
    sums = np.where(inside, np.cos(np.where(inside, angles, 0.0)) ** (2 * power), 0.0).sum(1)
    slope = (size / (2 * degree) + 1) * degree * math.sqrt(2 * power)
    return max(float(sums.min()) * (1 - ROUNDING) - slope * spacing / 2, 0.0)
