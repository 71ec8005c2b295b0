r"""P(w + u d) as a Taylor model in u, for each normalisation P.

r is an upper bound but for factors like ``UP`` that whoever uses it puts on; where signs meet in it, their sum's rounding is in it. That
of the coefficients is ``weight_rounding``'s.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from ... import functional
from ...theory.parameterisation_balls import IdentityConstants
from ...theory.parameterisations import EntryNormConstants, WeightNormConstants
from ...theory.schatten import SchattenNormConstants
from ..kernel_error.states import UP, U
from ..regularity.affine import Affine
from .taylor import Taylor, composed, composed_to_second, line, product

SIGNS = 2.0**-48  # of the sizes in a sum of a few signed numbers: above its rounding
LENGTH = 2.0**-30  # of a Schatten norm: what its computation errs, at least
TINY = 1e-30  # eps of a normalisation that shall have none


def order_of(constants: object) -> int:
    """To which order there is a rule; 0 for none."""
    orders = {IdentityConstants: 3, EntryNormConstants: 3, WeightNormConstants: 3, SchattenNormConstants: 2}
    return orders.get(type(constants), 0)


def weight_along(step: Affine, module: nn.Module, w: Tensor, d: Tensor, order: int) -> Taylor:
    """The model for a matrix w (rows, columns) moved by d, with P(w) as the step has it; ``module`` is the layer."""
    found = _weight_along(step, module, w, d, order)
    return replace(found, c0=step.weight.reshape(w.shape), r=found.r * UP)


def _weight_along(step: Affine, module: nn.Module, w: Tensor, d: Tensor, order: int) -> Taylor:
    constants = step.options
    if isinstance(constants, EntryNormConstants):
        return _entries(constants, w, d, order)
    if isinstance(constants, WeightNormConstants):
        return _rows(constants, w, d, order)
    if isinstance(constants, SchattenNormConstants):
        return _schatten(step, module, w, d)
    return line(w, d)


def _entries(constants: EntryNormConstants, w: Tensor, d: Tensor, order: int) -> Taylor:
    r"""gain w (eps + w^2)^(-1/2) + leak w.

    With s = eps + w^2: en' = eps s^(-3/2), en'' = -3 eps w s^(-5/2), en''' = -3 eps (eps - 4 w^2) s^(-7/2). On the
    segment \|eps - 4 w^2\| is largest at an end of \|w\|'s range, and the powers of s at the lower one.
    """
    eps, gain = constants.eps, constants.gain
    low, high = segment(w, d)
    s = eps + w.square()
    value, first, second = gain * w * s**-0.5, gain * eps * s**-1.5, -3 * gain * eps * w * s**-2.5
    if order == 2:
        normalised = composed_to_second(line(w, d), value, first, 3 * gain * eps * high.sqrt() * (eps + low) ** -2.5)
    else:
        worst = torch.maximum((eps - 4 * low).abs(), (eps - 4 * high).abs()) + SIGNS * (eps + 4 * high)
        normalised = composed(line(w, d), value, first, second, 3 * gain * eps * worst * (eps + low) ** -3.5)
    return normalised if constants.leak == 0 else normalised.plus(line(constants.leak * w, constants.leak * d))


def segment(w: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest square of w + u d."""
    end = w + d
    crosses = (w.sign() * end.sign()) < 0
    low = torch.where(crosses, torch.zeros_like(w), torch.minimum(w.abs(), end.abs())).square()
    return low, torch.maximum(w.abs(), end.abs()).square()


def _rows(constants: WeightNormConstants, w: Tensor, d: Tensor, order: int) -> Taylor:
    """gain w q^(-1/2) by rows, with q(u) = eps + |w + u d|^2 = q_0 + q_1 u + q_2 u^2.

    psi = q^(-1/2) has second derivative psi'' q'^2 + psi' q'' and third psi''' q'^3 + 3 psi'' q' q'' in u, with
    psi' = -1/2 q^(-3/2), psi'' = 3/4 q^(-5/2), psi''' = -15/8 q^(-7/2) at the least q of the segment.
    """
    q0 = constants.eps + w.square().sum(1, keepdim=True)
    q1, q2 = 2 * (w * d).sum(1, keepdim=True), d.square().sum(1, keepdim=True)
    least = least_row(constants, w, d)
    speed = torch.maximum(q1.abs(), (q1 + 2 * q2).abs()) + _lost(w) * (q0 + 2 * q2)
    first, second = -0.5 * q0**-1.5, 0.75 * q0**-2.5
    if order == 2:
        rest = (0.75 * least**-2.5 * speed**2 + least**-1.5 * q2) / 2
        scale = Taylor(q0**-0.5, first * q1, torch.zeros_like(q0), rest)
    else:
        rest = (15 / 8 * least**-3.5 * speed**3 + 3 * 0.75 * least**-2.5 * speed * 2 * q2) / 6
        scale = Taylor(q0**-0.5, first * q1, first * q2 + 0.5 * second * q1.square(), rest)
    return product(scale, line(constants.gain * w, constants.gain * d), torch.mul, order)


def least_row(constants: WeightNormConstants, w: Tensor, d: Tensor) -> Tensor:
    """At most q(u) of each row.

    At a place that is off by e the parabola is q_2 e^2 above its least, and the place is off by 2 gamma_n |w| / |d|: less than what
    the sums lose.
    """
    q0 = constants.eps + w.square().sum(1, keepdim=True)
    q1, q2 = 2 * (w * d).sum(1, keepdim=True), d.square().sum(1, keepdim=True)
    where = torch.where(q2 > 0, (-q1 / (2 * q2.clamp_min(1e-300))).clamp(0.0, 1.0), torch.zeros_like(q1))
    lost = _lost(w) * (q0 + q2)
    return (q0 + where * (q1 + where * q2) - lost).clamp_min(constants.eps) * (1 - 2.0**-50)


def _lost(w: Tensor) -> float:
    """Of q_0 + q_2, which are at least |q_1|: what a sum over a row and a few more may lose."""
    return 8 * (w.shape[1] + 16) * U


def _schatten(step: Affine, module: nn.Module, w: Tensor, d: Tensor) -> Taylor:
    r"""gain w rho with rho = q^(-1/2), q(u) = eps + L(w + u d)^2, group by group, to order 2.

    L is a norm, so on the segment \|L - L(w)\| <= L(d) and \|q'\| <= 2 L L(d). As L^2 / 2 is convex and (2 p - 1)-smooth in
    its own norm, 0 <= q'' <= 2 (2 p - 1) L(d)^2, so rho'' = 3/4 q^(-5/2) q'^2 - q^(-3/2) q'' / 2 lies between
    -(2 p - 1) q^(-3/2) L(d)^2 and 3 q^(-5/2) L^2 L(d)^2. P'' = gain (rho'' (w + u d) + 2 rho' d).

    P'(w) d from the gradient v = P'(w)^T w, whose rounding is known: P'(w) d = gain rho d - gain rho^3 <q, d> w, q = grad L^2 / 2, and
    gain rho w - v = gain rho^3 \|w\|^2 q.

    Source:
        Ball, Carlen and Lieb (1994), theorem 1, as in ``theory.schatten``.
    """
    options = module._norm_options()
    groups, shape = options["groups"], step.weight.shape

    def by_rows(each: Tensor) -> Tensor:
        return each.repeat_interleave(len(w) // groups)[:, None]

    def length(v: Tensor) -> Tensor:
        return by_rows(_length(v.reshape(shape), module.power, options))

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).reshape(groups, -1).sum(1)

    def normalised(v: Tensor) -> Tensor:
        return functional.schatten_norm(v.reshape(shape), module.eps, module.power, **options).reshape(w.shape)

    allowed = step.options.rounding_allowance(max(len(w) // groups, w.shape[1]), U)
    err = 1 + LENGTH + 4 * (allowed + (w.numel() + 16) * U)
    start, moved = length(w), length(d) * err
    most, least = (start + moved) * err, (start / err - moved - math.sqrt(TINY)).clamp_min(0.0)
    q = module.eps + least.square()
    slope = q**-1.5 * most * moved
    bend = torch.maximum((2 * module.power - 1) * q**-1.5 * moved.square(), 3 * q**-2.5 * (most * moved).square())
    value, pull = torch.func.vjp(normalised, w)
    square = inner(w, w)
    scale = torch.where(square > 0, inner(value, w) / square, options["gain"] * module.eps**-0.5)
    turned = torch.where(square > 0, inner(value - pull(w)[0], d) / square, 0.0)
    first = by_rows(scale) * d - by_rows(turned) * w
    rest = options["gain"] * 0.5 * (bend * (w.abs() + d.abs()) + 2 * slope * d.abs())
    return Taylor(value, first, torch.zeros_like(value), rest)


def _length(v: Tensor, power: int, options: dict) -> Tensor:
    """L of each group: P with a vanishing eps is gain v / L(v)."""
    groups, gain = options["groups"], options["gain"]
    unit = functional.schatten_norm(v, TINY, power, **options).reshape(groups, -1)
    sizes = torch.linalg.vector_norm(v.reshape(groups, -1), dim=1)
    shrunk = torch.linalg.vector_norm(unit, dim=1)
    return torch.where(sizes > 0, gain * sizes / shrunk.clamp_min(1e-300), sizes)
