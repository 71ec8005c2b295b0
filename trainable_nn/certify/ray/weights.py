r"""P(w + u d) as a Taylor model in u, for each normalisation P."""

from __future__ import annotations

import torch
from torch import Tensor

from ...theory.parameterisation_balls import IdentityConstants
from ...theory.parameterisations import EntryNormConstants, WeightNormConstants
from .taylor import Taylor, composed, line, product


def weight_along(constants: object, w: Tensor, d: Tensor) -> Taylor | None:
    """The model for a matrix w (rows, columns) moved by d; None for a P without a rule here."""
    if isinstance(constants, IdentityConstants):
        return line(w, d)
    if isinstance(constants, EntryNormConstants):
        return _entries(constants, w, d)
    if isinstance(constants, WeightNormConstants):
        return _rows(constants, w, d)
    return None


def _entries(constants: EntryNormConstants, w: Tensor, d: Tensor) -> Taylor:
    r"""gain w (eps + w^2)^(-1/2) + leak w.

    With s = eps + w^2: en' = eps s^(-3/2), en'' = -3 eps w s^(-5/2), en''' = -3 eps (eps - 4 w^2) s^(-7/2). On the
    segment \|eps - 4 w^2\| is largest at an end of \|w\|'s range, and s^(-7/2) at the lower one.
    """
    eps, gain = constants.eps, constants.gain
    end = w + d
    crosses = (w.sign() * end.sign()) < 0
    low = torch.where(crosses, torch.zeros_like(w), torch.minimum(w.abs(), end.abs())).square()
    high = torch.maximum(w.abs(), end.abs()).square()
    worst = torch.maximum((eps - 4 * low).abs(), (eps - 4 * high).abs())
    third = 3 * eps * worst * (eps + low) ** -3.5
    s = eps + w.square()
    value, first, second = w * s**-0.5, eps * s**-1.5, -3 * eps * w * s**-2.5
    normalised = composed(line(w, d), gain * value, gain * first, gain * second, gain * third)
    return normalised if constants.leak == 0 else normalised.plus(line(constants.leak * w, constants.leak * d))


def _rows(constants: WeightNormConstants, w: Tensor, d: Tensor) -> Taylor:
    """gain w q^(-1/2) by rows, with q(u) = eps + |w + u d|^2 = q_0 + q_1 u + q_2 u^2.

    q^(-1/2) has third derivative psi''' q'^3 + 3 psi'' q' q'' in u, with psi'' = 3/4 q^(-5/2), psi''' = -15/8 q^(-7/2)
    at the least q of the segment.
    """
    q0 = constants.eps + w.square().sum(1, keepdim=True)
    q1, q2 = 2 * (w * d).sum(1, keepdim=True), d.square().sum(1, keepdim=True)
    where = torch.where(q2 > 0, (-q1 / (2 * q2.clamp_min(1e-300))).clamp(0.0, 1.0), torch.zeros_like(q1))
    least = (q0 + where * (q1 + where * q2)).clamp_min(constants.eps) * (1 - 2.0**-40)
    speed = torch.maximum(q1.abs(), (q1 + 2 * q2).abs())
    rest = (15 / 8 * least**-3.5 * speed**3 + 3 * 0.75 * least**-2.5 * speed * 2 * q2) / 6
    first, second = -0.5 * q0**-1.5, 0.75 * q0**-2.5
    scale = Taylor(q0**-0.5, first * q1, first * q2 + 0.5 * second * q1.square(), rest)
    return product(scale, line(constants.gain * w, constants.gain * d), torch.mul)
