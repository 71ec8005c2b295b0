"""Cuts of a convolution's image into slabs across one axis, such that only neighbouring slabs are joined."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .geometry import Geometry

LEAST_BLOCK = 192  # unknowns of a slab over all groups; below it the calls cost more than the arithmetic
Slabs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Cut:
    """Slabs across an axis as ranges (start, stop) of pixel numbers, of outputs and of inputs; () for a side left whole.

    unknowns: of the thickest slab, for one group.
    """

    axis: int
    outputs: Slabs
    inputs: Slabs
    unknowns: int
    groups: int

    @property
    def bytes(self) -> int:
        """Of one dense float64 block for each slab."""
        return 8 * self.groups * len(self.outputs) * self.unknowns**2

    @property
    def flops(self) -> float:
        return float(self.groups * len(self.outputs)) * self.unknowns**3


def square_cut(geometry: Geometry, axis: int) -> Cut | None:
    """Slabs of as many outputs as inputs that read their neighbours only; None where no thickness gives two or more.

    The whole image as one slab is a cut too, if nothing thinner is.
    """
    rows, columns = geometry.narrow[1 + axis], geometry.wide[1 + axis]
    narrow, wide = (_pixels_of_a_row(shape, axis) for shape in (geometry.narrow, geometry.wide))
    channels = geometry.narrow[0] // geometry.groups
    common = math.gcd(rows, columns)
    thick, deep = rows // common, columns // common
    if thick * narrow * geometry.narrow[0] != deep * wide * geometry.wide[0]:
        return None
    row, column = _joined(geometry, axis)
    for times in range(_least(thick * narrow * geometry.narrow[0], common), common + 1):
        if int((row // (thick * times) - column // (deep * times)).abs().max()) <= 1:
            slabs = (_slabs(rows, thick * times, narrow), _slabs(columns, deep * times, wide))
            return Cut(axis, *slabs, thick * times * narrow * channels, geometry.groups)
    return None


def gram_cut(geometry: Geometry, axis: int, tall: bool) -> Cut:
    """Slabs of the smaller side (inputs where the matrix is tall): only neighbours share a pixel of the other side."""
    shape = geometry.wide if tall else geometry.narrow
    rows, pixels = shape[1 + axis], _pixels_of_a_row(shape, axis)
    row, column = _joined(geometry, axis)
    own, other = (column, row) if tall else (row, column)
    sharing = [own[other == shared] for shared in other.unique()]
    reach = [(int(r.min()), int(r.max())) for r in sharing]
    times = _least(pixels * shape[0], rows)
    while any(last // times - first // times > 1 for first, last in reach):
        times += 1
    return Cut(axis, _slabs(rows, times, pixels), (), times * pixels * shape[0] // geometry.groups, geometry.groups)


def _pixels_of_a_row(shape: tuple[int, ...], axis: int) -> int:
    return math.prod(shape[1:]) // shape[1 + axis]


def _least(unknowns: int, most: int) -> int:
    return min(max(1, -(-LEAST_BLOCK // unknowns)), most)


def _joined(geometry: Geometry, axis: int) -> tuple[Tensor, Tensor]:
    """The pairs (output row, input row) of an axis that some tap joins; there is one."""
    table = geometry.reached(axis)
    row, tap = (table >= 0).nonzero(as_tuple=True)
    return row, table[row, tap]


def _slabs(rows: int, thickness: int, pixels: int) -> Slabs:
    return tuple((start * pixels, min(start + thickness, rows) * pixels) for start in range(0, rows, thickness))
