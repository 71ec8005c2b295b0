"""Inner products of rows with rows, by whatever multiplies this shape fastest here, added up in float64."""

from collections.abc import Callable

import torch
from torch import Tensor

COLUMNS = 2**13  # summed in the network's dtype before float64 takes over, and few enough to stay in the cache
FEW, SQUARE, WIDE = 24, 48, 512  # rows from which the shapes differ in what is fastest


def inner_products(x: Tensor, y: Tensor) -> Tensor:
    """x y^T in float64, of (m, p) and (n, p)."""
    return _added_up(len(x), len(y), x, lambda total, c: total.add_(_product(x[:, c], y[:, c])))


def own_products(x: Tensor) -> Tensor:
    """The upper half of x x^T in float64, of (m, p); what is below is anything."""
    size = -(-len(x) // strips(len(x)))

    def add(total: Tensor, c: slice) -> None:
        part = x[:, c]
        for i in range(0, len(x), size):
            total[: i + size, i : i + size] += _product(part[: i + size], part[i : i + size])

    return _added_up(len(x), len(x), x, add)


def strips(rows: int) -> int:
    """Into how many strips the columns of x x^T are cut, each computed down to the diagonal."""
    if rows < FEW:
        return max(1, rows // 8)
    return 1 if rows < SQUARE else 4


def _added_up(m: int, n: int, x: Tensor, add: Callable[[Tensor, slice], object]) -> Tensor:
    total = torch.zeros(m, n, dtype=torch.float64, device=x.device)
    for start in range(0, x.shape[1], COLUMNS):
        add(total, slice(start, start + COLUMNS))
    return total


def _product(x: Tensor, y: Tensor) -> Tensor:
    """In float32 on a CPU some long rows meet as a convolution with one place, which is faster there."""
    convolved = x.dtype is torch.float32 and x.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if convolved and FEW <= min(len(x), len(y)) < SQUARE and x.is_contiguous() and y.is_contiguous():
        return torch.conv1d(x.unsqueeze(1), y.unsqueeze(1)).squeeze(2)
    return x @ y.T
