"""Inner products of rows with rows, by whatever multiplies this shape fastest here, added up in float64."""

import torch
from torch import Tensor

COLUMNS = 2**15  # summed in the network's dtype before float64 takes over
FEW, SQUARE, WIDE = 24, 128, 512  # rows from which the shapes differ in what is fastest


def inner_products(x: Tensor, y: Tensor) -> Tensor:
    """x y^T in float64, of (m, p) and (n, p)."""
    total = torch.zeros(len(x), len(y), dtype=torch.float64, device=x.device)
    for start in range(0, x.shape[1], COLUMNS):
        total += _product(x[:, start : start + COLUMNS], y[:, start : start + COLUMNS])
    return total


def _product(x: Tensor, y: Tensor) -> Tensor:
    """In float32 on a CPU long rows meet as a convolution with one place: twice as fast as a matrix product there."""
    convolved = x.dtype is torch.float32 and x.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if convolved and FEW <= min(len(x), len(y)) and x.is_contiguous() and y.is_contiguous():
        return torch.conv1d(x.unsqueeze(1), y.unsqueeze(1)).squeeze(2)
    return x @ y.T


def parts_of_square(rows: int) -> int:
    """Into how many strips the rows of a symmetric product are cut, of whose blocks the upper half is computed."""
    if rows < FEW:
        return max(1, rows // 8)
    return 1 if rows < SQUARE else 2 if rows < WIDE else 4
