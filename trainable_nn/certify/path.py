r"""A constant step proved from any start: gradient descent is run, its loss watched, and a ball closed where it arrives.

No ball around the first weights closes at a useful step: with lambda and Lip(DF) of that point alone, the path may be
longer than any ball on which DF keeps its rank. But the path can be followed. Let theta_0, ..., theta_T be the weights
that float64 computes, each from the one before by theta - eta grad l. Then

* at each of them the loss is enclosed, rounding included, so that its fall from one to the next is proved by the two
  numbers, whatever it does in between; the rounding of the outputs is proved on balls of weights (``OutputsAlong``), at the cost
  of a distance for each step and of a few walks for the whole path, and assumed where a layer has no rule, as the arrival's row says;
* at theta_T the loss is low enough that a ball closes for this very eta (``theory.pl.descend_with``): from there
  gradient descent with the same step, in exact arithmetic, never leaves the ball and converges to a global minimum.

It is a statement of these weights, not of the path that exact arithmetic would take from theta_0: rounding parts the
two, and no bound of how far is given here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..modules.residual import LASTING, slack_of
from ..theory.costs import Cost
from ..theory.rounding import up
from .ball import HELD, SHORT, SLACK
from .certificate import Certificate
from .entries import LOSS_PROVED, loss_note, loss_row
from .kernel_error import OutputsAlong
from .measure import BUDGET, Watch
from .path_certificate import PathCertificate
from .problem import Problem, loss_between, problem_of
from .prove import prove
from .step import gradient_of

STEPS = 10_000
BALLS = 16  # looked for on one path, at most
HALVINGS = 10  # of a step that was not given
NEXT_BALL = (1e-3, 0.5)  # how much lower the excess is before a ball is looked for again: at least, at most
TOO_HIGH = 0.03  # the same where eta L was 2 or more on the ball that was needed
PRODUCTS = 12  # of the power iteration for the first step; a guess, and the walk judges it
LENGTHS = 1 + 2.0**-30  # rounding of a norm and of a sum of them
WHERE = "certify_path"


def certify_path(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    loss: str | Cost = "mse",
    step_size: float | None = None,
    steps: int = STEPS,
    budget: int | None = None,
    progress: Watch | None = None,
) -> PathCertificate:
    r"""A constant step of plain gradient descent, with a proof that it reaches a global minimum from these weights.

    The descent is run in float64 on a copy, until a ball closes around the weights it has reached. Grade "ball" says:
    of the weights theta_0, ..., theta_T that float64 computes with this step, each has a lower loss than the one before,
    and from theta_T on gradient descent with the same step stays in a ball and converges, linearly, to a global minimum.
    The T steps are those that torch.optim.SGD takes in float64 on all samples; a run that rounds otherwise is another
    path, which certify_path(..., steps=0) answers at its end. Without ``step_size`` the first step tried is about
    1 / lambda_max of the loss's Gauss-Newton matrix, and half of it wherever the loss rises.

    Not covered: mini-batches, momentum, weight decay, changing data; rounding after theta_T.

    Shape:
        inputs: (N, ...), floats. targets: what the loss takes.
    Units:
        loss, budget: as in ``certify``. steps: how many may be run.
    Cost:
        A gradient in float64 for each step, and a ``certify`` for each ball that is looked for, some two to five.
    Raises:
        TypeError, ValueError: as ``certify``; no targets; a step or a number of steps that is none.
        CertificateError: the model does not run on a copy in float64.
    Source:
        THEORY 4; II.4.1 item 5. The statement on the ball is Proposition R (II.1.8) with eta L < 2.
    """
    _check(targets, step_size, steps, budget)
    watch = progress or (lambda what, done, total: None)
    budget = BUDGET if budget is None else int(budget)
    read = lambda: problem_of(model, inputs, targets, loss, where=WHERE)
    with torch.random.fork_rng(devices=[]):
        problem = read()
        if step_size is not None:
            return walk(problem, float(step_size), steps, budget, watch)
        step = _first_step(problem)
        for _ in range(HALVINGS):
            found = walk(problem, step, steps, budget, watch)
            if not found.too_long:
                return found
            step, problem = step / 2.0, read()  # a walk moves the problem's weights
        return found


def _check(targets: Tensor, step_size: float | None, steps: int, budget: int | None) -> None:
    if targets is None:
        raise TypeError(f"{WHERE}: targets are needed, since a path is of one loss. Give them, or use certify.")
    if step_size is not None and not 0.0 < step_size < math.inf:
        raise ValueError(f"{WHERE}: step_size must be positive and finite, got {step_size}. Leave it out for a guess.")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"{WHERE}: steps must be a whole number of at least 0, got {steps!r}. Give one.")
    if budget is not None and budget < 1:
        raise ValueError(f"{WHERE}: budget must be a positive number of bytes, got {budget}. Leave it out for 1 GiB.")


def _first_step(problem: Problem) -> float:
    """About 1 / (smoothness lambda_max(DF DF^T)), by power iteration: an estimate, from which the search begins."""
    moved = {name: p.detach() for name, p in problem.parameters.items()}
    v, largest = gradient_of(problem), 0.0
    for _ in range(PRODUCTS):
        norm = math.sqrt(sum(float(x.square().sum()) for x in v.values()))
        if not 0.0 < norm < math.inf:
            break
        _, image = torch.func.jvp(problem.outputs_at, (moved,), ({name: x / norm for name, x in v.items()},))
        largest = max(largest, float(image.square().sum()))
        (v,) = torch.func.vjp(problem.outputs_at, moved)[1](image)
    return 1.0 / (problem.cost.smoothness * largest) if largest > 0.0 else 1.0


def walk(problem: Problem, step: float, most: int, budget: int, watch: Watch, first: int = 0) -> PathCertificate:
    """Steps of gradient descent on the problem's own weights, until a ball closes or it is clear that none will.

    No ball is looked for before the step ``first``.
    """
    problem.known.clear()  # of weights that move from here on
    start, along = _copied(problem), OutputsAlong(problem.model, problem.inputs)
    here, losses = _look(problem, along), [problem.initial_loss]
    length = reach = end = 0.0
    looked, wanted = 0, math.inf
    arrival, reason, too_long = None, "", False
    while not reason:
        taken = len(losses) - 1
        excess = losses[-1] - problem.cost.infimum
        if (excess <= wanted and taken >= first) or taken == most:
            looked += 1
            at = problem_of(problem.model, problem.inputs, problem.targets, problem.cost, where=WHERE)
            at = replace(at, data_roundoff=problem.data_roundoff)
            arrival = prove(at, budget, _after(watch, taken), step)
            reason = _hopeless(problem.cost, arrival, looked)
            too_long = any(row.name == SHORT and not row.holds for row in arrival.hypotheses)
            wanted = excess * _share(arrival)
            if arrival.descent is not None or reason:
                break
        if taken == most:
            reason = f"after {most} steps the loss is {losses[-1]:.4g}, and no ball closes there. Allow more steps."
            break
        reason = _spent(problem, taken)
        if reason:
            break
        watch("steps of gradient descent", taken, most)
        before = _copied(problem)
        with torch.no_grad():  # torch.optim.SGD's own arithmetic
            for name, p in problem.parameters.items():
                p.add_(here.gradient[name], alpha=-step)
        least, here = here.least, _look(problem, along)
        if not here.most < least:
            reason, too_long = _no_fall(taken + 1, losses[-1], least, here), here.least > losses[-1]
        else:
            losses.append(here.most)
            length, end = up(length + _distance(problem, before)), _distance(problem, start)
            reach = max(reach, end)
    arrival = _with_the_way(arrival, problem, along)
    return PathCertificate(step, tuple(losses), length, reach, end, arrival, problem.fingerprint, reason, too_long)


def _with_the_way(arrival: Certificate | None, problem: Problem, along: OutputsAlong) -> Certificate | None:
    """The arrival's row on the rounding of the loss speaks of the whole path: assumed where it is so anywhere on it."""
    if arrival is None or along.refused is None or all(row.name != LOSS_PROVED for row in arrival.hypotheses):
        return arrival
    row = loss_row(None, problem.cost, along.refused, problem.model)
    rows = tuple(row if r.name == LOSS_PROVED else r for r in arrival.hypotheses)
    return replace(arrival, hypotheses=rows, notes=(*arrival.notes, *loss_note([row])))


@dataclass(frozen=True)
class Look:
    """Bounds of the loss at some weights, infinite where it is no number, and its gradient there."""

    least: float
    most: float
    gradient: dict[str, Tensor]


def _look(problem: Problem, along: OutputsAlong) -> Look:
    parameters = problem.parameters
    with torch.enable_grad():
        outputs = problem.model(problem.inputs)
        loss = problem.cost.value(outputs, problem.targets)
        if not (bool(torch.isfinite(outputs).all()) and math.isfinite(float(loss.detach()))):
            return Look(math.inf, math.inf, {})
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    gradient = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found)}
    with torch.no_grad():
        found = loss_between(WHERE, problem.cost, outputs.detach(), problem.targets, along.at_now())
        return Look(*found, gradient)


def _spent(problem: Problem, taken: int) -> str:
    """Why the next forward pass of the user's own loop would compute another function; "" where it would not."""
    for path, slack in slack_of(problem.model).items():
        if not slack <= LASTING:
            return (
                f"after {taken} steps the slack of {path} is spent (V / (t S) is {slack:.3g}, above {LASTING:.3g}), where "
                f"training may set its scale anew. Build the block with tight=False, or call its certify() and start from there."
            )
    return ""


def _copied(problem: Problem) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in problem.parameters.items()}


def _distance(problem: Problem, weights: dict[str, Tensor]) -> float:
    return (
        math.sqrt(sum(float((p.detach() - weights[n]).square().sum()) for n, p in problem.parameters.items())) * LENGTHS
    )


def _after(watch: Watch, steps: int) -> Callable[[str, int, int], None]:
    return lambda what, done, total: watch(f"{what}, after {steps} steps", done, total)


def _hopeless(cost: Cost, arrival: Certificate, looked: int) -> str:
    """Why no later weights will have a ball either; "" where they may, or where these have."""
    if not cost.pl:
        return (
            "the minimum of this loss lies at infinity, where no ball holds a way to it. Use certify with a leaky first "
            "layer, or optim.CertifiedDescent."
        )
    if arrival.descent is not None:
        return ""
    missing = [
        r
        for r in arrival.hypotheses
        if not r.holds and r.grade in ("measured", "ball") and r.name not in (HELD, SHORT, SLACK)
    ]
    if missing:
        return "no ball can close, wherever the path goes; the rows say why."
    return f"no ball closed at {looked} places of the path." if looked >= BALLS else ""


def _share(arrival: Certificate) -> float:
    """How much lower the excess must be for a ball, where the constants stay: what the path needs falls with its root."""
    least, most = NEXT_BALL
    for row in arrival.hypotheses:
        if row.name == HELD and row.bound and row.value:
            return min(most, max(least, 0.8 * (row.value / row.bound) ** 2))
    return TOO_HIGH


def _no_fall(step: int, before: float, least_before: float, here: Look) -> str:
    if here.least > before:
        return f"step {step} raised the loss from {before:.6g} to {here.most:.6g}. Take a shorter step."
    return (
        f"after {step - 1} steps the loss is {before:.4g}, and float64 no longer proves its fall (at least "
        f"{least_before:.17g} before the next step, at most {here.most:.17g} after it). No ball closed until then."
    )
