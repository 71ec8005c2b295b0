"""Which part of the Gram matrix is computed at once, and where its sums are kept."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """Samples ``left`` against ``right``, of those that are in one sweep: equal, or apart."""

    left: slice
    right: slice

    @property
    def is_symmetric(self) -> bool:
        return self.left == self.right

    @property
    def samples(self) -> int:
        """The number of samples whose rows are needed."""
        return max(self.left.stop, self.right.stop) - min(self.left.start, self.right.start)

    @property
    def pairs(self) -> float:
        m, n = self.left.stop - self.left.start, self.right.stop - self.right.start
        return m * (m + 1) / 2 if self.is_symmetric else m * n

    def left_tiles(self, size: int) -> Iterator[slice]:
        return tiles(self.left.start, self.left.stop, size)

    def right_tiles(self, size: int, left: slice) -> Iterator[slice]:
        """Tiles beside a tile of the left; of a symmetric block only those from the diagonal on."""
        return tiles(left.start if self.is_symmetric else self.right.start, self.right.stop, size)


def tiles(start: int, stop: int, size: int) -> Iterator[slice]:
    for i in range(start, stop, size):
        yield slice(i, min(i + size, stop))


class Sums:
    """Float64 sums of one block for each layer, (left, K, right, K), of which the upper half is filled if symmetric."""

    def __init__(self, block: Block, outputs: int, by_layer: bool, device) -> None:
        self.block, self.outputs, self.by_layer, self.device = block, outputs, by_layer, device
        self.layers: dict[str, Tensor] = {}

    def adder(self, layer: str):
        total = self._of(layer if self.by_layer else "")
        top, side = self.block.left.start, self.block.right.start

        def add(left: slice, right: slice, products: Tensor) -> None:
            total[left.start - top : left.stop - top, :, right.start - side : right.stop - side] += products

        return add

    def result(self, layer: str) -> Tensor:
        """(left * K, right * K), both halves."""
        total = self._of(layer)
        matrix = total.reshape(total.shape[0] * total.shape[1], -1)
        return matrix.triu() + matrix.triu(1).T if self.block.is_symmetric else matrix

    def _of(self, layer: str) -> Tensor:
        if layer not in self.layers:
            m, n = (s.stop - s.start for s in (self.block.left, self.block.right))
            shape = (m, self.outputs, n, self.outputs)
            self.layers[layer] = torch.zeros(shape, dtype=torch.float64, device=self.device)
        return self.layers[layer]
