r"""How far float64 takes the outputs' Taylor model from the exact network: \|\|z(u) - p(u) - rho(u)\|\| <= e for all u in [0, 1].

By induction over the steps let x(u) = p(u) + rho(u) + eps(u), exact, with p the polynomial of the floats c_0, c_1, c_2, \|rho(u)\| <= r u^k
entry by entry, and \|\|eps(u)\|\| <= e, all samples together. For y = f(x)

    f(p + rho + eps) = f(p + rho) + at most L e,   L >= Lip f,

and the Taylor rules are of f(p + rho): they hold at each u for any function within r of a polynomial, and p's coefficients are floats, so
exact. What their own evaluation rounds is all that is added. With s = \|c_0\| + \|c_1\| + \|c_2\| + r, at least \|p + rho\|:

* sums and fixed linear maps: what ``kernel_error`` has for a value, of \|\|s\|\|;
* affine: gamma_n \|\| \|W\| \|x\| + \|b\| \|\|, of sizes; W(u) is off by w (``weight_rounding``), which makes g w \|\|s\|\|, and L is at
  most \|\|W *\|\| + g (\|\|W(u) - W\|\|_F + w), g how often one pixel is used, rooted;
* phi: phi, phi' and phi'' as computed are off by v, v' and v'', which with the reach t = s - \|c_0\| make v + 3 v' t + 2 v'' t^2 (each
  of the two forms of the rest has a phi' and a phi'' of its own); products a few units of themselves; L = sup \|phi'\|.

r itself is a sum of products of numbers that are not negative, and each step puts ``UP`` on it, above the rounding of 2^30 terms. What
underflows is within ``LOST`` of each step, as in ``kernel_error``, whose assumptions these are, powers being elementary functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ...errors import UnboundedError
from ..kernel_error.activations import past_threshold, rounded
from ..kernel_error.affine import AffineRounding, weight_error
from ..kernel_error.states import LOST, UP, U, gamma
from ..regularity.affine import Affine
from ..regularity.elementwise import Elementwise
from ..regularity.graph import Node
from ..regularity.patches import applied
from ..regularity.steps import FixedLinear, Input, Sum
from .followed import Followed
from .seconds import second_of
from .taylor import Taylor
from .weight_rounding import norm, stored, weight_error_along

QUICK = AffineRounding(quick=True)


def outputs_rounding(nodes: Sequence[Node], found: Followed) -> float:
    """e of the last step, and the rounding of its polynomial at any u.

    Cost:
        A forward pass or two, and a proved norm of each weight as a matrix, once for these weights.
    Raises:
        UnboundedError: a step has no rule, by its path.
    """
    errors: list[float] = []
    for index, node in enumerate(nodes):
        errors.append(_error(nodes, found, index, [errors[i] for i in node.inputs]))
    outputs = found.models[-1]
    error = errors[-1] + 8 * U * norm(outputs.size)
    return error * UP if math.isfinite(error) else math.inf


def _error(nodes: Sequence[Node], found: Followed, index: int, errors: list[float]) -> float:
    node = nodes[index]
    step, inputs = node.step, [found.models[i] for i in node.inputs]
    if isinstance(step, Input):
        return 0.0
    if isinstance(step, Sum):
        own = (2 * len(step.scales) + 6) * U
        return sum(abs(s) * (e + own * norm(x.size)) for s, e, x in zip(step.scales, errors, inputs)) * UP + LOST
    if isinstance(step, FixedLinear):
        return (step.norm * errors[0] + 2 * step.rounding * norm(inputs[0].size)) * UP + LOST
    if isinstance(step, Elementwise):
        return _elementwise(step, inputs[0], errors[0])
    if isinstance(step, Affine):
        return _affine(step, node.value, inputs[0], errors[0], found, index)
    raise UnboundedError(f"{step.path or 'the model'}: nothing bounds the rounding of {step.kind} along a ray.")


def _elementwise(step: Elementwise, x: Taylor, error: float) -> float:
    own, (first, second), reach = rounded(step), step._derivatives(x.c0), x.reach
    size = x.c0.abs()
    off = U * (own.value_slope * size + own.value) + 3 * U * own.slope_error(size) * reach
    formula = second_of(step)
    if formula is not None:
        second = formula.formula(x.c0)
        off = off + 2 * U * formula.units * reach.square()
    elif step.phi.jerk < math.inf:
        raise UnboundedError(f"{step.path}: nothing bounds the rounding of the second derivative of {step.kind}.")
    moved = x.c1.abs() + x.c2.abs()
    off = off + 8 * U * (first.abs() * moved + second.abs() * x.c1.square())
    rounding = norm(off)
    past = past_threshold(step, x.c0, reach + error)
    if past is not None:
        rounding += norm(past) / (4.0 * step.phi.curvature)
    return (step.phi.slope * error + rounding) * UP + LOST


def _affine(step: Affine, value: Tensor, x: Taylor, error: float, found: Followed, index: int) -> float:
    weight, growth, size = step.weight.abs(), step.growth, x.size
    if index in found.weights:
        model, w, d = found.weights[index]
        weight = weight + (model.c1.abs() + model.c2.abs() + model.r).reshape(weight.shape)
        turned, off = norm(model.reach), weight_error_along(step, model, w, d)
    else:
        turned, off = 0.0, weight_error(step) * step.length
    bias = None if step.bias is None else step.bias.abs()
    shifted = 0.0
    if index in found.shifts:
        shift = found.shifts[index]
        bias = bias + shift.abs()
        shifted = math.sqrt(value.numel() / len(shift)) * norm(stored(step.bias, shift))
    own = gamma(step.free.shape[1] + 16) * norm(applied(step.module, weight, size, bias))
    carried = QUICK.carried(step, error) + growth * (turned + off) * error
    return (carried + growth * off * norm(size) + own + shifted) * UP + LOST
