r"""What a convolution reads at each place, without a copy of every patch.

Along the first axis, output t reads row s t + d k - p of the padded image for tap k: for one k these rows are an
arithmetic sequence, so patches along the other axes alone, with rows sorted by their remainder modulo s, hold all of
it as views. And where two samples' patches meet, <a_t, a_u> is a sum over taps of inner products of pixels,

    <a_t, a_u> = sum_k <x(s t + d k - p), y(s u + d k - p)>,

so that each pair of pixels is multiplied once, not once for each tap; pixels meet only within one remainder.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

ADDITION = 40  # multiply-adds in a large product that take as long as one addition of two tables


@dataclass(frozen=True)
class Windows:
    """Images x (n, C, *sizes), which a convolution reads at ``places`` along each axis."""

    x: Tensor
    groups: int
    taps: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    places: tuple[int, ...]

    def parts(self, samples: slice) -> list[Tensor]:
        """For each tap of the first axis what is read at all places, (m, groups, T, other taps * C / groups)."""
        s, d = self.stride[0], self.dilation[0]
        x = F.pad(self.x[samples], [side for p in reversed(self.padding) for side in (p, p)])
        sorted_rows = {r: self._rows(x[:, :, r::s]) for r in dict.fromkeys(d * k % s for k in range(self.taps[0]))}
        parts, across = [], math.prod(self.places[1:])
        for k in range(self.taps[0]):
            start = d * k // s * across
            parts.append(sorted_rows[d * k % s][:, :, start : start + self.places[0] * across])
        return parts

    def _rows(self, x: Tensor) -> Tensor:
        """(m, groups, rows * places along the other axes, their taps * C / groups)."""
        m, channels = x.shape[:2]
        x = x.reshape(m, self.groups, -1, *x.shape[2:]).movedim(2, -1).contiguous()
        axes = list(zip(self.taps, self.stride, self.dilation, self.places))[1:]
        steps = x.stride()[3:-1]
        view = x.as_strided(
            (*x.shape[:3], *(n for *_, n in axes), *(k for k, *_ in axes), x.shape[-1]),
            (
                *x.stride()[:3],
                *(step * s for step, (_, s, _, _) in zip(steps, axes)),
                *(step * d for step, (_, _, d, _) in zip(steps, axes)),
                1,
            ),
        )
        return view.reshape(m, self.groups, -1, math.prod(self.taps[1:]) * channels // self.groups)

    def _classes(self) -> list[list[tuple[int, list[int]]]]:
        """Of each axis, the remainders that taps read, each with its taps' shifts: pixel r + s (t + shift)."""
        axes = []
        for k, s, p, d in zip(self.taps, self.stride, self.padding, self.dilation):
            found: dict[int, list[int]] = {}
            for tap in range(k):
                found.setdefault((d * tap - p) % s, []).append((d * tap - p) // s)
            axes.append(list(found.items()))
        return axes

    @property
    def width_meets(self) -> float:
        """The width in which a product of patches would cost as much as ``meets``."""
        total = 0.0
        for chosen in itertools.product(*self._classes()):
            pixels = [len(range(r, n, s)) for (r, _), n, s in zip(chosen, self.x.shape[2:], self.stride)]
            share = math.prod(pixels) / math.prod(self.places)
            total += share**2 * self.x.shape[1] + max(share, 1.0) ** 2 * ADDITION * sum(len(q) for _, q in chosen)
        return total

    def meets(self, left: slice, right: slice) -> Tensor:
        """<a_it, a_ju>: (T, I, T, J)."""
        i, j = left.stop - left.start, right.stop - right.start
        total = self.x.new_zeros(*self.places, i, *self.places, j)
        for chosen in itertools.product(*self._classes()):
            remainders = tuple(slice(r, None, s) for (r, _), s in zip(chosen, self.stride))
            x, y = (self.x[part][(..., *remainders)].movedim((0, 1), (-2, -1)) for part in (left, right))
            if x.numel() == 0:
                continue
            table = x.reshape(-1, x.shape[-1]) @ y.reshape(-1, y.shape[-1]).T
            table = table.reshape(*x.shape[:-1], *y.shape[:-1])
            for axis, (_, shifts) in enumerate(chosen):
                last = axis == len(chosen) - 1
                table = self._summed(table, axis, shifts, total if last else None)
        return total.reshape(math.prod(self.places), i, -1, j)

    def _summed(self, table: Tensor, axis: int, shifts: list[int], total: Tensor | None) -> Tensor:
        """The sum over shifts of a table of pixels' products, along one axis of both its sides; added to ``total``."""
        places, other = self.places[axis], axis + len(self.places) + 1
        if total is None:
            shape = list(table.shape)
            shape[axis] = shape[other] = places
            total = table.new_zeros(shape)
        for q in shifts:
            low, high = max(0, -q), min(places, table.shape[axis] - q)
            if low < high:
                read = table.narrow(axis, low + q, high - low).narrow(other, low + q, high - low)
                total.narrow(axis, low, high - low).narrow(other, low, high - low).add_(read)
        return total
