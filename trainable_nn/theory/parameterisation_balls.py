r"""Slope and curvature of P(w) near given weights: tighter than the suprema over all weights.

With t = |w| / sqrt(eps) (an entry, or the length of a row), gain eps^(-1/2) and gain / eps aside:

    slope      entry (1 + t^2)^(-3/2),       row (1 + t^2)^(-1/2), its largest, tangential
    curvature  entry 3 t (1 + t^2)^(-5/2),   row the same up to t^2 = 1/2, then (2 / sqrt 3) / (1 + t^2)

Slopes fall with t. Curvatures rise to t = 1/2 and fall from there. On a ball of radius R around w, t moves by at
most R / sqrt(eps), so each supremum is at the end of that interval, or at 1/2 if this is inside.

Source: paper A, (30) to (33) with the exponent of (33) corrected; THEORY_PAPERS II.2.1.
"""

import math

import numpy as np

from .nonlinearities import C3
from .parameterisations import EntryNormConstants, WeightNormConstants
from .schatten import SchattenNormConstants

PEAK = 0.5
MARGIN = 1.0 + 2.0**-36  # of the roundings, sums of squares included
TWO_OVER_ROOT_3 = 2.0 / math.sqrt(3.0)


class IdentityConstants:
    """P(w) = w."""

    leak, gain = 1.0, 0.0

    def operator_norm_supremum(self, rows: int, columns: int) -> float:
        """No bound over all weights, unless there are none."""
        return math.inf if rows * columns else 0.0

    def norm_allowance(self, rows: int, columns: int, roundoff: float) -> float:
        """Nothing is rounded."""
        return 0.0


Constants = EntryNormConstants | WeightNormConstants | IdentityConstants | SchattenNormConstants


def slopes_on_ball(constants: Constants, weight: np.ndarray, radius: float, effective: np.ndarray) -> np.ndarray:
    """At least sup \\|P'\\| within the radius: one number for each entry, or for each row (rows, 1) otherwise.

    Shape:
        weight: (rows, columns), a group of a convolution at a time; effective: P(weight), the same.
    """
    if isinstance(constants, SchattenNormConstants):
        return np.full((len(weight), 1), _schatten_slope(constants, _Lengths(constants, weight, effective, radius)))
    if isinstance(constants, IdentityConstants):
        return np.ones((len(weight), 1))
    nearest = np.maximum(_lengths(constants, weight) / MARGIN - radius / math.sqrt(constants.eps) * MARGIN, 0.0)
    power = 3 if isinstance(constants, EntryNormConstants) else 1
    steepest = constants.gain / math.sqrt(constants.eps) * np.hypot(1.0, nearest) ** -power
    return (steepest + getattr(constants, "leak", 0.0)) * MARGIN


def curvatures_on_ball(constants: Constants, weight: np.ndarray, radius: float, effective: np.ndarray) -> np.ndarray:
    """At least sup \\|P''\\| within the radius: one number for each entry, or for each row (rows, 1)."""
    if isinstance(constants, SchattenNormConstants):
        return np.full((len(weight), 1), _schatten_curvature(constants, _Lengths(constants, weight, effective, radius)))
    if isinstance(constants, IdentityConstants):
        return np.zeros((len(weight), 1))
    t, reach = _lengths(constants, weight), radius / math.sqrt(constants.eps) * MARGIN
    near, far = np.maximum(t / MARGIN - reach, 0.0), t * MARGIN + reach
    profile = _entry_profile if isinstance(constants, EntryNormConstants) else _row_profile
    most = profile(np.where(far < PEAK, far, np.where(near > PEAK, near, PEAK)))
    return constants.gain / constants.eps * np.minimum(most * MARGIN, C3 * MARGIN)


def steepest_entries(constants: Constants, weight: np.ndarray) -> np.ndarray:
    """The entries among which the largest slope and curvature of an entry norm are found, on every ball; else all.

    Both profiles have one peak, at t = 0 and at t = 1/2, so the nearest entries on either side of it are enough.
    """
    if not isinstance(constants, EntryNormConstants) or weight.size == 0:
        return weight
    size, peak = np.abs(weight), PEAK * math.sqrt(constants.eps)
    is_below = size <= peak
    found = [size.min()]
    if is_below.any():
        found.append(size.max(where=is_below, initial=0.0))
    if not is_below.all():
        found.append(size.min(where=~is_below, initial=math.inf))
    return np.array([found], dtype=np.float64)


def _lengths(constants: Constants, weight: np.ndarray) -> np.ndarray:
    """t, by entries or by rows."""
    w = np.abs(weight) / math.sqrt(constants.eps)
    if isinstance(constants, EntryNormConstants):
        return w
    largest = np.maximum(w.max(axis=1, keepdims=True, initial=0.0), 1e-300)
    return largest * np.sqrt(np.square(w / largest).sum(axis=1, keepdims=True))


def _entry_profile(t: np.ndarray) -> np.ndarray:
    return 3.0 * t * np.hypot(1.0, t) ** -5


def _row_profile(t: np.ndarray) -> np.ndarray:
    far = TWO_OVER_ROOT_3 * np.hypot(1.0, t) ** -2
    return np.where(np.square(t) <= 0.5, _entry_profile(t), far)


class _Lengths:
    """What a ball around w leaves of L(w), |w| and rho = (eps + L^2)^(-1/2): the least L, the largest of each."""

    def __init__(self, constants: SchattenNormConstants, weight: np.ndarray, effective: np.ndarray, radius: float) -> None:
        length = float(np.linalg.norm(weight)) * MARGIN
        self.longest = length + radius
        error = MARGIN - 1.0 + constants.length_allowance(max(weight.shape))  # of rho, relatively
        rho = float(np.linalg.norm(effective)) / (constants.gain * length) if length > 0.0 else constants.eps**-0.5
        squared = rho**-2 - constants.eps if rho > 1e-150 else math.inf
        slack = 4.0 * error * (squared + constants.eps) if math.isfinite(squared) else 0.0
        least = math.sqrt(max(squared - slack, 0.0)) if math.isfinite(squared) else 0.0
        most = min(math.sqrt(max(squared + slack, 0.0)), constants.beta * length)
        self.least_norm = max(least - constants.beta * radius, 0.0)
        self.largest_norm = most + constants.beta * radius
        self.rho = (constants.eps + self.least_norm**2) ** -0.5 * MARGIN


def _schatten_slope(constants: SchattenNormConstants, at: _Lengths) -> float:
    """gain rho z, z the largest root for the largest |x| |y| and the least a."""
    if math.isinf(at.longest):
        return constants.slope_supremum
    product = at.rho**2 * at.longest * constants.beta * at.largest_norm
    a_least = at.least_norm**2 / (constants.eps + at.least_norm**2)
    product = max(min(product, constants.tau * at.largest_norm**2 / (constants.eps + at.largest_norm**2)), a_least)
    z = 0.5 * (product + math.sqrt(product**2 + 4.0 * (1.0 - a_least)))
    return min(constants.gain * at.rho * max(z, 1.0) * MARGIN, constants.slope_supremum)


def _schatten_curvature(constants: SchattenNormConstants, at: _Lengths) -> float:
    if math.isinf(at.longest):
        return constants.slope_lipschitz
    if constants.power == 1:  # weight norm of beta w, all of it one row
        ends = np.array([at.least_norm, at.largest_norm]) / math.sqrt(constants.eps)
        worst = min(max(PEAK, ends[0] / MARGIN), ends[1] * MARGIN)
        steepest = float(_row_profile(np.array(worst)))
        return min(constants.gain * constants.beta / constants.eps * steepest * MARGIN, constants.slope_lipschitz)
    beta = constants.beta
    rate = 2.0 * beta * at.largest_norm + (2 * constants.power - 1) * beta**2 * at.longest
    return min(constants.gain * at.rho**3 * rate * MARGIN, constants.slope_lipschitz)
