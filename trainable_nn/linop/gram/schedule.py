"""Which samples go through the network together, and which part of the Gram matrix each such run computes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .rows import Block

BUDGET = 2**32  # bytes, where none is given
WORKSPACE = (2**24, 2**28)  # least and most bytes for the rows and products of one layer
SHARE = 16  # of the budget that the workspace is


@dataclass(frozen=True)
class Run:
    """Samples (slices of all of them) that are one batch, and blocks of the Gram matrix in that batch's own count."""

    samples: tuple[slice, ...]
    blocks: tuple[Block, ...]

    def whole(self, part: slice) -> slice:
        """A slice of the batch as one of all samples."""
        offset = 0
        for samples in self.samples:
            size = samples.stop - samples.start
            if offset <= part.start and part.stop <= offset + size:
                return slice(part.start - offset + samples.start, part.stop - offset + samples.start)
            offset += size
        raise IndexError(f"Run.whole: {part} lies across the runs' parts {self.samples}.")


def workspace_of(budget: int | None) -> int:
    least, most = WORKSPACE
    return min(max((BUDGET if budget is None else budget) // SHARE, least), most)


def batch_size(budget: int | None, per_sample: float, outputs: int, layers: int) -> int:
    """How many samples fit: their activations and gradients, and half as much again for sums of their pairs.

    Raises:
        ValueError: not even two do.
    """
    budget = BUDGET if budget is None else budget
    room = budget - 3 * workspace_of(budget)
    pairs = 16 * layers * outputs**2  # bytes for each pair of samples: pairs s^2 + per_sample s = room
    size = 1 + int(2.0 * room / (per_sample + math.sqrt(per_sample**2 + 4.0 * pairs * max(room, 0))))
    while size >= 2 and size * per_sample + 16 * layers * (size * outputs) ** 2 > room:
        size -= 1
    if size < 2:
        needed = 3 * WORKSPACE[0] + 2 * per_sample + 64 * layers * outputs**2
        raise ValueError(f"ntk: budget={budget} bytes does not hold two samples; at least {int(needed)} are needed.")
    return size


def runs(count: int, size: int, ranks: int = 1) -> list[list[Run]]:
    """For each of ``ranks`` processes its runs: one over all samples if they fit, else one for each pair of parts."""
    if count <= size:
        return _shared(count, ranks)
    half = size // 2
    parts = [slice(i, min(i + half, count)) for i in range(0, count, half)]
    pairs = []
    for i, a in enumerate(parts):
        for j in range(i + 1, len(parts)):
            b = parts[j]
            m, n = a.stop - a.start, b.stop - b.start
            blocks = [Block(slice(0, m), slice(m, m + n))]
            if j == i + 1:
                blocks.append(Block(slice(0, m), slice(0, m)))
            if j == i + 1 == len(parts) - 1:
                blocks.append(Block(slice(m, m + n), slice(m, m + n)))
            pairs.append(Run((a, b), tuple(blocks)))
    return [pairs[rank::ranks] for rank in range(ranks)]


def _shared(count: int, ranks: int) -> list[list[Run]]:
    """One run over all samples; of several processes each takes two strips of rows, a long and a short one."""
    whole = (slice(0, count),)
    if ranks == 1:
        return [[Run(whole, (Block(slice(0, count), slice(0, count)),))]]
    strips = [slice(count * i // (2 * ranks), count * (i + 1) // (2 * ranks)) for i in range(2 * ranks)]
    blocks = [Block(strip, slice(strip.start, count)) for strip in strips]
    each = [[b for b in (blocks[r], blocks[-1 - r]) if b.left.stop > b.left.start] for r in range(ranks)]
    return [[Run(whole, tuple(mine))] if mine else [] for mine in each]
