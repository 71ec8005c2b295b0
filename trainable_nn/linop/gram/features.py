"""The rows of a Jacobian in one weight, kept in two factors, or as they are.

A weight that meets each sample at T positions has rows W_ik = sum_t b_ikt a_it^T: a of width D from the forward pass
and free of the output k, b of width O from the backward pass.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PIECE = 2**24  # bytes of a at once: larger buffers are mapped anew by the system at every use


@dataclass
class Factors:
    """a(samples) -> (samples, groups, D, T) and b(samples, columns) -> (samples, groups, K, columns of O, T).

    A row of one sample and output is b a^T, (groups, O, D). ``to_weight`` brings (m, groups, O, D) to (m, *weight).
    ``parts`` cuts a along D, in an order of its own, into tensors (m, groups, T, D'), which may share their memory: an
    inner product doesn't ask for an order. ``meets`` gives a^T a without a, (I, T, J, T), and takes as many
    multiply-adds as a width of ``width_meets`` in a.
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
    _held: tuple[slice, list[Tensor]] | None = None

    def rows(self, samples: slice, columns: slice = slice(None)) -> Tensor:
        """(samples, K, groups, O, D), of the columns' part of O."""
        return self._rows(samples, columns, lambda which: [self.a(which).mT])[0]

    def rows_in_parts(self, samples: slice, columns: slice) -> list[Tensor]:
        """The same along D in the parts and the order of ``parts``, each (samples, K, groups, O, D')."""
        return self._rows(samples, columns, self._parts)

    def _rows(self, samples: slice, columns: slice, parts: Callable[[slice], list[Tensor]]) -> list[Tensor]:
        """A few samples at a time, for the cache and the heap."""
        columns = slice(*columns.indices(self.width_b))
        count, width = samples.stop - samples.start, columns.stop - columns.start
        step = max(1, min(count, PIECE // (self._bytes_of_a() + 1)))
        found: list[Tensor] = []
        for start in range(0, count, step):
            which = slice(samples.start + start, min(samples.start + start + step, samples.stop))
            left = self.b(which, columns).reshape(-1, self.outputs * width, self.positions)
            for index, right in enumerate(parts(which)):
                if len(found) == index:
                    found.append(right.new_empty(count, self.outputs, self.groups, width, right.shape[3]))
                self._rows_into(found[index][start : start + step], left, right.flatten(0, 1))
        return found

    def _rows_into(self, found: Tensor, left: Tensor, right: Tensor) -> None:
        m, outputs, groups, width, depth = found.shape
        if groups == 1:
            torch.bmm(left, right, out=found.view(m, outputs * width, depth))
        else:
            found.copy_(torch.bmm(left, right).reshape(m, groups, outputs, width, depth).transpose(1, 2))

    def _parts(self, samples: slice) -> list[Tensor]:
        """Those of the same samples are kept for the next columns."""
        if self._held is None or self._held[0] != samples:
            self._held = None
            self._held = samples, [self.a(samples).mT] if self.parts is None else self.parts(samples)
        return self._held[1]

    def _bytes_of_a(self) -> int:
        item = self.b(slice(0, 1), slice(0, 1)).element_size()
        return self.positions * self.groups * self.width_a * item // (1 if self.parts is None else 3)

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
