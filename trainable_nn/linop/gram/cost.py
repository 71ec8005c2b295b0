"""How fast this machine multiplies and moves, measured once in some milliseconds: what the choice of a way stands on."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .inner import WIDE, own_products

FEW, MANY = 16, 256  # positions: a product over few writes more than it reads, one over many is like any other


@dataclass(frozen=True)
class Rates:
    """Seconds for a multiply-add: in a large product, one over 16 positions, small batched ones, between 64 long rows
    and the same; and for a float moved."""

    gemm: float
    skinny: float
    small: float
    long: float
    move: float

    def inner(self, rows: int) -> float:
        """For half of the products of so many long rows, of which fewer than many are all computed."""
        return self.gemm if rows >= WIDE else max(2 * self.long, self.gemm)

    def row(self, positions: int) -> float:
        """For a product that sums over so many positions: what is written costs the same however short the sum."""
        return self.gemm + max(self.skinny - self.gemm, 0.0) * FEW / positions if positions < MANY else self.gemm


@functools.lru_cache
def rates(dtype: torch.dtype, device: torch.device) -> Rates:
    """The least time of eight of each; results are the same whatever it finds."""
    a = torch.ones(384, 384, dtype=dtype, device=device)
    left, right = torch.ones(48, FEW, dtype=dtype, device=device), torch.ones(FEW, 4096, dtype=dtype, device=device)
    row, column = torch.ones(512, 10, 256, dtype=dtype, device=device), torch.ones(512, 256, 10, dtype=dtype, device=device)
    rows = torch.ones(64, 2**13, dtype=dtype, device=device)
    long, other = (torch.ones(2**21, dtype=dtype, device=device) for _ in range(2))  # a new one would be mapped first
    return Rates(
        gemm=_seconds(lambda: a @ a, device) / 384**3,
        skinny=_seconds(lambda: left @ right, device) / (48 * FEW * 4096),
        small=_seconds(lambda: torch.bmm(row, column), device) / (512 * 10 * 256 * 10),
        long=_seconds(lambda: own_products(rows), device) / (64**2 * 2**13),
        move=_seconds(lambda: torch.mul(long, 2, out=other), device) / 2**21,
    )


def _seconds(f: Callable[[], object], device: torch.device) -> float:
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        f()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
