"""``certify``: every hypothesis checked, the strongest grade that follows, and its numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..theory import samples
from ..theory.costs import Cost
from ..theory.pl import Descent
from ..theory.rounding import down
from .ball import BOUNDED_DERIVATIVES, ball_rows, descent_on_ball
from .batch import covariance_rows
from .certificate import GRADES, Certificate, Hypothesis
from .entries import loss_note, loss_row
from .held import weights_held, with_held_weights
from .layers import layers_of
from .measure import BUDGET, Extremes, Watch, jacobian_extremes
from .problem import Problem, problem_of
from .remedies import FUNCTION, SMOOTH, complaints
from .seen import see
from .self_check import check_by_draw

NEAR = 1e-2  # of the root mean square distance; nearer samples are named


def certify(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor | None = None,
    *,
    loss: str | Cost = "mse",
    budget: int | None = None,
    generator: torch.Generator | None = None,
    progress: Watch | None = None,
) -> Certificate:
    r"""What is proved of plain gradient descent on this network, these samples and this loss, from these weights.

    The grades, the strongest first: "global", the Jacobian DF has a lower bound over all weights (Theorem 4.7), so the
    stated step converges whatever happens on the way; "ball", a ball around the weights provably holds the path and
    lambda_min(DF DF^T) is bounded below in it; "measured", lambda_min is positive here and nothing is proved of the
    path; "none". Every hypothesis is a row, with what to do where it fails. The model is copied to float64 on the
    CPU and left as it is; it counts in its present mode, with the parameters that require gradients.

    The rounding of the entries of DF, of the outputs and of the loss is proved where the network's steps have rules
    (``kernel_error_at_most``); elsewhere it is assumed, and a row of kind "measured" and a note say so.

    Not covered: mini-batches, momentum, weight decay, changing data, rounding of the training itself.

    Shape:
        inputs: (N, ...), floats. targets: what the loss takes; without them nothing is said of a loss, and the grade is
        at most "measured".
    Units:
        loss: "mse" is torch.nn.functional.mse_loss (the mean over all entries), "cross_entropy" torch's mean over
        samples with class indices; or a theory.Cost. budget: bytes that a matrix may take, 1 GiB if None (the tangent
        kernel's workspace four times that); work is bounded in proportion. generator: draws the
        direction in which the bound of \|\|DF\|\| is checked against a product, where the network is small; always the same one if None.
    Cost:
        The Gram matrix of the Jacobian, M^2 p multiplications for M outputs (all samples together) and p parameters,
        where the budget allows, else of the last parameters; and some passes of the regularity calculus.
    Raises:
        TypeError, ValueError: inputs, targets or weights that nothing can be said of; the message says which.
        CertificateError: the model does not run on a copy in float64; or a drawn direction contradicts a bound, our fault.
    Source:
        THEORY 4 to 6; paper A, Theorems 2.4, 4.7 and 5.1 as corrected there.
    """
    if budget is not None and budget < 1:
        raise ValueError(f"certify: budget must be a positive number of bytes, got {budget}. Leave it out for 1 GiB.")
    watch = progress or (lambda what, done, total: None)
    budget = BUDGET if budget is None else int(budget)
    watch("reading the network", 0, 1)
    with torch.random.fork_rng(devices=[]), weights_held():
        return prove(problem_of(model, inputs, targets, loss), budget, watch, generator=generator)


def prove(
    problem: Problem, budget: int, watch: Watch, step: float | None = None, generator: torch.Generator | None = None
) -> Certificate:
    """The certificate of a problem; with a step, of gradient descent with that one and no other."""
    watch("reading the network", 1, 1)
    seen = see(problem.model, problem.inputs)
    blame = complaints(seen, problem.model)
    rows = [*_basic_rows(problem), *_function_rows(problem, blame)]
    known = problem.known  # norms of weights, which several walks ask for
    kinked = any(row.name == SMOOTH for row in blame)
    may_hold = all(r.holds for r in rows if r.grade)
    extremes = jacobian_extremes(problem, budget, watch, known, kinked) if may_hold else None
    watch("layers of the theorem", 0, 1)
    layers = layers_of(problem)
    everywhere = layers.sigma_at_least(math.inf)
    rows += _rank_rows(problem, extremes, everywhere)
    if problem.cost is not None:
        rows.append(loss_row(problem.outputs_error, problem.cost, problem.refused, problem.model))
    outcome, regular, local = descent_on_ball(problem, extremes, layers, everywhere, kinked, watch, step, known)
    check_by_draw(problem, seen, regular, generator)
    rows += [*covariance_rows(problem, seen), *layers.rows, *_cost_rows(problem, everywhere), *local, *ball_rows(outcome)]
    grade = _grade(rows, extremes, outcome, everywhere)
    above = GRADES[GRADES.index(grade) + 1 :]
    rows += [row for row in blame if row.name != FUNCTION and (row.grade in above or row.grade == "")]
    rows = _without_repeats(rows, blame)
    descent = outcome if grade in ("ball", "global") else None
    return _certificate(problem, grade, rows, extremes, everywhere, descent, regular, budget)


def _certificate(problem, grade, rows, extremes, everywhere, descent, jacobian_upper, budget) -> Certificate:
    from .. import __version__  # defined after this file is imported

    sigma, source = everywhere, "layers, over all weights by Proposition 4.6"
    if descent is None and extremes is not None and extremes.smallest > sigma:
        sigma, source = extremes.smallest, f"{extremes.source}, at the present weights"
    if descent is not None and descent.sigma > sigma:
        sigma, source = descent.sigma, "present weights and the bounds on the ball"
    notes = ()
    if extremes is not None:
        notes = (f"lambda at the present weights: {extremes.smallest**2:.4g} ({extremes.source}).",)
        notes += extremes.entries.note() if extremes.entries is not None and descent is not None else ()
    notes += loss_note(rows) if descent is not None else ()
    return Certificate(
        grade=grade,
        hypotheses=tuple(rows),
        loss=problem.loss,
        initial_loss=problem.initial_loss,
        infimum=0.0 if problem.cost is None else problem.cost.infimum,
        lambda_lower=down(sigma * sigma),
        lambda_source=source if sigma > 0 else "none",
        jacobian_upper=jacobian_upper,
        descent=descent,
        fingerprint=problem.fingerprint,
        samples=len(problem.inputs),
        outputs=problem.outputs.numel(),
        parameters=sum(p.numel() for p in problem.parameters.values()),
        budget=budget,
        notes=notes,
        package=__version__,
    )


def _basic_rows(problem: Problem) -> list[Hypothesis]:
    """Impossibility certificates: what no weights can mend (II.4.1 item 6)."""
    outputs = problem.outputs.numel()
    count = sum(p.numel() for p in problem.parameters.values())
    few = Hypothesis(
        "as many trained parameters as outputs",
        "II.4.1 item 6, impossibility",
        "",
        count >= outputs,
        float(count),
        float(outputs),
        remedy=f"{count} parameters cannot move {outputs} outputs (samples x outputs each) independently, so "
        f"lambda = 0. Use fewer samples or a wider network.",
        grade="measured",
    )
    return [few, *_pair_rows(problem)]


def _pair_rows(problem: Problem) -> list[Hypothesis]:
    """Duplicates, which no network can tell apart, and near-duplicates, which cost lambda the square of their distance."""
    x = problem.inputs.flatten(1)
    pair = samples.nearest_pair(x.numpy())
    if pair is None:
        return []
    noise = problem.data_roundoff * float(x[[pair.first, pair.second]].norm())
    named = f"Samples {pair.first} and {pair.second}"
    remedy = f"{named} are the same up to rounding, so no network can move their outputs apart. Drop one of them."
    distinct = Hypothesis(
        "distinct samples", "II.4.1 item 6, impossibility", "", pair.distance > noise, pair.distance, noise,
        remedy=remedy, grade="measured",
    )  # fmt: skip
    if not distinct.holds:
        return [distinct]
    typical = float((2.0 * x.var(0, correction=0).sum()).sqrt())  # root mean square distance of two samples
    remedy = (
        f"{named} are {typical / pair.distance:.3g} times nearer to each other than two samples are on average, and lambda is at "
        f"most half the square of their distance times that of the slope of DF in the input. Drop one of them, or expect a "
        f"small lambda."
    )
    apart = Hypothesis(
        "samples well apart", "II.4.1 item 6", "", pair.distance >= NEAR * typical, pair.distance, NEAR * typical,
        "measured", remedy,
    )  # fmt: skip
    return [distinct, apart]


def _function_rows(problem: Problem, blame: list[Hypothesis]) -> list[Hypothesis]:
    draws = [row for row in blame if row.name == FUNCTION]
    if draws:
        return draws
    with torch.no_grad(), with_held_weights(problem.model):
        few = problem.inputs[:2]
        try:
            same = torch.equal(problem.model(few), problem.model(few))
        except ValueError:  # batch norm in training mode wants more than one number a channel
            same = torch.equal(problem.model(problem.inputs), problem.model(problem.inputs))
    remedy = (
        "Two runs on the same inputs differ, so training changes the function. Take the randomness out, or call eval()."
    )
    return [
        Hypothesis(FUNCTION, "every theorem of THEORY 4", "", same, kind="measured", remedy=remedy, grade="measured")
    ]


def _rank_rows(problem: Problem, extremes: Extremes | None, everywhere: float) -> list[Hypothesis]:
    sigma = max(everywhere, extremes.smallest if extremes else 0.0)
    remedy = (
        "The outputs cannot be moved independently at these weights (to first order), so gradient descent may stall above "
        "the minimum. Widen the network, drop samples that repeat each other, or raise the budget."
    )
    if extremes is not None and extremes.smallest == 0.0:
        remedy = f"Found from the {extremes.source}. {remedy}"
    name, source = "lambda_min(DF DF^T) > 0 here", "paper A, Theorem 2.4"
    rows = [Hypothesis(name, source, "", sigma > 0, sigma * sigma, 0.0, "measured", remedy, "measured")]
    if extremes is not None and extremes.entries is not None:
        rows.append(extremes.entries.row())
    return rows


def _cost_rows(problem: Problem, everywhere: float) -> list[Hypothesis]:
    if problem.cost is None:
        remedy = "Give targets: radius, step and rate depend on the loss."
        return [Hypothesis("targets are given", "THEORY 4", "", False, remedy=remedy, grade="ball")]
    cost = problem.cost
    lower = cost.pl if cost.pl else cost.pl_squared(problem.excess) if cost.pl_squared else 0.0
    name = "a cost whose gradient is bounded below by its excess"
    remedy = "State pl (mu with |grad|^2 >= mu (gamma - inf)) or pl_squared in the Cost."
    rows = [Hypothesis(name, "paper A, Theorem 2.4; THEORY 4", "", lower > 0, lower, 0.0, remedy=remedy, grade="ball")]
    if not cost.pl and cost.pl_squared:
        remedy = (
            "The minimum lies at infinity, so no ball around the weights holds a whole path: it takes a lower bound of lambda "
            "over all weights (the rows of Theorem 4.7), or the squared loss."
        )
        rows.append(
            Hypothesis(
                "a minimum within reach, or lambda bounded everywhere",
                "THEORY 4",
                "",
                everywhere > 0,
                everywhere**2,
                0.0,
                remedy=remedy,
                grade="ball",
            )
        )
    return rows


def _without_repeats(rows: list[Hypothesis], blame: list[Hypothesis]) -> list[Hypothesis]:
    """Rows with one name, source and path are one; a kink is said once, in the words of its complaint."""
    kinked = {row.path for row in blame if row.name == SMOOTH}
    first: dict[tuple, Hypothesis] = {}
    for row in rows:
        key = (row.name, row.source, row.path)
        if not (row.name == BOUNDED_DERIVATIVES and not row.holds and row.path in kinked):
            first[key] = row if key not in first or not row.holds else first[key]
    return list(first.values())


def _grade(rows: list[Hypothesis], extremes: Extremes | None, outcome, everywhere: float) -> str:
    def all_hold(*grades: str) -> bool:
        return all(row.holds for row in rows if row.grade in grades)

    if not all_hold("measured"):
        return "none"
    if not isinstance(outcome, Descent) or not all_hold("ball"):
        return "measured"
    return "global" if everywhere > 0 and all_hold("global") else "ball"
