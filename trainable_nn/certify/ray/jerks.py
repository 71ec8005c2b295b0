r"""sup \|phi'''\| where an entry can be, for the activations whose third derivative has a formula.

\|phi'''\| is even for each of them and has its maxima at 0 and at its ``PEAKS`` alone, so on a range of \|z\| it is
largest at an end or at a peak within. phi.jerk, the largest of all, is for tanh reached at 0 alone.

Rounding, counted as in ``seconds``: up to |z| = 40 each formula errs by less than 2^12 u, silu's by 120 u + 60 u |z| and the others by
300 u; further out silu's falls below the truth by no more than the truth, 40 e^-40 < u. ``MARGIN`` is 2^17 u of a jerk of 0.09, the
least there is, and the range is widened by the rounding of its ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...theory.nonlinearities import GELU_TO_SLOPE_1, SILU_TO_SLOPE_1
from ..kernel_error.states import UP
from ..regularity.elementwise import Elementwise

MARGIN = 2.0**-32  # of the jerk: above the rounding of the formulas, where their terms cancel
ENDS = 2.0**-50  # of the centre: the rounding of its sum with the reach
FARTHEST = 1e3  # beyond the last peak of each, so values further out are smaller


def largest_jerk(step: Elementwise, centre: Tensor, reach: Tensor) -> Tensor | float:
    r"""At least \|phi'''(z)\| for \|z - centre\| <= reach, entry by entry; phi.jerk where no formula is known."""
    if step.kind not in THIRD:
        return step.phi.jerk
    third, peaks = THIRD[step.kind], PEAKS[step.kind]
    reach = reach * UP + ENDS * centre.abs()
    low, high = (centre.abs() - reach).clamp(0.0, FARTHEST), (centre.abs() + reach).clamp_max(FARTHEST)
    most = torch.maximum(third(low).abs(), third(high).abs())
    for peak in peaks:
        top = abs(float(third(torch.tensor(peak, dtype=centre.dtype))))
        within = (low <= peak * (1 + MARGIN)) & (high >= peak * (1 - MARGIN))
        most = torch.where(within, most.clamp_min(top), most)
    jerk = step.phi.jerk
    return torch.nan_to_num(most * (1 + MARGIN) + MARGIN * jerk, nan=jerk).clamp_max(jerk)


def _tanh(z: Tensor) -> Tensor:
    s = torch.tanh(z).square()
    return 2.0 * (1.0 - s) * (1.0 - 3.0 * s)


def _softplus(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1.0 - s) * (1.0 - 2.0 * s)


def _sigmoid(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    p = s * (1.0 - s)
    return p * (1.0 - 6.0 * p)


def _silu(z: Tensor) -> Tensor:
    return 3.0 * _softplus(z) + z * _sigmoid(z)


def _gelu(z: Tensor) -> Tensor:
    square = z.square()
    return z * (square - 4.0) * torch.exp(-0.5 * square) / math.sqrt(2.0 * math.pi)


THIRD: dict[str, Callable[[Tensor], Tensor]] = {
    "Tanh": _tanh,
    "Sigmoid": _sigmoid,
    "Softplus0": _softplus,
    "SiLU": _silu,
    "SiLU1": lambda z: SILU_TO_SLOPE_1 * _silu(z),
    "GELU1": lambda z: GELU_TO_SLOPE_1 * _gelu(z),
    "Erf1": lambda z: (4.0 * z.square() - 2.0) * torch.exp(-z.square()),
    "Arctan": lambda z: (6.0 * z.square() - 2.0) * (1.0 + z.square()) ** -3.0,
    "ISRU": lambda z: (12.0 * z.square() - 3.0) * (1.0 + z.square()) ** -3.5,
    "SmoothReLU": lambda z: 1.5 * z * (1.0 + z.square()) ** -2.5,
}
PEAKS: dict[str, tuple[float, ...]] = {  # the positive zeros of phi''''
    "Tanh": (1.1462158347805888,),  # tanh^2 = 2 / 3
    "Sigmoid": (2.2924316695611777,),  # twice that
    "Softplus0": (1.3169578969248167,),  # ln(2 + sqrt 3)
    "SiLU": (1.0319582417807491, 4.429235100557228),
    "SiLU1": (1.0319582417807491, 4.429235100557228),
    "GELU1": (0.7922869913932613, 2.5243377989621386),  # z^2 = (7 -+ sqrt 33) / 2
    "Erf1": (1.224744871391589,),  # z^2 = 3 / 2
    "Arctan": (1.0,),
    "ISRU": (0.8660254037844386,),  # z^2 = 3 / 4
    "SmoothReLU": (0.5,),
}
