r"""The closed forms of paper B, section 3 to 6, as functions of their constants.

B = sup |phi'|, M = sup |phi''|, c = c_res, A >= every ||W_h||, x = A B c / sqrt m, t = ln(1 / (1 - delta')) / (2 B c).
Unit inputs. \|\|a\|\|_inf = \|\|y\|\| / sqrt n, so \|\|a\|\|_2 = sqrt m \|\|a\|\|_inf. Equation numbers are the paper's; the form of (3.87)
is a reconstruction, and what is wrong with each is THEORY_PAPERS II.3.5 to II.3.8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Setting:
    """What every formula below reads. ``a``: the size of one output weight."""

    n: int
    d: int
    m: int
    H: int
    B: float
    M: float
    c: float
    c_phi: float
    a: float
    at_zero: float = 0.0

    @property
    def y(self) -> float:
        """||y|| = sqrt(n) a."""
        return math.sqrt(self.n) * self.a

    def x(self, A: float) -> float:
        return A * self.B * self.c / math.sqrt(self.m)


def alpha_at_start(s: Setting, smallest: float, delta: float) -> float:
    """(3.21): (1 - delta') sqrt(c_phi / m) ||a||_2 e^(-2 B c) sqrt(lambda(X))."""
    return (1 - delta) * math.sqrt(s.c_phi) * s.a * math.exp(-2 * s.B * s.c) * math.sqrt(smallest)


def beta_at(s: Setting, A: float) -> float:
    """(3.29): ||a||_2 (B sqrt(c_phi / m) + A B^2 sqrt(c_phi) c / (sqrt(H) m)) e^x ||X||_F; needs phi(0) = 0."""
    m = s.m
    inner = s.B * math.sqrt(s.c_phi / m) + A * s.B**2 * math.sqrt(s.c_phi) * s.c / (math.sqrt(s.H) * m)
    return math.sqrt(m) * s.a * inner * math.exp(s.x(A)) * math.sqrt(s.n)


def beta_for_any_value_at_zero(s: Setting, A: float) -> float:
    """(3.29) without phi(0) = 0: features are longer by what phi(0) adds.

    |x_1| <= sqrt(c_phi) (A B / sqrt m + |phi(0)|) and |x_h| <= (1 + x / H) |x_{h-1}| + c |phi(0)| / H, so |x_h| <= e^x
    (|x_1| + c |phi(0)|); block h is at most c B / (H sqrt m) ||a||_2 e^x of it, and H blocks add as squares.
    """
    m, zero = s.m, abs(s.at_zero)
    feature = math.sqrt(s.c_phi) * (A * s.B / math.sqrt(m) + zero) + s.c * zero
    inner = s.B * math.sqrt(s.c_phi / m) + s.c * s.B / math.sqrt(s.H * m) * feature
    return math.sqrt(m) * s.a * inner * math.exp(s.x(A)) * math.sqrt(s.n)


def lipschitz_printed(s: Setting, A: float) -> float:
    """(3.86), (3.87): sqrt(n) C."""
    return _lipschitz(s, A, linear=1 + 1 / math.sqrt(s.H), twice=0.0)


def lipschitz_corrected(s: Setting, A: float) -> float:
    """sqrt(n) C_fix: (3.78) lost a factor |x_{h-1}|; where (3.51)'s maximum fails, times sqrt(1 + x^2 / H).

    Holds for phi(0) = 0 only.
    """
    x, H = s.x(A), s.H
    fails = H > 3 and x > 2 * H / (H - 3)
    return _lipschitz(s, A, linear=1 / math.sqrt(H), twice=1.0) * (math.sqrt(1 + x * x / H) if fails else 1.0)


def _lipschitz(s: Setting, A: float, *, linear: float, twice: float) -> float:
    root, step, grown = 1 / math.sqrt(s.H), s.c / math.sqrt(s.m), math.exp(s.x(A))
    first = s.M + step * (A * s.B * s.M * linear + s.B**2 * (1 + root) + root * A * s.B**3 * step * grown)
    last = (1 + root) * (1 + step * A * s.B * grown) + twice
    second = s.c * s.c_phi / s.m * grown**2 * A**2 * s.B**2 * s.M * last
    return math.sqrt(s.n) * s.a * (math.sqrt(s.c_phi) * grown * first + second)


def weights_at_most(s: Setting, delta: float) -> float:
    """(5.16): A = sqrt(m) (3 + t)."""
    return math.sqrt(s.m) * (3 + _t(s, delta))


def beta_on_ball(s: Setting, delta: float) -> float:
    """(5.17), as printed; (3.29) at the A of (5.16)."""
    t, root = _t(s, delta), math.sqrt(s.c_phi)
    inner = s.B * root + s.B**2 * root * s.c / math.sqrt(s.H) * (3 + t)
    return s.y / math.sqrt(1 - delta) * inner * math.exp(3 * s.B * s.c)


def lipschitz_on_ball_printed(s: Setting, delta: float) -> float:
    """(5.18), as printed: its last bracket kept 1 / sqrt(m) although A = sqrt(m) (3 + t) stands in it."""
    t, root, B, c = 3 + _t(s, delta), 1 / math.sqrt(s.H), s.B, s.c
    grown = math.exp(3 * B * c) / math.sqrt(1 - delta)
    first = s.M + c * t * B * s.M * (1 + root) + c * B**2 * (1 + root) + c * root * t * B**3 * c * grown
    last = (1 + root) * (1 + c / math.sqrt(s.m) * t * B * grown)
    return math.sqrt(s.c_phi) * s.y * grown * first + c * s.c_phi * s.y * grown**2 * t**2 * B**2 * s.M * last


def misfit(s: Setting, feature_lengths: np.ndarray, delta: float) -> float:
    """kappa of (4.7), re-derived (II.3.6): 1 + (1 + delta) B sqrt(c_phi) + (B c / H) sum_k (||X_k||_F / sqrt n + delta).

    Shape:
        feature_lengths: (H - 1,), ||X_k||_F at initialisation.
    """
    later = np.sum(np.asarray(feature_lengths) / math.sqrt(s.n) + delta)
    return 1 + (1 + delta) * s.B * math.sqrt(s.c_phi) + s.B * s.c / s.H * float(later)


def width_factors(s: Setting, smallest: float, kappa: float, delta: float) -> tuple[float, float]:
    """The two terms of K in (6.2), m >= K n."""
    common = kappa**2 * math.exp(4 * s.B * s.c) / ((1 - delta) ** 4 * s.c_phi * smallest)
    first = 64 * s.B**2 * s.c**2 * common / math.log(1 / (1 - delta)) ** 2
    return first, 32 * common / (s.d * delta**2)


def least_depth(slope_times_scale: float, delta: float) -> int:
    """H_0: every H >= H_0 has (1 - 2 B c / H)^(2 (H - 1)) >= (1 - delta') e^(-4 B c), with a base that is >= 0.

    The logarithm of the left is at least -4 b - 5.34 b^2 / H for H >= 8 b, b = B c, so the search ends.
    """
    b, room = slope_times_scale, -math.log1p(-delta)
    depth = np.arange(1, max(8 * b, 5.34 * b * b / room) + 3)
    with np.errstate(divide="ignore", invalid="ignore"):
        left = 2 * (depth - 1) * np.log1p(-2 * b / depth)
    fails = ~(left >= -4 * b - room) & (depth > 1) | (depth < 2 * b) | (depth < 2)
    return int(depth[np.nonzero(fails)[0][-1]]) + 1


def probability(s: Setting, spectral: np.ndarray, delta: float, *, printed: bool) -> float:
    """Theorem 6.1's probability without its Chernoff term, whose constants it leaves open: at most this.

    ``spectral``: (H,), ||X||_2 and ||X_k||_2, k = 1 ... H - 1. The bound of ||W|| fails with e^(-m / 2), where e^(-m^2 / 2)
    is printed.
    """
    tail = s.m**2 / 2 if printed else s.m / 2
    misses = s.H * math.exp(-min(tail, 700.0)) + float(
        np.sum(np.exp(-(delta**2) * s.n / (2 * np.asarray(spectral) ** 2)))
    )
    return max(0.0, 1 - misses)


def _t(s: Setting, delta: float) -> float:
    return math.log(1 / (1 - delta)) / (2 * s.B * s.c)
