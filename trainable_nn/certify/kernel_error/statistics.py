r"""Rounding of normalisation by statistics of the values themselves: layer, group and batch normalisation.

v = (x - mu) / m(s) in each group of n entries, s^2 = var + eps, and r^2 the mean square of the group, so |mu| <= r. However
mean and variance are computed, at once or by the difference of two means,

    |mu' - mu| <= gamma_(n+2) r,   |var' - var| <= 8 (n + 8) u r^2,

and 1 / m errs relatively by at most half of that over m^2, since 2 m m'(s) <= 2 s for m = s, a floor, and the smooth floor.
With q^2 = 1 + r^2 / m^2 both v and the gradient in x, (g - <g> - k <g (x - mu)> (x - mu)) / m with k s^2 <= 1, err by at most
CONSTANT (n + 16) u q^2 times n^(1/2) or \|g\| / m: four times the error of 1 / m, 4 (n + 8) u q^2; 2 (n + 2) u q^2 of the mean; and
4 (n + 16) u q^2 of sums of products with x instead of x - mu, as torch takes them for groups.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...errors import UnboundedError
from ..regularity.normalisation import BatchNormalisation, denominator
from ..regularity.norms import deviations
from ..regularity.sample_norms import SampleNormalisation
from ..regularity.states import Ball, State
from .rules import Rounding
from .states import LOST, UP, Gradients, Part, U, Value, gamma, largest

CONSTANT = 64

Step = SampleNormalisation | BatchNormalisation


class StatisticsRounding(Rounding):
    """What both kinds share; they differ in what a group is, and in the layout of their parameters."""

    def check(self, step: Step) -> None:
        floor = getattr(step.module, "floor", None)
        if floor is not None and not step.module.smooth:
            raise UnboundedError(
                f"{step.path}: the slope of {step.kind} jumps at its floor, and nothing bounds its rounding. Give it smooth=True."
            )

    def slope(self, step: Step, position: int) -> float:
        return self._gamma(step) / math.sqrt(float(self._least(step))) * UP

    def forward(self, step: Step, inputs: Sequence[Value]) -> np.ndarray:
        (x,) = inputs
        shift = 0.0 if step.beta is None else float(step.beta.norm()) * math.sqrt(self._uses(step, x)) * UP
        J, _ = self._steepness(step, x)
        own = self._gamma(step) * self._own(step, x) + 32 * U * shift
        return (self._gamma(step) * J * x.error + own) * UP + LOST

    def on_ball(self, step: Step, inputs: Sequence[Value], radius: float) -> tuple[np.ndarray, np.ndarray]:
        (x,) = inputs
        turned, shifted = (radius if trains else 0.0 for trains in step.trains)
        root = math.sqrt(self._uses(step, x)) * UP
        J, _ = self._steepness(step, x)
        steeper = turned * (J * x.error + self._own(step, x)) + 32 * U * shifted * root
        moved = (self._gamma(step) + turned) * J * x.moved + turned * math.sqrt(x.entries) + shifted * root
        return (self.forward(step, inputs) + steeper) * UP, moved * UP

    def backward(self, step: Step, inputs: Sequence[Value], y: Gradients) -> list[np.ndarray]:
        (x,) = inputs
        J, curvature = self._steepness(step, x)
        n, _, q, m = self._groups(step, x)
        own = CONSTANT * (n + 16) * U * largest(q * q / m, len(x.error)) * UP + 16 * U * J
        return [self._gamma(step) * (J * y.error + (curvature * x.error + own) * y.norm) * UP + LOST]

    def parts(self, step: Step, x: Value, y: Gradients) -> list[Part]:
        longest, uses = self._longest(step, x), self._uses(step, x)
        J, _ = self._steepness(step, x)
        size = longest * y.norm * UP
        error = y.error * longest + (J * x.error + self._own(step, x)) * y.norm + (gamma(uses + 4) + 32 * U) * size
        root = math.sqrt(uses) * UP
        shifted = (root * (y.error + gamma(uses + 4) * y.norm) * UP + LOST, root * y.norm * UP)
        found = [pair for pair, trains in zip([(error * UP + LOST, size), shifted], step.trains) if trains]
        columns = 0 if step.gamma is None else step.gamma.numel()
        return [Part(name, *pair, columns, 0, 8) for name, pair in zip(step.parameters, found)]

    def _own(self, step: Step, x: Value) -> np.ndarray:
        """Of v, all groups of a sample together."""
        n, count, q, _ = self._groups(step, x)
        return CONSTANT * (n + 16) * U * math.sqrt(n * count) * largest(q * q, len(x.error)) * UP

    def _groups(self, step: Step, x: Value) -> tuple[int, int, Tensor, Tensor]:
        """Entries of a group, groups of a sample; at least q and at most m of each (batch or 1, groups), for every computed x."""
        groups = self._grouped(step, x.values)
        n = groups.shape[2]
        moved = x.values.new_tensor(x.apart / math.sqrt(n)).reshape(-1, 1)
        square = (groups.square().mean(2).sqrt() * UP + moved).square()
        spread, slack = deviations(groups)
        deviation = (spread - slack - moved).clamp(min=0.0)
        m = self._denominator(step, deviation.square() + float(step.module.eps)) / UP
        return n, x.entries // n, (1 + square / m.square()).sqrt() * UP, m

    def _steepness(self, step: Step, x: Value) -> tuple[np.ndarray, np.ndarray]:
        """(samples,) sup ||J v|| and sup ||D^2 v||, from each computed input to the exact one."""
        samples = len(x.error)
        zero, delta = np.zeros(samples), x.apart
        whole = float(np.sqrt(np.square(delta).sum())) * UP
        state = State(x.values, x.error, delta, zero, whole, zero, zero, zero)
        J, curvature = self._suprema(step, Ball(0.0, samples), state)
        if not np.isfinite(J).all() or not np.isfinite(curvature).all():
            raise UnboundedError(f"{step.path}: {step.kind} is as steep as rounding lets it be. Give it a larger eps.")
        return J * UP, curvature * UP


class SampleNormalisationRounding(StatisticsRounding):
    """Layer and group normalisation."""

    def _gamma(self, step: SampleNormalisation) -> float:
        return 1.0 if step.gamma is None else float(step.gamma.abs().max())

    def _least(self, step: SampleNormalisation) -> float:
        return step.eps

    def _grouped(self, step: SampleNormalisation, values: Tensor) -> Tensor:
        return step._grouped(values)

    def _denominator(self, step: SampleNormalisation, squared: Tensor) -> Tensor:
        return squared.sqrt()

    def _suprema(self, step: SampleNormalisation, ball: Ball, state: State) -> tuple[np.ndarray, np.ndarray]:
        return step._steepness(ball, state)

    def _uses(self, step: SampleNormalisation, x: Value) -> int:
        return step._uses(Ball(0.0, len(x.error)), x.values)

    def _longest(self, step: SampleNormalisation, x: Value) -> float:
        return math.sqrt(x.entries) * UP


class BatchNormalisationRounding(StatisticsRounding):
    """Batch normalisation by the batch's own statistics: all of the batch is one vector."""

    def _gamma(self, step: BatchNormalisation) -> float:
        return float(step.gamma.abs().max())

    def _least(self, step: BatchNormalisation) -> float:
        return float(denominator(step.module, torch.tensor(float(step.module.eps), dtype=torch.float64))) ** 2

    def _grouped(self, step: BatchNormalisation, values: Tensor) -> Tensor:
        return values.transpose(0, 1).flatten(1)[None]

    def _denominator(self, step: BatchNormalisation, squared: Tensor) -> Tensor:
        return denominator(step.module, squared)

    def _suprema(self, step: BatchNormalisation, ball: Ball, state: State) -> tuple[np.ndarray, np.ndarray]:
        slope, curvature = step.steepness(ball, state)
        return np.array([slope.max()]), np.array([curvature.max()])

    def _uses(self, step: BatchNormalisation, x: Value) -> int:
        return x.entries // len(step.gamma)

    def _longest(self, step: BatchNormalisation, x: Value) -> float:
        return math.sqrt(x.entries // len(step.gamma)) * UP
