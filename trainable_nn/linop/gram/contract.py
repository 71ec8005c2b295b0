"""Three ways to the Gram matrix of one weight's rows; each is exact, and the cheapest is taken.

* explicit: the rows W_ik = sum_t b_ikt a_it^T themselves, (n K) of them, and their products;
* structured: <W_ik, W_jl> = sum_ts <a_it, a_js> <b_ikt, b_jls>, the Gram matrix of the inputs times that of the
  output gradients, entry by entry;
* mixed: sum_s < sum_t <a_it, a_js> b_ikt, b_jls >, which forms the sum over t for each output once.

Products run in the network's dtype, and are added up in float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .cost import Rates, rates
from .features import Factors
from .inner import COLUMNS, inner_products, parts_of_square
from .rows import Block

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
    entries = size.pairs * t * t * (1 + min(1.0, _tile(way, size, SQUARES) / size.samples))  # tiles on the diagonal are computed whole
    meet = entries * size.width_meets * g * rate.gemm
    if way == "structured":
        return meet + entries * k * k * (g * o * rate.gemm + PASSES * rate.move)
    small = size.pairs * k * k * t * o * g * rate.small
    return meet + size.pairs * k * t * t * o * g * rate.row(t) + small + entries * TRANSPOSED * rate.move


def _tile(way: str, size: Size, room: float) -> int:
    """How many samples on a side are taken together, of which all tables have so many numbers."""
    k, t = size.outputs if way == "structured" else 1, size.positions
    return max(1, int((min(room, SQUARES) / 4) ** 0.5 / (k * t)))


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
SQUARES = 3 * 2**22  # numbers in all tables of positions by positions at once, for the same reason
PASSES = 8  # numbers that are moved for each of the two tables' products, with what their buffers cost
TRANSPOSED = 15  # numbers that are moved in the time that one takes in a table whose axes change places
LEAST_ROW = 256  # of the O K in one product, so that it is a large one


def _products(a: Tensor, b: Tensor, left: slice, right: slice, add, same: bool) -> None:
    m, k, _ = a.shape
    size = -(-m // min(parts_of_square(m * k), m)) if same else m
    for i in range(0, m, size):
        for j in range(i if same else 0, b.shape[0], size if same else b.shape[0]):
            x = a[i : i + size].flatten(0, 1)
            y = (b[j : j + size] if same else b).flatten(0, 1)
            rows = slice(left.start + i, left.start + i + len(x) // k)
            columns = slice(right.start + j, right.start + j + len(y) // k)
            add(rows, columns, inner_products(x, y).reshape(len(x) // k, k, len(y) // k, k))


def _explicit(factors: Factors, block: Block, add, trace: bool, workspace: int) -> None:
    """Over parts of O, so that all samples' rows of one part are there at once."""
    item = factors.b(slice(0, 1), slice(0, 1)).element_size()
    per_column = block.samples * factors.outputs * factors.groups * factors.width_a * item
    wanted = max(ROWS // per_column, LEAST_ROW // factors.outputs)
    width = max(1, min(factors.width_b, wanted, workspace // (2 * per_column)))
    if factors.outputs == 1:  # then all outputs' columns in one product's worth, which stays in the cache
        width = min(width, max(1, 3 * COLUMNS // (factors.groups * factors.width_a)))
    for start in range(0, factors.width_b, width):
        columns = slice(start, min(start + width, factors.width_b))

        def rows_of(samples: slice, columns=columns) -> list[Tensor]:
            return [part.flatten(2) for part in factors.rows_in_parts(samples, columns)]

        size = factors.outputs * factors.groups * factors.width_a * (columns.stop - columns.start) * item
        gram_of_rows(rows_of, block, add, trace, size, 2 * workspace)


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


