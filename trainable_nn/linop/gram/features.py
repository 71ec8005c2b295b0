"""The rows of a Jacobian in one weight, kept in two factors, or as they are.

A weight that meets each sample at T positions has rows W_ik = sum_t b_ikt a_it^T: a of width D from the forward pass
and free of the output k, b of width O from the backward pass.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PIECE = 2**23  # bytes of factors at once: larger buffers are mapped anew by the system at every use


@dataclass
class Factors:
    """a(samples) -> (samples, groups, D, T) and b(samples) -> (samples, groups, K, O, T).

    A row of one sample and output is b a^T, (groups, O, D). ``to_weight`` brings (m, groups, O, D) to (m, *weight).
    """

    a: Callable[[slice], Tensor]
    b: Callable[[slice], Tensor]
    groups: int
    width_a: int
    width_b: int
    positions: int
    outputs: int
    to_weight: Callable[[Tensor], Tensor]
    meets: Callable[[slice, slice], Tensor] | None = None  # a a^T without a, (I, T, J, T)

    def rows(self, samples: slice, columns: slice = slice(None)) -> Tensor:
        """(samples, K, groups, O, D), of the columns' part of O; a few samples at a time, for the cache and the heap."""
        columns = slice(*columns.indices(self.width_b))
        count, width = samples.stop - samples.start, columns.stop - columns.start
        first = self.b(slice(samples.start, samples.start + 1))
        found = first.new_empty(count, self.outputs, self.groups, width, self.width_a)
        each = self.positions * self.groups * (self.width_a + self.outputs * width) * first.element_size()
        step = max(1, PIECE // each)
        for start in range(0, count, step):
            part = slice(samples.start + start, min(samples.start + start + step, samples.stop))
            self._rows_into(found[start : start + step], part, columns)
        return found

    def _rows_into(self, found: Tensor, samples: slice, columns: slice) -> None:
        m, outputs, groups, width, _ = found.shape
        left = self.b(samples)[:, :, :, columns].reshape(m * groups, outputs * width, self.positions)
        right = self.a(samples).reshape(m * groups, self.width_a, self.positions).mT
        if groups == 1:
            torch.bmm(left, right, out=found.view(m, outputs * width, self.width_a))
        else:
            found.copy_(torch.bmm(left, right).reshape(m, groups, outputs, width, self.width_a).transpose(1, 2))

    def weight_rows(self, samples: slice) -> Tensor:
        """(samples * K, *weight)."""
        return self.to_weight(self.rows(samples).flatten(0, 1))


@dataclass
class Rows:
    """The rows themselves: (samples, K, *weight)."""

    values: Tensor

    def weight_rows(self, samples: slice) -> Tensor:
        return self.values[samples].flatten(0, 1)


Features = Factors | Rows
