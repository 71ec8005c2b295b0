r"""The step of gradient descent for which descent is proved from what is known at the present weights alone.

On the ray theta - h u g, u in [0, 1], the outputs are z(u) = p(u) + rho(u), p a polynomial with computed coefficients
and \|rho(u)\| <= E u^k. ``loss_along`` bounds the loss from them, evaluated, not estimated, so the step that minimises it is chosen and
its loss is known before it is taken. Two ways to p and E: Taylor models of the network along the ray (k = 3, or 2 where a
layer has no third derivative), and, where a layer has none, DF g with the second derivative bounded on the ball that
the step can reach, \|rho(u)\| <= v^T Q v u^2 / 2 with v the norms of the parameters' moves (k = 2).

The statement is of the network in exact arithmetic, at the weights theta - h g and at all that float64 may store for them: within
4 u \|theta\| + 8 u h \|g\| of it, entry by entry, u = 2^-53; g is the gradient that is given, not the exact one. Rounding of p, of E and of the
loss is proved (``ray.rounding``, ``slope_along``) wherever the layers have rules and the cost states its own. Elsewhere it is assumed, 2^-40
of their sizes: for a layer without a rule, for many outputs by a ball, and where norms multiply until the bound says nothing. ``Step.rounding``
says which.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .entries import NO_ROUNDING
from .layers import sentence
from .outputs_along import WHERE, Along, along_of
from .problem import Problem, proved

TRIES = 8  # lengths of the ray; each is one model of it
GROWTH = 1.5  # of a ray that ends before its best u


@dataclass(frozen=True)
class Step:
    """A step size, the loss now (at least, in float64's rounding) and the loss after it at most; ``way``: "ray" or "ball".

    rounding: "proved", or "assumed" where the two losses rest on float64 losing less than 2^-40 of p and E; reason: why.
    """

    step_size: float
    loss: float
    loss_at_most: float
    way: str
    infimum: float = 0.0
    rounding: str = "assumed"
    reason: str = ""

    @property
    def rate(self) -> float:
        """Excess after over excess before, at most; 1 for no step."""
        return (self.loss_at_most - self.infimum) / (self.loss - self.infimum) if self.step_size > 0 else 1.0


@dataclass(frozen=True)
class _Found:
    """A step and the bound of the loss after it."""

    bound: float
    size: float = 0.0


def certified_step(problem: Problem, gradient: dict[str, Tensor], guess: float | None = None) -> Step:
    """The step along -gradient whose proved loss is least, near ``guess``; 0 where no descent is proved.

    Shape:
        gradient: a tensor for each trained parameter, by name; any direction will do, the proof is of that one.
    Cost:
        At most TRIES + 1 models of the ray: a dozen forward passes each, or one ball of ``PreparedNetwork``; and once a proved norm of
        each weight.
    Raises:
        CertificateError: some layer has neither a Taylor rule nor bounds of its derivatives.
    """
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))
    if norm == 0.0:
        return _no_step(problem)
    length = guess if guess else _first_guess(problem, gradient, norm)
    along = along_of(problem, gradient, length)
    if along.loss_at_least <= problem.cost.infimum:
        return _no_step(problem)
    found = _search(along, length)
    if not guess and found.size > 0.0:  # the first steps are the shortest, and later searches start from here
        longer = math.sqrt(GROWTH) * found.size
        u, bound = along.best(longer)
        found = min(found, _Found(bound, u * longer), key=lambda f: f.bound)
    bound = found.bound if found.size > 0.0 else along.loss_now_at_most
    rounding = "assumed" if along.reason else "proved"
    return Step(found.size, along.loss_at_least, bound, along.way, problem.cost.infimum, rounding, along.reason)


def _no_step(problem: Problem) -> Step:
    problem = proved(problem, WHERE)
    reason = sentence(problem.refused) if problem.refused else NO_ROUNDING if problem.cost.rounding is None else ""
    ends = problem.loss_at_least, problem.initial_loss, "none", problem.cost.infimum
    return Step(0.0, *ends, "assumed" if reason else "proved", reason)


def _search(along: Along, length: float) -> _Found:
    """The least bound below the loss now and its step, from rays whose best u is within and not far from their end."""
    best, reached = _Found(along.loss_at_least), False
    for _ in range(TRIES):
        u, bound = along.best(length)
        better = bound < best.bound
        if better:
            best = _Found(bound, u * length)
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


def _first_guess(problem: Problem, gradient: dict[str, Tensor], norm: float) -> float:
    """The step that would be best if the outputs moved in a straight line: |g|^2 / (smoothness |DF g|^2)."""
    moved = {name: problem.parameters[name].detach() for name in gradient}
    _, slope = torch.func.jvp(problem.outputs_at, (moved,), (gradient,))
    speed = float(slope.square().sum())
    return norm**2 / (problem.cost.smoothness * speed) if speed > 0 else 1.0 / norm
