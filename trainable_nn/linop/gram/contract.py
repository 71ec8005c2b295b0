"""Three ways to the Gram matrix of one weight's rows; each is exact, and the cheapest is taken.

* explicit: the rows W_ik = sum_t b_ikt a_it^T themselves, (n K) of them, and their products;
* structured: <W_ik, W_jl> = sum_ts <a_it, a_js> <b_ikt, b_jls>, the Gram matrix of the inputs times that of the
  output gradients, entry by entry;
* mixed: sum_s < sum_t <a_it, a_js> b_ikt, b_jls >, which forms the sum over t for each output once.

Products run in the network's dtype, and are added up in float64.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .cost import Rates, rates
from .features import Factors
from .inner import inner_products, own_products
from .rows import Block, tiles

WAYS = ("explicit", "structured", "mixed")


@dataclass(frozen=True)
class Size:
    """The numbers that decide: samples on both sides, outputs, positions, widths, groups."""

    pairs: float
    samples: int
    outputs: int
    positions: int
    width_a: int
    width_b: int
    groups: int
    width_meets: float


def seconds(way: str, size: Size, rate: Rates) -> float:
    """What a way will take, by the operations and the memory that it moves, at rates measured on this machine."""
    k, t, d, o, g = size.outputs, size.positions, size.width_a, size.width_b, size.groups
    if way == "explicit":
        rows = size.samples * k * t * d * o * g * rate.row(t)
        moved = size.samples * (t * d + k * t * o + 2 * k * o * d) * g
        return rows + size.pairs * k * k * o * d * g * rate.inner(size.samples * k) + moved * rate.move
    # tiles on the diagonal are computed whole
    entries = size.pairs * t * t * (1 + min(1.0, _tile(way, size, math.inf) / size.samples))
    meet = entries * size.width_meets * g * rate.gemm
    if way == "structured":
        return meet + entries * k * k * (g * o * rate.gemm + PASSES * rate.move)
    small = size.pairs * k * k * t * o * g * rate.small
    return meet + size.pairs * k * t * t * o * g * rate.row(t) + small + entries * TRANSPOSED * rate.move


def _tile(way: str, size: Size, room: float) -> int:
    """How many samples on a side are taken together, of which all tables have so many numbers."""
    k, t = size.outputs if way == "structured" else 1, size.positions
    return max(1, int(min(SIDE, (room / 4) ** 0.5) / (k * t)))


def _size(factors: Factors, block: Block, trace: bool) -> Size:
    outputs, width = (1, factors.width_b * factors.outputs) if trace else (factors.outputs, factors.width_b)
    meets = factors.width_a if factors.width_meets is None else factors.width_meets
    return Size(block.pairs, block.samples, outputs, factors.positions, factors.width_a, width, factors.groups, meets)


def cheapest(factors: Factors, block: Block, trace: bool) -> str:
    size = _size(factors, block, trace)
    ways = WAYS if factors.groups == 1 else WAYS[:1]
    like = factors.b(slice(0, 1), slice(0, 1))
    return min(ways, key=lambda way: seconds(way, size, rates(like.dtype, like.device)))


def contract(factors: Factors, block: Block, add, trace: bool, workspace: int, way: str | None = None) -> None:
    """``add(I, J, products)`` for tiles that cover the block; products (I, K, J, K), or (I, 1, J, 1) for the trace."""
    way = way or cheapest(factors, block, trace)
    if factors.groups > 1:
        way = "explicit"
    {"explicit": _explicit, "structured": _structured, "mixed": _mixed}[way](factors, block, add, trace, workspace)


def gram_of_rows(rows_of, block: Block, add, trace: bool, bytes_per_sample: float, workspace: int) -> None:
    """The products of explicit rows, ``rows_of(samples)`` a list of (samples, K, P) tensors."""
    tile = max(1, int(workspace / max(3.0 * bytes_per_sample, 1.0)))
    for left in block.left_tiles(tile):
        first = [_merged(r, trace) for r in rows_of(left)]
        for right in block.right_tiles(tile, left):
            second = first if right == left else [_merged(r, trace) for r in rows_of(right)]
            for a, b in zip(first, second):
                _products(a, b, left, right, add, block.is_symmetric and right == left)
            del second


def _merged(rows: Tensor, trace: bool) -> Tensor:
    """(samples, K, P), or (samples, 1, K P): the trace's inner product runs over the outputs too."""
    return rows.flatten(1).unsqueeze(1) if trace else rows


CACHE = 2**20  # bytes of the mixed way's middle result, which is written and read at once
ROWS = 3 * 2**23  # bytes of explicit rows at once: larger buffers are mapped anew by the system at every use
PART = 2**22  # the same where they are cut, so that their products find them in the cache
SIDE = 512  # of a table of positions by positions: it stays in the cache, and of the lower half little is computed
PASSES = 8  # numbers that are moved for each of the two tables' products, with what their buffers cost
TRANSPOSED = 15  # numbers that are moved in the time that one takes in a table whose axes change places
LEAST = 128  # of the O K in one product of explicit rows, so that it is a large one
FEWEST = 2**10  # of a row's numbers in one product, if it has so many: ``kernel_error`` counts the float64 sums of products
LEAST_WHOLE = 32  # of O in one call of a convolution that makes rows, for the same reason


def _products(a: Tensor, b: Tensor, left: slice, right: slice, add, same: bool) -> None:
    (m, k, _), n = a.shape, len(b)
    x, y = a.flatten(0, 1), b.flatten(0, 1)
    add(left, right, (own_products(x) if same else inner_products(x, y)).reshape(m, k, n, k))


def _explicit(factors: Factors, block: Block, add, trace: bool, workspace: int) -> None:
    """Over parts of O and D, so that all samples' rows of one part are there at once."""
    whole, width, depth = _cut(factors, block.samples, workspace)
    size = width * depth * _bytes_per_number(factors)
    for columns in tiles(0, factors.width_b, width):
        if whole:
            gram_of_rows(lambda samples, o=columns: [factors.whole(samples, o)], block, add, trace, size, 2 * workspace)
            continue
        for part in range(factors.count_parts):
            for stretch in tiles(0, factors.width_a // factors.count_parts, depth):

                def rows_of(samples: slice, which=(columns, part, stretch)) -> list[Tensor]:
                    return [factors.rows_in_part(samples, *which).flatten(2)]

                gram_of_rows(rows_of, block, add, trace, size, 2 * workspace)


def _cut(factors: Factors, samples: int, workspace: int) -> tuple[bool, int, int]:
    """Whether rows are made whole in D, and how much of O and D at once."""
    each, o, d = samples * _bytes_per_number(factors), factors.width_b, factors.width_a
    width = min(o, min(ROWS, workspace // 2) // (each * d))
    if factors.whole is not None and width >= min(o, LEAST_WHOLE):
        return True, width, d
    fewest, d = -(-FEWEST // factors.groups), d // factors.count_parts
    most = max(fewest, min(PART, workspace // 2) // each)
    depth = _even(d, max(1, most // min(o, max(1, LEAST // factors.outputs))))
    return False, min(o, max(1, most // depth)), depth


def _bytes_per_number(factors: Factors) -> int:
    """Of one number in each row of a sample."""
    return factors.outputs * factors.groups * factors.b(slice(0, 1), slice(0, 1)).element_size()


def _even(whole: int, most: int) -> int:
    """The length of the fewest stretches that are about as long and no longer."""
    return -(-whole // -(-whole // most))


def _meet(factors: Factors, left: slice, right: slice) -> Tensor:
    """<a_it, a_js>: (T, I, T, J)."""
    if factors.meets is not None:
        return factors.meets(left, right)
    x, y = (factors.a(s)[:, 0].permute(2, 0, 1).reshape(-1, factors.width_a) for s in (left, right))
    i, j, t = left.stop - left.start, right.stop - right.start, factors.positions
    return (x @ y.T).reshape(t, i, t, j)


def _by_position(factors: Factors, samples: slice, trace: bool, first: bool = False) -> Tensor:
    """b as (samples, T, K, O), or with T ``first`` of all; for the trace (samples, T, 1, K O)."""
    b = factors.b(samples)[:, 0].permute(*((3, 0) if first else (0, 3)), 1, 2).contiguous()
    return b.flatten(2).unsqueeze(2) if trace else b


def _structured(factors: Factors, block: Block, add, trace: bool, workspace: int) -> None:
    """Positions go before samples, so that sums over positions run along samples."""
    item = factors.b(slice(0, 1), slice(0, 1)).element_size()
    size = _size(factors, block, trace)
    t, k, tile = size.positions, size.outputs, _tile("structured", size, workspace // item)
    for left in block.left_tiles(tile):
        x = _by_position(factors, left, trace, first=True)
        for right in block.right_tiles(tile, left):
            y = x if left == right else _by_position(factors, right, trace, first=True)
            i, j = x.shape[1], y.shape[1]
            both = (x.flatten(0, 2) @ y.flatten(0, 2).T).reshape(t, i, k, t, j, k)
            both *= _meet(factors, left, right).reshape(t, i, 1, t, j, 1)
            add(left, right, both.sum(3).sum(0, dtype=torch.float64))


def _mixed(factors: Factors, block: Block, add, trace: bool, workspace: int) -> None:
    item = factors.b(slice(0, 1), slice(0, 1)).element_size()
    size = _size(factors, block, trace)
    each = size.positions * (size.outputs * size.width_b + size.width_a)
    tile = max(1, min(_tile("mixed", size, workspace // item), workspace // (4 * item * each)))
    inner = max(1, CACHE // (item * size.positions * size.outputs * size.width_b))
    for left in block.left_tiles(tile):
        x = _by_position(factors, left, trace)
        for right in block.right_tiles(tile, left):
            y = x if left == right else _by_position(factors, right, trace)
            meets = _meet(factors, left, right).permute(1, 3, 0, 2).contiguous()  # (I, J, T, T)
            for i in range(len(x)):
                first = i if block.is_symmetric and left == right else 0
                found = _mixed_row(meets[i, first:], x[i], y[first:], inner)
                samples = slice(right.start + first, right.stop)
                add(slice(left.start + i, left.start + i + 1), samples, found.permute(1, 0, 2).unsqueeze(0))


def _mixed_row(meets: Tensor, one: Tensor, others: Tensor, inner: int) -> Tensor:
    """Products of one sample's rows (T, K, O) with others' (J, T, L, O), by meets (J, T of one, T): (J, K, L)."""
    t, k, width = one.shape
    found = []
    for j in range(0, len(others), inner):
        part = meets[j : j + inner].mT
        z = torch.bmm(part, one.flatten(1).expand(len(part), t, -1))  # (J, T, K O)
        products = torch.bmm(z.reshape(-1, k, width), others[j : j + inner].flatten(0, 1).mT)  # (J T, K, L)
        found.append(products.reshape(-1, t, k, k).sum(1, dtype=torch.float64))
    return torch.cat(found)


