r"""The step of gradient descent for which descent is proved from what is known at the present weights alone.

On the ray theta - h u g, u in [0, 1], the outputs are z(u) = p(u) + rho(u), p a polynomial with computed coefficients
and \|rho(u)\| <= E u^k. As gamma is convex and smooth,

    gamma(z) <= gamma(p) + <\|grad gamma(p)\|, E> u^k + (smoothness / 2) \|\|E\|\|^2 u^(2 k),

which is evaluated, not estimated, so the step that minimises it is chosen and its loss is known before it is taken.
The inner product is at most \|\|grad gamma(p)\|\| \|\|E\|\|, and that is taken where only the norm of E is known.
The rounding of z(0) = p(0) and of gamma is proved where the layers have rules (``Problem.outputs_error``); that of p's
coefficients and of E is assumed, 2^-40 of their sizes. Two ways to p and E: Taylor models of the network along the ray
(k = 3, or 2 where a layer has no third derivative), and, where a layer has none, DF g with the second
derivative bounded on the ball that the step can reach, \|rho(u)\| <= v^T Q v u^2 / 2 with v the norms of the
parameters' moves (k = 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CertificateError, UnboundedError
from .problem import Problem
from .ray import Ray
from .regularity import PreparedNetwork

TRIES = 8  # lengths of the ray; each is one model of it
GRID = 32
GROWTH = 1.5  # of a ray that ends before its best u
ROUNDING = 2.0**-40  # of p and E: what float64 can have lost in their coefficients, assumed, with a wide margin


@dataclass(frozen=True)
class Step:
    """A step size, the loss now (at least, in float64's rounding) and the loss after it at most; ``way``: "ray" or "ball"."""

    step_size: float
    loss: float
    loss_at_most: float
    way: str
    infimum: float = 0.0

    @property
    def rate(self) -> float:
        """Excess after over excess before, at most; 1 for no step."""
        return (self.loss_at_most - self.infimum) / (self.loss - self.infimum) if self.step_size > 0 else 1.0


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


def certified_step(problem: Problem, gradient: dict[str, Tensor], guess: float | None = None) -> Step:
    """The step along -gradient whose proved loss is least, near ``guess``; 0 where no descent is proved.

    Shape:
        gradient: a tensor for each trained parameter, by name; any direction will do, the proof is of that one.
    Cost:
        At most TRIES + 1 models of the ray: a dozen forward passes each, or one ball of ``PreparedNetwork``.
    Raises:
        CertificateError: some layer has neither a Taylor rule nor bounds of its derivatives.
    """
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))
    now = problem.loss_at_least
    if norm == 0.0 or now <= problem.cost.infimum:
        return Step(0.0, now, problem.initial_loss, "none", problem.cost.infimum)
    model, way = _modeller(problem, gradient)
    length = guess if guess else _first_guess(problem, gradient, norm)
    least = lambda length: _least(problem, model(length))
    bound, size = _search(least, length, now)
    if not guess and size > 0.0:  # the first steps are the shortest, and later searches start from here
        longer = math.sqrt(GROWTH) * size
        u, further = least(longer)
        bound, size = min((bound, size), (further, u * longer))
    return Step(size, now, bound if size > 0 else problem.initial_loss, way, problem.cost.infimum)


def _search(least: Callable[[float], tuple[float, float]], length: float, now: float) -> tuple[float, float]:
    """The least bound below ``now`` and its step, from rays whose best u is within and not far from their end."""
    best, reached = (now, 0.0), False
    for _ in range(TRIES):
        u, bound = least(length)
        better = bound < best[0]
        if better:
            best = (bound, u * length)
        if u >= 0.9 and better:
            length, reached = GROWTH * length, True
        elif u < 0.45 and not reached:
            length *= max(1.6 * u, 0.05)
        else:
            break
    return best


def gradient_of(problem: Problem) -> dict[str, Tensor]:
    """The gradient of the loss over all samples, by the name of each trained parameter."""
    parameters = problem.parameters
    with torch.enable_grad():
        loss = problem.cost.value(problem.model(problem.inputs), problem.targets)
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(parameters.items(), found)}


def _modeller(problem: Problem, gradient: dict[str, Tensor]) -> tuple[Callable[[float], Model], str]:
    try:
        ray = Ray(problem.model, problem.inputs)
    except UnboundedError:
        return _ball_model(problem, gradient), "ball"

    def along(length: float) -> Model:
        outputs = ray.along({name: -length * g for name, g in gradient.items()})
        slack = (problem.outputs_error or 0.0) + ROUNDING * float(outputs.size.norm())
        coefficients = (outputs.c0, outputs.c1, outputs.c2)[: ray.order]
        return Model(coefficients, float(outputs.r.norm()) * (1 + ROUNDING), ray.order, slack, outputs.r)

    return along, "ray"


def _ball_model(problem: Problem, gradient: dict[str, Tensor]) -> Callable[[float], Model]:
    moved = {name: problem.parameters[name].detach() for name in gradient}
    start, slope = torch.func.jvp(problem.outputs_at, (moved,), (gradient,))

    try:
        prepared = PreparedNetwork(problem.model, problem.inputs)
    except UnboundedError as error:
        raise CertificateError(f"certified descent: no step is proved for this network. {error}") from error

    def along(length: float) -> Model:
        norms = {name: length * float(g.norm()) * (1 + ROUNDING) for name, g in gradient.items()}
        found = prepared.on_ball(math.sqrt(sum(n * n for n in norms.values())) * (1 + ROUNDING))
        v = torch.tensor([norms[path] for path in found.paths], dtype=torch.float64)
        bent = float(v @ torch.from_numpy(found.Q) @ v) / 2
        if not math.isfinite(bent) and not math.isfinite(prepared.on_ball(0.0).jacobian_lipschitz):
            raise CertificateError(
                "certified descent: no step is proved for this network, since the slope of one of its layers jumps. Use "
                "smooth activations (SmoothReLU, Softplus0, GELU1, Tanh) in place of ReLU and max pooling."
            )
        slack = (problem.outputs_error or 0.0) + ROUNDING * float(start.norm() + length * slope.norm())
        return Model((start, -length * slope), bent * (1 + ROUNDING), 2, slack)

    return along


def _first_guess(problem: Problem, gradient: dict[str, Tensor], norm: float) -> float:
    """The step that would be best if the outputs moved in a straight line: |g|^2 / (smoothness |DF g|^2)."""
    moved = {name: problem.parameters[name].detach() for name in gradient}
    _, slope = torch.func.jvp(problem.outputs_at, (moved,), (gradient,))
    speed = float(slope.square().sum())
    return norm**2 / (problem.cost.smoothness * speed) if speed > 0 else 1.0 / norm


def _least(problem: Problem, model: Model) -> tuple[float, float]:
    """The u in (0, 1] with the least bound of the loss, and that bound."""
    values = [(_loss_at_most(problem, model, k / GRID), k / GRID) for k in range(1, GRID + 1)]
    bound, u = min(values)
    return (u, bound) if math.isfinite(bound) else (1 / GRID, math.inf)


def _loss_at_most(problem: Problem, model: Model, u: float) -> float:
    cost, c = problem.cost, model.coefficients
    outputs = c[0] + u * (c[1] if len(c) == 2 else c[1] + u * c[2])
    loss = float(cost.value(outputs, problem.targets))
    if not math.isfinite(loss):
        return math.inf
    rest = model.remainder * u**model.order
    own = cost.rounding_at_most(outputs, problem.targets, loss)
    error, gradient = rest + model.slack, cost.gradient_at_most(max(loss - cost.infimum, 0.0) + own)
    rise = gradient * rest
    if model.entries is not None and math.isfinite(rest):
        rise = min(rise, _along_gradient(problem, model, outputs) * u**model.order + ROUNDING * rise)
    rise += gradient * model.slack + 0.5 * cost.smoothness * error * error + own
    bound = (loss + rise) * (1 + ROUNDING) + ROUNDING * abs(loss)
    return bound if math.isfinite(bound) else math.inf


def _along_gradient(problem: Problem, model: Model, outputs: Tensor) -> float:
    r"""<\|grad gamma\|, E> at these outputs; their rounding moves the gradient by at most smoothness * slack."""
    with torch.enable_grad():
        z = outputs.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(problem.cost.value(z, problem.targets), z)
    paired = float((gradient.abs() * model.entries).sum()) * (1 + ROUNDING)
    return paired + problem.cost.smoothness * model.slack * model.remainder
