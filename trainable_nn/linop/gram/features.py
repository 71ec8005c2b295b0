"""The rows of a Jacobian in one weight, kept in two factors, or as they are.

A weight that meets each sample at T positions has rows W_ik = sum_t b_ikt a_it^T: a of width D from the forward pass
and free of the output k, b of width O from the backward pass.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

PIECE = 2**24  # bytes of a at once: larger buffers are mapped anew by the system at every use


@dataclass
class Factors:
    """a(samples) -> (samples, groups, D, T) and b(samples, columns) -> (samples, groups, K, columns of O, T).

    A row of one sample and output is b a^T, (groups, O, D). ``to_weight`` brings (m, groups, O, D) to (m, *weight).
    ``parts`` cuts a along D, in an order of its own, into ``count_parts`` tensors (m, groups, T, D'), which may share
    their memory: an inner product doesn't ask for an order. ``whole(samples, columns)`` gives rows at once, (m, K, P)
    in any order. ``meets`` gives a^T a without a, (I, T, J, T), and takes as many multiply-adds as a width of
    ``width_meets`` in a.
    """

    a: Callable[[slice], Tensor]
    b: Callable[..., Tensor]
    groups: int
    width_a: int
    width_b: int
    positions: int
    outputs: int
    to_weight: Callable[[Tensor], Tensor]
    meets: Callable[[slice, slice], Tensor] | None = None
    width_meets: float | None = None
    parts: Callable[[slice], list[Tensor]] | None = None
    count_parts: int = 1
    whole: Callable[[slice, slice], Tensor] | None = None
    _held: dict[str, tuple[object, object]] = field(default_factory=dict)

    def rows(self, samples: slice) -> Tensor:
        """(samples, K, groups, O, D), a few samples at a time, for the cache and the heap."""
        count = samples.stop - samples.start
        item = self.b(slice(0, 1), slice(0, 1)).element_size()
        step = max(1, min(count, PIECE // (self.positions * self.groups * self.width_a * item + 1)))
        found = None
        for start in range(0, count, step):
            which = slice(samples.start + start, min(samples.start + start + step, samples.stop))
            left, right = self.b(which), self.a(which).mT
            if found is None:
                found = right.new_empty(count, self.outputs, self.groups, self.width_b, self.width_a)
            self._rows_into(found[start : start + step], left, right)
        return found

    def rows_in_part(self, samples: slice, columns: slice, part: int, depth: slice) -> Tensor:
        """The same of the columns' part of O, and along D a stretch of one of the ``parts``."""
        parts = self._kept("a", samples, lambda: [self.a(samples).mT] if self.parts is None else self.parts(samples))
        left, right = self._kept("b", (samples, columns), lambda: self.b(samples, columns)), parts[part][..., depth]
        found = right.new_empty(len(right), self.outputs, self.groups, left.shape[3], right.shape[3])
        self._rows_into(found, left, right)
        return found

    def _kept(self, name: str, of: object, make: Callable[[], object]):
        """What the last call made, if it was of the same."""
        if name not in self._held or self._held[name][0] != of:
            self._held.pop(name, None)
            self._held[name] = of, make()
        return self._held[name][1]

    def _rows_into(self, found: Tensor, left: Tensor, right: Tensor) -> None:
        m, outputs, groups, width, depth = found.shape
        left, right = left.reshape(-1, outputs * width, self.positions), right.flatten(0, 1)
        if groups == 1:
            torch.bmm(left, right, out=found.view(m, outputs * width, depth))
        else:
            found.copy_(torch.bmm(left, right).reshape(m, groups, outputs, width, depth).transpose(1, 2))

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
Gradients = list[Tensor]  # one for each output of the network
