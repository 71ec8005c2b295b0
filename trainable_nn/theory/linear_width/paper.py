"""Theorem 6.1 of paper B for one data set and one network at its initialisation: claimed, corrected, measured.

The width condition m >= K n is the paper's claim and no guarantee: Lemma 5.1, on which it rests, is false on its ball
(THEORY_PAPERS II.3.8 item 1), so what is corrected are slips of arithmetic, and alpha on the ball has no correction.
"""

from __future__ import annotations

import math

import numpy as np

from ...errors import DatasetError, OptionError
from . import bounds
from .activations import value_and_slope
from .bounds import Setting
from .centre import Centre, measure
from .certificate import targets_of
from .gaussian import c_phi, smallest_eigenvalue
from .network import LinearWidthResNet
from .path import singular_values
from .rows import CLAIMED, CORRECTED, MEASURED, PROVED, Row, Rows

UNIT_TOLERANCE = 1e-6  # of the inputs' lengths and of the output weights, relatively


def paper_constants(
    network: LinearWidthResNet, inputs: np.ndarray, targets: np.ndarray, *, delta: float = 1.0,
    delta_prime: float = 0.1, loss: float = 1e-3,
) -> Rows:  # fmt: skip
    """Every constant of Theorem 6.1, with its source and what it is worth.

    Shape:
        inputs: (n, in_features), rows of length 1. targets: (n,).
    Units:
        delta and delta_prime are the theorem's; ``loss`` is the ||f - y|| that the iteration count is to reach.
    Raises:
        DatasetError: rows that are not of length 1, targets that are zero or not finite. OptionError: delta <= 0, a
        delta_prime outside (0, 1), a network that is not residual or whose output weights are not ||y|| / sqrt(n).
    Source:
        Paper B, (3.21) to (6.7); THEORY_PAPERS II.3.5 to II.3.8.
    """
    _check(network, delta, delta_prime, loss)
    c = measure(network, inputs, detail=False)
    y = targets_of(targets, len(c.outputs))
    s = _setting(network, c, y)
    smallest = smallest_eigenvalue(c.features[0], network.nonlinearity)
    kappa = bounds.misfit(s, np.array([np.linalg.norm(f) for f in c.features[1:]]), delta)
    lower, upper, _ = singular_values(c)
    A = float(c.weight_norms.max())
    mean = _mean_of_phi(network.nonlinearity)
    initial = float(np.linalg.norm(c.outputs - y))
    rows = [
        Row("c_phi", 1 / mean**2 if abs(mean) > 1e-12 else math.inf, CLAIMED, "below (2.2)", "1 / E[phi]^2 as printed"),
        Row("c_phi", s.c_phi, CORRECTED, "II.3.1", "1 / E[phi^2]"),
        Row("lambda(X)", smallest.value, MEASURED, "Lemma 2.3", f"quadrature, error about {smallest.error:.1g}"),
        Row("H_0", bounds.least_depth(s.B * s.c, delta_prime), CORRECTED, "(3.15), II.3.5", "least depth"),
        *_alpha_rows(s, c, smallest.value, delta_prime, float(lower[0])),
        Row("beta at the start", bounds.beta_at(s, A), CLAIMED, "(3.29)", "" if s.at_zero == 0 else "needs phi(0) = 0"),
        Row("beta at the start", bounds.beta_for_any_value_at_zero(s, A), CORRECTED, "II.3.8.5"),
        Row("beta at the start", float(upper[-1]), PROVED, "II.4.1 item 7", "||J||"),
        Row("kappa", kappa, CLAIMED, "(4.7), II.3.6"),
        Row("kappa", initial / s.y, MEASURED, "(4.6)", "||f - y|| / ||y||"),
        *_theorem_rows(s, smallest.value, kappa, delta_prime, loss),
    ]
    spectral = np.array([np.linalg.norm(f, 2) for f in c.features])
    note = "without the Chernoff term, whose constants are open"
    rows += [
        Row("probability", bounds.probability(s, spectral, delta, printed=True), CLAIMED, "Theorem 6.1", note),
        Row("probability", bounds.probability(s, spectral, delta, printed=False), CORRECTED, "II.3.8.8", note),
    ]
    return Rows(tuple(rows))


def _alpha_rows(s: Setting, c: Centre, smallest: float, delta: float, measured: float) -> list[Row]:
    at_start = bounds.alpha_at_start(s, max(smallest, 0.0), delta)
    x, a = np.linalg.norm(c.features[0], 2), math.sqrt(s.m) * s.a
    off = float(np.linalg.norm(c.back[0] - c.back[-1], axis=1).max())
    wide = s.m * smallest >= 20 * math.log(s.n) * (x * s.B) ** 2
    sound = math.sqrt(s.c_phi / s.m) * (a * math.sqrt(max(smallest, 0.0) / 2) - s.B * x * off)
    why = "with probability 1 - 1 / n" if wide else "too narrow for Lemma 2.3"
    return [
        Row("alpha at the start", at_start, CLAIMED, "(3.21)", "its proof treats dependent columns as independent"),
        Row("alpha at the start", max(sound, 0.0) if wide else None, CORRECTED, "II.3.8.3", why),
        Row("alpha at the start", measured, PROVED, "II.4.1 item 7", "sigma_min(J)"),
        Row("alpha on the ball", (1 - delta) * at_start, CLAIMED, "(5.2)", "Lemma 5.1, which is false on its ball"),
        Row(
            "alpha on the ball", None, CORRECTED, "II.3.8.1", "there is none: a point of the ball saturates every unit"
        ),
    ]


def _theorem_rows(s: Setting, smallest: float, kappa: float, delta: float, loss: float) -> list[Row]:
    alpha = (1 - delta) * bounds.alpha_at_start(s, max(smallest, 0.0), delta)
    beta, printed = bounds.beta_on_ball(s, delta), bounds.lipschitz_on_ball_printed(s, delta)
    A = bounds.weights_at_most(s, delta)
    lipschitz = bounds.lipschitz_corrected(s, A) if s.at_zero == 0 else None
    wide = bounds.beta_for_any_value_at_zero(s, A)
    residual = kappa * s.y
    first, second = (
        bounds.width_factors(s, smallest, kappa, delta) if smallest > 0 else (math.inf, math.inf)
    )  # Lemma 5.1's two conditions
    given = "if alpha held on the ball"
    step = min(1.0, alpha**2 / (printed * residual)) / beta**2
    better = None if lipschitz is None else 1 / (wide**2 + lipschitz * residual)
    decades = max(0.0, math.log(residual / loss))
    count = lambda eta, factor: math.ceil(factor / (eta * alpha**2) * decades) if eta and alpha > 0 else None
    return [
        Row("beta on the ball", beta, CLAIMED, "(5.17)", "" if s.at_zero == 0 else "needs phi(0) = 0"),
        Row("beta on the ball", wide, CORRECTED, "II.3.8.5"),
        Row("L on the ball", printed, CLAIMED, "(5.18)", "understates sqrt(n) C"),
        Row("L on the ball", lipschitz, CORRECTED, "II.3.5, C_fix", "" if lipschitz else "needs phi(0) = 0"),
        Row("radius", 4 * residual / alpha if alpha > 0 else math.inf, CLAIMED, "(5.1)"),
        Row("radius", 2 * residual / alpha if alpha > 0 else math.inf, CORRECTED, "II.3.2", given),
        Row("K", max(first, second), CLAIMED, "(6.2)", "width condition m >= K n: a claim, no guarantee"),
        Row("K", None, CORRECTED, "II.3.8.1", "there is none: Lemma 5.1 is false"),
        Row("width", max(first, second) * s.n, CLAIMED, "(6.2)", f"K n; this network has {s.m}"),
        Row("step size", step, CLAIMED, "(6.1)", "twice Theorem 2.1's"),
        Row("step size", better, CORRECTED, "II.3.2", given),
        Row("rate", 1 - step * alpha**2 / 2, CLAIMED, "(6.3)", "of the loss, a step"),
        Row("rate", None if better is None else 1 - better * alpha**2, CORRECTED, "II.3.2", given),
        Row("iterations", count(step, 4), CLAIMED, "(6.7)", f"to ||f - y|| <= {loss:g}"),
        Row("iterations", count(better, 2), CORRECTED, "II.3.2", given),
    ]


def _setting(network: LinearWidthResNet, c: Centre, y: np.ndarray) -> Setting:
    lengths = np.linalg.norm(c.features[0], axis=1)
    worst = int(np.abs(lengths - 1).argmax())
    if abs(lengths[worst] - 1) > UNIT_TOLERANCE:
        raise DatasetError(
            f"linear_width.paper_constants: row {worst} of the inputs has length {lengths[worst]:.6g}, and the paper's "
            "constants hold for rows of length 1. Divide each row by its length."
        )
    a, wanted = float(network.a.abs().max()), float(np.linalg.norm(y)) / math.sqrt(len(y))
    if abs(a - wanted) > UNIT_TOLERANCE * wanted or wanted == 0:
        raise OptionError(
            f"linear_width.paper_constants: the output weights are {a:.6g}, and the paper sets them to ||y|| / sqrt(n) = "
            f"{wanted:.6g}. Build the network with LinearWidthResNet.for_targets."
        )
    n, d = c.features[0].shape
    return Setting(
        n, d, network.width, network.depth, c.phi.slope, c.phi.curvature, network.residual_scale,
        c_phi(network.nonlinearity).value, wanted, c.phi.at_zero,
    )  # fmt: skip


def _check(network: LinearWidthResNet, delta: float, delta_prime: float, loss: float) -> None:
    if not (delta > 0 and 0 < delta_prime < 1 and loss > 0):
        raise OptionError(
            f"linear_width.paper_constants: delta and loss must be above 0 and delta_prime strictly in (0, 1), "
            f"got {delta}, {loss} and {delta_prime}."
        )
    if not network.residual:
        raise OptionError(
            "linear_width.paper_constants: Theorem 6.1 speaks of the residual network (2.3), and this one is the "
            "feed-forward network (2.2). Build it with residual=True; certificate() takes both."
        )


def _mean_of_phi(nonlinearity: str) -> float:
    z, weights = np.polynomial.hermite_e.hermegauss(120)
    return float(weights @ value_and_slope(nonlinearity, z)[0] / weights.sum())
