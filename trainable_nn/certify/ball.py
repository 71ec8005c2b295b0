"""The ball of a certificate: layers' constants on balls around the present weights, the descent that follows, its rows."""

from __future__ import annotations

import math

from ..errors import TrainableNNError
from ..modules.residual import LASTING, slack_of
from ..theory.pl import Constants, Descent, Gap, descend, descend_with
from .certificate import Hypothesis
from .layers import Layers, path_in, sentence
from .measure import Extremes, Watch
from .problem import Problem
from .regularity import PreparedNetwork

GOAL_SHARE = 0.1  # of the initial excess, for costs whose infimum lies at infinity
KNOWN = "layers with known constants"
BOUNDED_DERIVATIVES = "bounded derivatives"
HELD = "a ball that holds the whole path"
SHORT = "a step below 2 / L on the ball"
SLACK = "slack that lasts on the ball"


def descent_on_ball(
    problem: Problem,
    extremes: Extremes | None,
    layers: Layers,
    everywhere: float,
    kinked: bool,
    watch: Watch,
    step: float | None,
    known: dict | None = None,
) -> tuple[Descent | Gap | None, float | None, list[Hypothesis]]:
    """The descent (with this step, or with the longest found) or the gap, a bound of ||DF|| here, rows on the layers."""
    centre = extremes.smallest if extremes else 0.0
    largest = extremes.largest if extremes else None
    if kinked:  # no ball has a finite Lipschitz constant of DF, and the complaint says so
        return None, largest, []
    try:
        prepared = PreparedNetwork(problem.model, problem.inputs, known=known)
        told = lambda done, total: watch("bounds at the weights", done, total)
        here = prepared.on_ball(0.0, centre_jacobian=largest, watch=told)
    except (TrainableNNError, ValueError, TypeError, NotImplementedError) as error:
        where, source = path_in(error, problem.model), "paper A, Proposition 4.3 and Theorem 4.5"
        return None, largest, [Hypothesis(KNOWN, source, where, False, remedy=sentence(error), grade="ball")]
    rows = _layer_rows(here)
    upper = float(here.jacobian) if math.isfinite(here.jacobian) else largest
    if problem.cost is None:
        return None, upper, rows
    constants = _constants(prepared, largest, watch)
    floor = lambda radius: max(everywhere, layers.sigma_at_least(radius))
    goal = GOAL_SHARE * problem.excess if not problem.cost.pl and everywhere > 0 else 0.0
    question = (problem.cost, problem.excess, centre, floor, constants, goal)
    outcome = descend(*question) if step is None else descend_with(step, *question)
    return outcome, upper, rows + _slack_rows(problem, constants, outcome)


def _constants(prepared: PreparedNetwork, largest: float | None, watch: Watch) -> Constants:
    known: dict[float, tuple[float, float]] = {}

    def constants(radius: float) -> tuple[float, float]:
        if radius not in known:
            watch("bounds on balls", len(known), len(known) + 1)
            found = prepared.on_ball(radius, centre_jacobian=largest)
            known[radius] = (float(found.jacobian), float(found.jacobian_lipschitz))
        return known[radius]

    return constants


def _layer_rows(found) -> list[Hypothesis]:
    """One row for each layer: its bounds are finite, so a step size can follow from them. A layer that runs twice has one."""
    rows: dict[str, Hypothesis] = {}
    for layer in found.layers:
        constants = layer.regularity
        finite = all(map(math.isfinite, (constants.J, constants.D, constants.a, constants.b, constants.c)))
        before = rows.get(layer.path)
        rows[layer.path] = Hypothesis(
            BOUNDED_DERIVATIVES,
            str(layer.source),
            layer.path,
            finite and (before is None or before.holds),
            max(float(constants.J), before.value if before else 0.0),
            remedy=f"{layer.kind}: one of its derivatives has no bound on any ball. Use a layer of this package.",
            grade="ball",
        )
    return list(rows.values())


def _slack_rows(problem: Problem, constants: Constants, outcome: Descent | Gap) -> list[Hypothesis]:
    """The blocks whose scale may be set anew on a ball as large as the path needs, so that nothing is bounded there."""
    slack = slack_of(problem.model)
    if not slack or not isinstance(outcome, Gap) or outcome.reached > 0.0 or math.isfinite(constants(outcome.radius)[1]):
        return []
    remedy = (
        f"Within {outcome.radius:.4g}, as far as the path may lead, this SpectrallyBoundedResidual may spend its slack, V / (t S), "
        f"and set its scale anew: training then follows another function. Build it with tight=False, which never does."
    )
    source = "the scale of SpectrallyBoundedResidual"
    return [Hypothesis(SLACK, source, path, False, now, LASTING, remedy=remedy, grade="ball") for path, now in slack.items()]


def ball_rows(outcome: Descent | Gap | None) -> list[Hypothesis]:
    name, source = HELD, "Proposition R (II.1.8); THEORY 4"
    if isinstance(outcome, Gap) and outcome.share >= 2.0:
        remedy = "On a ball as large as the path needs, eta L is this. Take a shorter step, or certify at a lower loss."
        return [Hypothesis(SHORT, source, "", False, outcome.share, 2.0, remedy=remedy, grade="ball")]
    if outcome is None or (isinstance(outcome, Gap) and math.isinf(outcome.needed)):
        return []  # another row says why there is nothing to look for
    if isinstance(outcome, Descent):
        return [Hypothesis(name, source, "", True, outcome.radius, None, grade="ball")]
    remedy = "No ball has finite bounds; the rows above name the layers that have none."
    if outcome.reached > 0.0:
        remedy = (
            f"No ball closes: within radius {outcome.radius:.4g} the integral of sigma_min(DF) reaches "
            f"{outcome.reached:.4g} of the {outcome.needed:.4g} that this loss asks for, short by a factor "
            f"{outcome.needed / outcome.reached:.3g}. certify_path proves a constant step along its path, to where a "
            f"ball closes; optim.CertifiedDescent needs none. A wider network or a leaky first layer help too."
        )
    return [Hypothesis(name, source, "", False, outcome.reached, outcome.needed, remedy=remedy, grade="ball")]
