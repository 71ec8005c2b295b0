"""Which of two equal ways is the faster one on this machine, timed once in some milliseconds.

Both ways give the same numbers up to rounding. oneDNN's convolutions and the products of torch's BLAS run at one rate on some
processors and at two thirds of each other on others, so no fixed rule is right on all.
"""

import functools
import time
from collections.abc import Callable

import torch

ROUNDS = 8
CLEARLY = 0.95  # of the other way's time: a way that copies or rearranges must earn it


def matrices_beat_convolutions() -> bool:
    """Whether the product with patches at hand beats a convolution of fewer pixels than half the filters."""
    return _matrices_beat_convolutions(torch.get_num_threads())


def channels_last_pays() -> bool:
    """Whether a convolution and its transpose, one after the other, are faster on an image put in channels-last order first."""
    return _channels_last_pays(torch.get_num_threads())


@functools.lru_cache
def _matrices_beat_convolutions(threads: int) -> bool:
    x, kernel = _ones(8, 256, 4, 4), _ones(256, 256, 3, 3)
    patches = _ones(kernel[0].numel(), 8 * 16)
    return _faster(lambda: kernel.flatten(1) @ patches, lambda: torch.conv2d(x, kernel, None, 1, 1))


@functools.lru_cache
def _channels_last_pays(threads: int) -> bool:
    x, kernel = _ones(8, 64, 16, 16), _ones(64, 64, 3, 3)

    def both(v: torch.Tensor) -> None:
        y = torch.conv2d(v, kernel, None, 1, 1)
        mask = [True, False, False]
        torch.ops.aten.convolution_backward(y, v, kernel, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask)

    return _faster(lambda: both(x.contiguous(memory_format=torch.channels_last)), lambda: both(x))


def _ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.float32, device="cpu")


def _faster(one: Callable[[], object], other: Callable[[], object]) -> bool:
    """By the least time of some rounds, in turn."""
    best = [float("inf"), float("inf")]
    with torch.no_grad():
        for _ in range(ROUNDS):
            for which, way in enumerate((one, other)):
                start = time.perf_counter()
                way()
                best[which] = min(best[which], time.perf_counter() - start)
    return best[0] < CLEARLY * best[1]
