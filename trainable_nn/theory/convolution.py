"""How far a convolution can exceed its kernel's norm: ||T|| <= geometry_factor * ||K as a matrix||.

The input is first copied into patches, U x, then each patch is multiplied by the matrix
K of shape (c_out, c_in * prod k). A row of U copies one pixel, so U^T U is diagonal: it
counts how often each pixel is used, and ||U||^2 is the largest count. The patches are
disjoint rows, so ||T|| <= ||K|| ||U||. Padding and strides act on each axis by itself, so
the counts multiply over the axes. Groups are blocks of a block diagonal: their maximum.

Source: THEORY_PAPERS II.2.2, extended to dilation, strides together with dilation, padding
that repeats pixels, and one-sided edges.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from .rounding import root_up

ENUMERATION_LIMIT = 20_000_000  # steps, about a tenth of a second; beyond it the factor is a cruder bound


def geometry_factor(
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: str | Sequence[int],
    dilation: Sequence[int],
    padding_mode: str = "zeros",
    input_shape: Sequence[int] | None = None,
) -> float:
    """sqrt of the largest number of times that one pixel is used: exact for an input shape, or over all of them.

    Shape:
        input_shape: the image's sizes; what stands before them (channels, batch) is not looked at.
    Raises:
        ValueError: input_shape has too few axes, or no output of the convolution exists for it.
    """
    axes = len(kernel_size)
    sizes: Sequence[int | None] = [None] * axes
    if input_shape is not None:
        if len(input_shape) < axes:
            raise ValueError(
                f"geometry_factor: input_shape {tuple(input_shape)} has too few axes for a convolution of "
                f"{axes} axes. Give the image's sizes, with or without channels before them."
            )
        sizes = list(input_shape)[len(input_shape) - axes :]
    before_after = sides(kernel_size, padding, dilation)
    uses = [
        most_uses(k, s, d, *pads, padding_mode) if n is None else uses_at(n, k, s, d, *pads, padding_mode)
        for n, k, s, d, pads in zip(sizes, kernel_size, stride, dilation, before_after)
    ]
    return root_up(math.prod(uses))


def sides(kernel_size: Sequence[int], padding: str | Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    """Pixels put (before, after) each axis; 'same' puts the odd one after."""
    if padding == "valid":
        return [(0, 0) for _ in kernel_size]
    if padding == "same":
        spans = [d * (k - 1) for k, d in zip(kernel_size, dilation)]
        return [(span // 2, span - span // 2) for span in spans]
    return [(p, p) for p in padding]


def uses_at(n: int, k: int, s: int, d: int, before: int, after: int, mode: str) -> int:
    """The largest number of (output, tap) pairs that read one pixel of an axis of length n.

    Raises:
        ValueError: the padded axis is shorter than the kernel, or torch has no such padding.
    """
    span = d * (k - 1) + 1
    if n + before + after < span or not _padding_exists(n, before, after, mode):
        raise ValueError(
            f"convolution: an axis of length {n} with padding {(before, after)} ({mode}) has no output for kernel "
            f"{k} and dilation {d}. Give a larger input_shape."
        )
    far = 2 * (span + s + before + after)
    if n > far + s:  # edges no longer meet, so the counts depend on n only by its remainder
        n = far + (n - far) % s
    return _count(n, k, s, d, before, after, mode)


@lru_cache(maxsize=4096)
def most_uses(k: int, s: int, d: int, before: int, after: int, mode: str) -> int:
    """An upper bound of ``uses_at`` over every length n.

    Zeros: output o and tap j read pixel o s + j d - p, so the taps that read one pixel agree
    modulo s / gcd(s, d), and at most ceil(k / (s / gcd)) do; long axes reach it. Other modes:
    the maximum over all lengths up to where the two edges no longer meet, and one period s more.
    Where that takes too long, each pixel has at most 1 + [before > 0] + [after > 0] copies
    (replicate: max(before, after) + 1 or, for one pixel, all), each used as with zeros.
    """
    plain = -(-k // (s // math.gcd(s, d)))
    if mode == "zeros" or before == after == 0:
        return plain
    span = d * (k - 1) + 1
    far = 2 * (span + s + before + after)
    if far * (far + s) * (2 + k // s) > ENUMERATION_LIMIT:
        copies = before + after + 1 if mode == "replicate" else 1 + (before > 0) + (after > 0)
        return copies * plain
    lengths = range(max(1, span - before - after), far + s)
    return max(
        (_count(n, k, s, d, before, after, mode) for n in lengths if _padding_exists(n, before, after, mode)),
        default=plain,
    )


def _padding_exists(n: int, before: int, after: int, mode: str) -> bool:
    """Whether torch pads an axis of length n so: a reflection needs fewer pixels than there are, a circle as many."""
    most = max(before, after)
    return {"reflect": most < n, "circular": most <= n}.get(mode, n >= 1 or most == 0)


def _count(n: int, k: int, s: int, d: int, before: int, after: int, mode: str) -> int:
    """The largest count, by enumeration of the padded axis."""
    length = n + before + after
    outputs = (length - d * (k - 1) - 1) // s + 1
    reads = np.zeros(length, dtype=np.int64)
    for tap in range(k):
        reads[tap * d : tap * d + (outputs - 1) * s + 1 : s] += 1
    source = np.arange(length) - before
    if mode == "zeros":
        return int(reads[before : before + n].max(initial=0))
    if mode == "circular":
        source %= n
    elif mode == "replicate":
        source = source.clip(0, n - 1)
    else:
        source = np.abs(source)
        source = n - 1 - np.abs(n - 1 - source)
    return int(np.bincount(source, weights=reads, minlength=n).max())
