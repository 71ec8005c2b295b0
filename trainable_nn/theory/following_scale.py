r"""A scale a = 1 / h(r) that follows a smooth size, r = t S(theta) / bound, and its derivatives in theta on a set.

h(r) >= max(1, r) is ``modules.smooth_maximum.smooth_maximum_with_one`` from ``start``: with w = 1 - start, z = (r - start) / w,

    h = 1 + w (z - m),  m = z (1 + z^3)^(-1/3),  h' = 1 - (1 + z^3)^(-4/3),  h'' = 4 z^2 (1 + z^3)^(-7/3) / w,

all 0 but h = 1 for r <= start; h and h' rise, h'' rises to z^3 = 2 / 5 and falls from there, and h >= r, h' < 1. Hence

    D_k a = (r a') D_k S / S,                     \|r a'\| = r h' / h^2,
    D_k D_l a = (r^2 a'') (D_k S / S)(D_l S / S) + (r a') D_k D_l S / S,   r^2 a'' = r^2 (2 h'^2 / h^3 - h'' / h^2).

S is made of the sizes of single tensors by sums and products, so what is carried is relative: \|D S\| / S and \|D^2 S\| / S.
Of a product the first add, and the second add with twice the product of the first; of a sum they are weighted means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from .composition import times

MARGIN = 1.0 + 2.0**-40  # of some hundred roundings
PIECES = 512
FAR = 1e4  # beyond it the bounds for infinity are taken


@dataclass(frozen=True)
class ScaleOnInterval:
    """Of a = 1 / h(r) for r in an interval: its least and largest value, sup \\|r a'\\| and sup \\|r^2 a''\\|."""

    least: float
    most: float
    first: float
    second: float


def scale_on(low: float, high: float, start: float = 0.5) -> ScaleOnInterval:
    """Bounds over low <= r <= high, 0 <= low; high may be infinite."""
    least = 0.0 if math.isinf(high) else 1.0 / _h(np.array(high), start)[0] / MARGIN
    most = min(1.0 / _h(np.array(low), start)[0] * MARGIN, 1.0)
    if high <= start:
        return ScaleOnInterval(1.0, 1.0, 0.0, 0.0)
    ends = np.geomspace(max(low, start), max(min(high, FAR), max(low, start)), PIECES)
    ends[[0, -1]] = max(low, start), max(min(high, FAR), max(low, start))
    r0, r1 = ends[:-1], ends[1:]
    (h0, d0, b0), (h1, d1, b1) = (_h(r, start) for r in (r0, r1))
    first = float((r1 * d1 / h0**2).max())
    peak = start + (1.0 - start) * 0.4 ** (1 / 3)
    bent = np.where((r0 < peak) & (peak < r1), _h(np.array(peak), start)[2], np.maximum(b0, b1))
    rising = r1**2 * 2.0 * d1**2 / h0**3 - r0**2 * np.minimum(b0, b1) / h1**2
    falling = r1**2 * bent / h0**2 - r0**2 * 2.0 * d0**2 / h1**3
    second = float(np.maximum(rising, falling).max())
    if high > FAR:  # h >= r, h' < 1, and h'' falls
        h, _, b = (float(value[-1]) for value in (h1, d1, b1))
        first, second = max(first, 1.0 / h), max(second, 2.0 / h, b)
    slack = (MARGIN - 1.0) * 4.0  # two terms of about the same size may cancel
    return ScaleOnInterval(float(least), float(most), first * MARGIN, max(second, 0.0) * MARGIN + slack * first)


def _h(r: np.ndarray, start: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """h, h', h''; 1 - (1 + z^3)^(-q) without loss near 0."""
    width = 1.0 - start
    z = np.maximum(r - start, 0.0) / width
    log = np.log1p(z**3)
    return 1.0 + width * z * -np.expm1(-log / 3), -np.expm1(-4.0 / 3.0 * log), 4.0 * z**2 * np.exp(-7.0 / 3.0 * log) / width


@dataclass(frozen=True)
class SizeOnBall:
    r"""What is known of a smooth size S(theta) > 0 on a set: least and most S; ratio >= V / S, V what is proved beside it.

    first: parameter -> sup \|D_k S\| / S.  second: pair of parameters -> sup \|D_k D_l S\| / S, both orders of a pair.
    is_product: S is a number times a product of the sizes of single tensors.
    """

    least: float
    most: float
    ratio: float
    first: Mapping[str, float] = field(default_factory=dict)
    second: Mapping[tuple[str, str], float] = field(default_factory=dict)
    is_product: bool = True

    def __mul__(self, other: SizeOnBall | float) -> SizeOnBall:
        if not isinstance(other, SizeOnBall):
            return SizeOnBall(*self._scaled(other), self.ratio * MARGIN, self.first, self.second, self.is_product)
        first = _joined(self.first, other.first)
        second = _joined(self.second, other.second)
        for k, one in self.first.items():
            for l, two in other.first.items():
                second = _joined(second, {(k, l): one * two * MARGIN})
                second = _joined(second, {(l, k): one * two * MARGIN})
        return SizeOnBall(
            self.least * other.least / MARGIN, float(times(self.most, other.most)) * MARGIN, self.ratio * other.ratio * MARGIN,
            first, second, self.is_product and other.is_product,
        )  # fmt: skip

    def __add__(self, other: SizeOnBall | float) -> SizeOnBall:
        if not isinstance(other, SizeOnBall):
            other = SizeOnBall(float(other), float(other), 1.0)
        parts = [_weighted(one, _share(one, two)) for one, two in ((self, other), (other, self))]
        return SizeOnBall(
            (self.least + other.least) / MARGIN, (self.most + other.most) * MARGIN, _ratio_of_sum(self, other) * MARGIN,
            _joined(parts[0].first, parts[1].first), _joined(parts[0].second, parts[1].second), is_product=False,
        )  # fmt: skip

    __rmul__, __radd__ = __mul__, __add__

    def _scaled(self, factor: float) -> tuple[float, float]:
        return self.least * factor / MARGIN, float(times(self.most, factor)) * MARGIN


def _share(one: SizeOnBall, other: SizeOnBall) -> float:
    """sup one / (one + other)."""
    if other.least == 0.0 or math.isinf(one.most):
        return 1.0
    return one.most / (one.most + other.least) * MARGIN


def _weighted(size: SizeOnBall, share: float) -> SizeOnBall:
    first = {k: share * value for k, value in size.first.items()}
    return SizeOnBall(0.0, 0.0, 0.0, first, {k: share * value for k, value in size.second.items()})


def _ratio_of_sum(one: SizeOnBall, other: SizeOnBall) -> float:
    """(V1 + V2) / (S1 + S2) is a mean of the ratios, with the largest weight that the larger one can have."""
    low, high = sorted((one, other), key=lambda size: size.ratio)
    share = min(_share(high, low), 1.0)
    return share * high.ratio + (1.0 - share) * low.ratio


def _joined(one: Mapping, other: Mapping) -> dict:
    """Sums, entry by entry."""
    return {k: one.get(k, 0.0) + other.get(k, 0.0) for k in [*one, *(k for k in other if k not in one)]}
