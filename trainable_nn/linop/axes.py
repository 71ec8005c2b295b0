r"""One axis of a convolution as a piece of a larger circle: A_j = P S_j E with ||P|| ||E|| <= factor, for every tap j.

A_j copies padded pixel t s + j d to output t. With j d = s b + r the padded pixels s u + r, for each r by
themselves, form a line on which tap j reads u = t + b: a convolution with stride 1. Bent into a circle of
N places it stays the same on the pixels and outputs that exist, if no tap reads round the circle:
b + l N, l != 0, must differ from every u - t. So with first and last t, u and b

    N >= u_last - t_first - b_first + 1  and  N >= b_last + t_last - u_first + 1  (and each t, u once)

make T a compression of a circular convolution: ||T|| <= max over the N frequencies of the symbol's norm, with
the axes' factors multiplied. The same holds of a circle whose seam multiplies by -1: frequencies shifted by half a step.

Padding by pixels copies them first, ||Pad||^2 = the largest number of copies. Circular padding with N s = n
pixels is a circle already; outputs that go round it more than once repeat. Pixels that no tap reads, and taps that
read zeros only, are left out.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

ENUMERATION_LIMIT = 2**22  # (output, tap) pairs; a longer axis is bounded as one of every length
LENGTHS_LIMIT = 2**18  # pairs times lengths; beyond it a formula bounds the uses over all lengths


@dataclass(frozen=True)
class Axis:
    """One axis of a convolution; n is None for every length."""

    n: int | None
    kernel: int
    stride: int
    before: int
    after: int
    dilation: int
    mode: str


@dataclass(frozen=True)
class Circle:
    """What an axis turns into: the taps in use, a circle of N places (None: every frequency), a factor squared.

    open: no tap reads across the seam, so the seam may multiply by -1.
    degree: half the distance of the outermost taps, in steps of the circle.
    uses: at least the number of (output, tap) pairs that read one pixel: im2col's squared norm.
    box: numbers of neighbouring places that hold all outputs, and all pixels read.
    """

    taps: np.ndarray
    places: int | None
    copies: int
    open: bool
    degree: float
    uses: int
    box: tuple[int, int] = (0, 0)


@lru_cache(256)  # layers often have the same axes
def circle_of(axis: Axis) -> Circle:
    """The circle of an axis of a given length, or one for every length.

    Raises:
        ValueError: no output of the convolution exists for this length, or torch has no such padding.
    """
    if axis.n is None:
        taps = np.arange(axis.kernel)
        return Circle(taps, None, _most_copies(axis), False, _degree(axis, taps), _most_uses(axis))
    outputs = _outputs(axis)
    if outputs * axis.kernel > ENUMERATION_LIMIT:
        return circle_of(replace(axis, n=None))
    tap, t = np.meshgrid(np.arange(axis.kernel), np.arange(outputs), indexing="ij")
    position, source = t * axis.stride + tap * axis.dilation, reads(axis)
    read = source >= 0
    if not read.any():
        return Circle(np.arange(0), 1, 1, True, 0.0, 0)
    taps = np.flatnonzero(read.any(1))
    uses = int(np.bincount(source[read]).max())
    copies = 1
    if axis.mode != "zeros":
        cells = np.unique(position[read])
        copies = int(np.bincount(_source(cells - axis.before, axis)).max())
    degree = _degree(axis, taps)
    turns = -(-outputs * axis.stride // axis.n)
    if axis.mode == "circular" and axis.n % axis.stride == 0 and turns <= copies:
        return Circle(taps, axis.n // axis.stride, turns, False, degree, uses)
    places, box = _places(axis, t[read], position[read], taps), _box(axis, t[read], position[read])
    return Circle(taps, places, copies, True, degree, uses, box)


def reads(axis: Axis) -> np.ndarray:
    """(taps, outputs): the pixel that each output reads with each tap; -1 for a padded zero."""
    position = np.arange(_outputs(axis)) * axis.stride + np.arange(axis.kernel)[:, None] * axis.dilation
    return _source(position - axis.before, axis)


def _degree(axis: Axis, taps: np.ndarray) -> float:
    steps = taps * axis.dilation // axis.stride
    return float(steps.max() - steps.min()) / 2


def _places(axis: Axis, t: np.ndarray, position: np.ndarray, taps: np.ndarray) -> int:
    u, b = position // axis.stride, taps * axis.dilation // axis.stride
    apart = max(u.max() - t.min() - b.min(), b.max() + t.max() - u.min())
    return int(max(apart, t.max() - t.min(), u.max() - u.min())) + 1


def _box(axis: Axis, t: np.ndarray, position: np.ndarray) -> tuple[int, int]:
    u = position // axis.stride
    return int(t.max() - t.min()) + 1, int(u.max() - u.min()) + 1


def _outputs(axis: Axis) -> int:
    span = axis.dilation * (axis.kernel - 1) + 1
    length = axis.n + axis.before + axis.after
    if length < span or axis.n < 1 or not _padding_exists(axis):
        raise ValueError(
            f"operator_norm_at_most: an axis of length {axis.n} with padding {(axis.before, axis.after)} ({axis.mode}) "
            f"has no output for kernel {axis.kernel} and dilation {axis.dilation}. Give a larger input_shape."
        )
    return (length - span) // axis.stride + 1


def _padding_exists(axis: Axis) -> bool:
    """Whether torch pads so: a reflection needs fewer pixels than there are, a circle as many."""
    most = max(axis.before, axis.after)
    return {"reflect": most < axis.n, "circular": most <= axis.n}.get(axis.mode, True)


def _source(place: np.ndarray, axis: Axis) -> np.ndarray:
    """The pixel of which each padded place is a copy; -1 where it is zero."""
    if axis.mode == "zeros":
        return np.where((place >= 0) & (place < axis.n), place, -1)
    if axis.mode == "circular":
        return place % axis.n
    if axis.mode == "replicate":
        return place.clip(0, axis.n - 1)
    return axis.n - 1 - np.abs(axis.n - 1 - np.abs(place))


def _most_copies(axis: Axis) -> int:
    """At least the copies of one pixel, for every length."""
    before, after = axis.before, axis.after
    if axis.mode == "zeros" or before == after == 0:
        return 1
    if axis.mode == "replicate":
        return before + after + 1
    if axis.mode == "circular" and axis.stride == 1 and before + after <= axis.dilation * (axis.kernel - 1):
        return 1  # no more outputs than pixels: rows of the circle of n places
    return 1 + (before > 0) + (after > 0)


def _most_uses(axis: Axis) -> int:
    """At least the uses of one pixel, for every length; by enumeration until the edges no longer meet, and one period.

    Zeros: the taps that read one pixel agree modulo s / gcd(s, d), and at most ceil(k / (s / gcd)) do.
    """
    k, s, d = axis.kernel, axis.stride, axis.dilation
    plain = -(-k // (s // math.gcd(s, d)))
    if axis.mode == "zeros" or axis.before == axis.after == 0:
        return plain
    span = d * (k - 1) + 1
    far = 2 * (span + s + axis.before + axis.after)
    if far * far * k > LENGTHS_LIMIT:
        copies = axis.before + axis.after + 1 if axis.mode == "replicate" else 1 + (axis.before > 0) + (axis.after > 0)
        return copies * plain
    lengths = range(max(1, span - axis.before - axis.after), far + s)
    sized = [Axis(n, k, s, axis.before, axis.after, d, axis.mode) for n in lengths]
    return max((circle_of(a).uses for a in sized if _padding_exists(a)), default=plain)
