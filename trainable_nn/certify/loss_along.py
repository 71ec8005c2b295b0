r"""A bound of the loss along a ray, from the outputs' polynomial and what is left of them.

Let z(u) = p + rho + eps with p the floats that the polynomial has at u, \|rho\| <= E u^k entry by entry and \|\|eps\|\| <= slack. As gamma
is convex and smooth,

    gamma(z) <= gamma(p) + <\|grad gamma(p)\|, E> u^k + \|\|grad gamma(p)\|\| slack + (smoothness / 2) (\|\|E\|\| u^k + slack)^2,

where \|\|grad gamma\|\| is bounded by the loss, and gamma(p) errs by ``Cost.rounding``. The inner product is at most \|\|grad gamma(p)\|\| \|\|E\|\|,
and that is taken where only the norm of E is known, or where nothing bounds the rounding of a computed gradient. It is bounded for

    mse            2 (z - y) / M, three roundings: a relative error of 4 u
    cross entropy  (p - e_y) / N with p = exp(log p): log p errs by what a loss of one sample does (``theory.costs``), so p by as much of
                   itself and by 8 u, at most 1 / N of that together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..theory.costs import ENTRY, Cost
from .kernel_error.states import UP, U
from .problem import Problem

GRID = 32
ROUNDING = 2.0**-40  # of p and E, where it is assumed: what float64 can have lost in them, with a wide margin
SCALARS = 2.0**-40  # of a sum of a few numbers that are not negative: far above its rounding


@dataclass(frozen=True)
class Model:
    """The outputs along one ray: a polynomial with coefficients for powers of u, and E u^order + slack for rounding.

    remainder >= ||E||; entries is E, where it is known entry by entry. slack is a norm.
    """

    coefficients: tuple[Tensor, ...]
    remainder: float
    order: int
    slack: float
    entries: Tensor | None = None

    def at(self, u: float) -> Tensor:
        """The polynomial."""
        c = self.coefficients
        return c[0] + u * (c[1] if len(c) == 2 else c[1] + u * c[2])


def least(problem: Problem, model: Model) -> tuple[float, float]:
    """The u in (0, 1] with the least bound of the loss, and that bound."""
    values = [(loss_at_most(problem, model, k / GRID), k / GRID) for k in range(1, GRID + 1)]
    bound, u = min(values)
    return (u, bound) if math.isfinite(bound) else (1 / GRID, math.inf)


def loss_at_most(problem: Problem, model: Model, u: float) -> float:
    cost, outputs = problem.cost, model.at(u)
    loss = float(cost.value(outputs, problem.targets))
    if not math.isfinite(loss):
        return math.inf
    power = u**model.order
    rest = model.remainder * power
    own = cost.rounding_at_most(outputs, problem.targets, loss)
    error, gradient = rest + model.slack, cost.gradient_at_most(max(loss - cost.infimum, 0.0) + own)
    rise = gradient * rest
    if model.entries is not None and math.isfinite(rest):
        rise = min(rise, _along_gradient(problem, model.entries, outputs) * power)
    rise += gradient * model.slack + 0.5 * cost.smoothness * error * error + own
    bound = loss + rise + SCALARS * (abs(loss) * 2.0**-8 + rise)
    return bound if math.isfinite(bound) else math.inf


def _along_gradient(problem: Problem, entries: Tensor, outputs: Tensor) -> float:
    r"""At least <\|grad gamma\|, E> at these outputs; infinite where nothing bounds the rounding of this gradient."""
    off = _gradient_error(problem.cost, outputs, problem.targets)
    if off is None:
        return math.inf
    with torch.enable_grad():
        z = outputs.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(problem.cost.value(z, problem.targets), z)
    return float(((gradient.abs() + off) * entries).sum()) * UP


def _gradient_error(cost: Cost, outputs: Tensor, targets: Tensor) -> float | None:
    """Of an entry of the computed gradient beyond a few units of itself; where the cost's own rounding is assumed, this is, too."""
    if cost.value is F.cross_entropy:
        each = 2 * outputs.shape[1] + ENTRY * (1.0 + float(outputs.abs().max()) + math.log(outputs.shape[1])) + 16
        return each * U * UP / targets.numel()
    if cost.value is F.mse_loss:
        return 2.0**-1000
    return 0.0 if cost.rounding is None else None
