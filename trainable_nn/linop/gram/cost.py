"""How fast this machine multiplies and moves, measured once in some milliseconds: what the choice of a way stands on."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

SKINNY = 64  # positions from which a product is as fast as a large one


@dataclass(frozen=True)
class Rates:
    """Seconds for a multiply-add in a large product, in one of a few positions, in small batched ones; for a float moved."""

    gemm: float
    skinny: float
    small: float
    move: float

    def row(self, positions: int) -> float:
        """For a product that sums over so many positions."""
        share = min(positions, SKINNY) / SKINNY
        return self.gemm * share + self.skinny * (1 - share)


@functools.lru_cache
def rates(dtype: torch.dtype, device: torch.device) -> Rates:
    """The least time of three of each; results are the same whatever it finds."""
    a = torch.ones(384, 384, dtype=dtype, device=device)
    left, right = torch.ones(64, 256, 8, dtype=dtype, device=device), torch.ones(64, 8, 256, dtype=dtype, device=device)
    row, column = torch.ones(512, 10, 256, dtype=dtype, device=device), torch.ones(512, 256, 10, dtype=dtype, device=device)
    long = torch.ones(2**21, dtype=dtype, device=device)
    return Rates(
        gemm=_seconds(lambda: a @ a, device) / 384**3,
        skinny=_seconds(lambda: torch.bmm(left, right), device) / (64 * 256 * 8 * 256),
        small=_seconds(lambda: torch.bmm(row, column), device) / (512 * 10 * 256 * 10),
        move=_seconds(lambda: long * 2, device) / 2**21,
    )


def _seconds(f: Callable[[], object], device: torch.device) -> float:
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        f()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
