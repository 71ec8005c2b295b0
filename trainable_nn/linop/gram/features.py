"""The rows of a Jacobian in one weight, kept in two factors, or as they are.

A weight that meets each sample at T positions has rows W_ik = sum_t b_ikt a_it^T: a of width D from the forward pass
and free of the output k, b of width O from the backward pass.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


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
    explicit: Callable[[slice, slice], Tensor] | None = None
    meets: Callable[[slice, slice], Tensor] | None = None  # a a^T without a, (I, T, J, T)

    def rows(self, samples: slice, columns: slice = slice(None)) -> Tensor:
        """(samples, K, groups, O, D), of the columns' part of O."""
        a, b = self.a(samples), self.b(samples)[:, :, :, columns]
        m, groups, outputs, width, positions = b.shape
        left = b.reshape(m * groups, outputs * width, positions)
        found = torch.bmm(left, a.reshape(m * groups, self.width_a, positions).mT)
        return found.reshape(m, groups, outputs, width, self.width_a).transpose(1, 2)

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
