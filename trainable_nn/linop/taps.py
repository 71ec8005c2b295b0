r"""A convolution as a matrix of pixels whose entries are matrices of channels: A = sum_t E_t x K_t.

Tap t is the channel matrix K_t and the pairs (output pixel, input pixel) that it joins. Pixels are numbered with one axis
of the image first, so that slabs of rows across this axis are ranges of numbers; channels come last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .geometry import Geometry


@dataclass(frozen=True)
class Tap:
    """matrix: (groups, outputs, inputs) of channels.  outputs, inputs: numbers of pixels, pair by pair."""

    matrix: Tensor
    outputs: Tensor
    inputs: Tensor

    @property
    def transposed(self) -> Tap:
        return Tap(self.matrix.mT, self.inputs, self.outputs)


@dataclass(frozen=True)
class Taps:
    """pixels and channels (of one group) of outputs and of inputs; a vector is (groups, pixels, channels, columns)."""

    taps: tuple[Tap, ...]
    pixels: tuple[int, int]
    channels: tuple[int, int]

    @property
    def transposed(self) -> Taps:
        return Taps(tuple(tap.transposed for tap in self.taps), self.pixels[::-1], self.channels[::-1])

    @property
    def sides(self) -> tuple[int, int]:
        """Outputs and inputs of one group."""
        return self.pixels[0] * self.channels[0], self.pixels[1] * self.channels[1]

    def times(self, x: Tensor) -> Tensor:
        """A x."""
        y = x.new_zeros(x.shape[0], self.pixels[0], self.channels[0], x.shape[3])
        for tap in self.taps:
            y.index_add_(1, tap.outputs, tap.matrix.unsqueeze(1) @ x[:, tap.inputs])
        return y

    def dense(self) -> Tensor:
        """(groups, outputs, inputs)."""
        (p, q), (c, d) = self.pixels, self.channels
        matrix = self.taps[0].matrix.new_zeros(p, q, self.groups, c, d)
        for tap in self.taps:
            values = tap.matrix.expand(len(tap.outputs), *tap.matrix.shape)
            matrix.index_put_((tap.outputs, tap.inputs), values, accumulate=True)
        return matrix.permute(2, 0, 3, 1, 4).reshape(self.groups, p * c, q * d)

    @property
    def groups(self) -> int:
        return self.taps[0].matrix.shape[0]

    def block(self, outputs: tuple[int, int], inputs: tuple[int, int]) -> Taps:
        """The block of the pixels start <= number < stop on each side; taps without a pair in it are kept, empty."""
        kept = []
        for tap in self.taps:
            here = (tap.outputs >= outputs[0]) & (tap.outputs < outputs[1])
            here &= (tap.inputs >= inputs[0]) & (tap.inputs < inputs[1])
            kept.append(Tap(tap.matrix, tap.outputs[here] - outputs[0], tap.inputs[here] - inputs[0]))
        kept = [tap for tap in kept if len(tap.outputs)] or kept[:1]
        return Taps(tuple(kept), (outputs[1] - outputs[0], inputs[1] - inputs[0]), self.channels)

    def reach(self, outputs: tuple[int, int]) -> tuple[int, int]:
        """The least range of input pixels that these outputs read."""
        read = [tap.inputs[(tap.outputs >= outputs[0]) & (tap.outputs < outputs[1])] for tap in self.taps]
        read = torch.cat(read)
        return (int(read.min()), int(read.max()) + 1) if len(read) else (0, 1)


def taps_of(geometry: Geometry, kernel: Tensor, first: int) -> Taps:
    """The convolution ``Geometry.correlate``, from wide to narrow, with the axis ``first`` first in the pixels' numbers."""
    order = [first, *(a for a in range(geometry.axes) if a != first)]
    tables = [geometry.reached(axis) for axis in order]
    matrices = kernel.reshape(geometry.groups, -1, *kernel.shape[1:])
    matrices = matrices.permute(0, 1, 2, *(3 + a for a in order)).flatten(3)
    taps = []
    for number, place in enumerate(torch.cartesian_prod(*(torch.arange(t.shape[1], device="cpu") for t in tables)).reshape(-1, len(tables))):
        outputs = inputs = torch.zeros(1, dtype=torch.int64, device="cpu")
        for axis, table, tap in zip(order, tables, place.tolist()):
            (row,) = (table[:, tap] >= 0).nonzero(as_tuple=True)
            outputs = (outputs[:, None] * geometry.narrow[1 + axis] + row).flatten()
            inputs = (inputs[:, None] * geometry.wide[1 + axis] + table[row, tap]).flatten()
        if len(outputs):
            taps.append(Tap(matrices[..., number].contiguous(), outputs, inputs))
    pixels = (math.prod(geometry.narrow[1:]), math.prod(geometry.wide[1:]))
    return Taps(tuple(taps), pixels, (matrices.shape[1], matrices.shape[2]))


def to_pixels(vector: Tensor, shape: tuple[int, ...], groups: int, first: int) -> Tensor:
    """A flattened image (channels, sizes...) as (groups, pixels, channels, 1), numbered as in ``taps_of``."""
    image = vector.reshape(groups, -1, *shape[1:]).movedim(2 + first, 2)
    return image.flatten(2).mT.unsqueeze(-1).contiguous()


def from_pixels(x: Tensor, shape: tuple[int, ...], first: int) -> Tensor:
    """The inverse of ``to_pixels``."""
    sizes = [shape[1 + first], *(n for a, n in enumerate(shape[1:]) if a != first)]
    return x.squeeze(-1).mT.unflatten(2, sizes).movedim(2, 2 + first).flatten()
