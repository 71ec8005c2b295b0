r"""What rounding does at each kind of step: to its output, to the gradients that pass it, and to its parameters' rows.

For y = f(x) with |f(x') - f(x)| <= L |x' - x| an error e of x becomes L e, and f as computed errs by its own rounding. For
gradients g = J(x)^T h the same: L d, the change of J where x is off by e, and rounding. A linear step with matrix A errs by
gamma_k |A| |x| entry by entry, k terms to a sum in any order; so |A| |x| is computed, and its norm taken. Backward all outputs
count at once: with s_j = (sum_k h_kj^2)^(1/2), Minkowski gives sum_k ||A^T |h_k| ||^2 <= ||A^T s||^2 for A >= 0.
"""

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ...errors import UnboundedError
from ..regularity.elementwise import Elementwise
from ..regularity.steps import FixedLinear, Kinked, Sum
from .activations import past_threshold, rounded
from .kinks import kinks_of
from .states import LOST, UP, Gradients, Part, U, Value, largest, norms


class Rounding:
    """The rounding of one kind of step."""

    def check(self, step) -> None:
        """Raise UnboundedError where this step has no bound."""

    def slope(self, step, position: int) -> float:
        """A Lipschitz constant in the input at this position."""
        raise NotImplementedError

    def forward(self, step, inputs: Sequence[Value]) -> np.ndarray:
        """(samples,), the error of the output."""
        raise NotImplementedError

    def on_ball(self, step, inputs: Sequence[Value], radius: float) -> tuple[np.ndarray, np.ndarray]:
        """(samples,) twice: ``forward`` for all parameters within this radius of the present ones, and how far the output moves.

        Here for a step without parameters. Its own rounding is of sizes, which hold for all values within ``apart``.
        """
        if step.parameters:
            raise UnboundedError(f"{step.path}: nothing bounds the rounding of {step.kind} where its parameters move.")
        moved = sum(self.slope(step, position) * x.moved for position, x in enumerate(inputs))
        return self.forward(step, inputs), moved * UP

    def backward(self, step, inputs: Sequence[Value], y: Gradients) -> list[np.ndarray]:
        """(samples,) for each input, the error of the gradients in it."""
        raise NotImplementedError

    def loose(self, step, x: Value, y: Gradients) -> Tensor | None:
        """Entry by entry, a part of the error of the gradients in x that ``backward`` leaves out; from steps that keep it apart."""
        raise NotImplementedError

    def parts(self, step, x: Value, y: Gradients) -> list[Part]:
        """The rows of each trained parameter."""
        return []


class SumRounding(Rounding):
    """Each term is scaled, by a scale that may be rounded, and added."""

    def slope(self, step: Sum, position: int) -> float:
        return abs(step.scales[position])

    def forward(self, step: Sum, inputs: Sequence[Value]) -> np.ndarray:
        own = self._own(step)
        return sum(abs(s) * (x.error + own * x.norm) for s, x in zip(step.scales, inputs)) * UP + LOST

    def backward(self, step: Sum, inputs: Sequence[Value], y: Gradients) -> list[np.ndarray]:
        return [abs(s) * (y.error + self._own(step) * y.norm) * UP + LOST for s in step.scales]

    def _own(self, step: Sum) -> float:
        return (2 * len(step.scales) + 6) * U


class FixedLinearRounding(Rounding):
    """A matrix without parameters, whose |A| has a known norm; nothing is rounded where entries are only moved."""

    def slope(self, step: FixedLinear, position: int) -> float:
        return step.norm

    def forward(self, step: FixedLinear, inputs: Sequence[Value]) -> np.ndarray:
        (x,) = inputs
        return (step.norm * x.error + 2 * step.rounding * x.norm) * UP + (LOST if step.rounding else 0.0)

    def backward(self, step: FixedLinear, inputs: Sequence[Value], y: Gradients) -> list[np.ndarray]:
        return [(step.norm * y.error + 2 * step.rounding * y.norm) * UP + (LOST if step.rounding else 0.0)]


class ElementwiseRounding(Rounding):
    """A smooth activation: its slope moves by at most sup |phi''| times what its input does."""

    def check(self, step: Elementwise) -> None:
        rounded(step)

    def slope(self, step: Elementwise, position: int) -> float:
        return step.phi.slope

    def forward(self, step: Elementwise, inputs: Sequence[Value]) -> np.ndarray:
        (x,), own = inputs, rounded(step)
        rounding = U * (own.value_slope * x.norm + own.value * math.sqrt(x.entries))
        past = past_threshold(step, x.values, reach_of(x))
        if past is not None:
            rounding = rounding + norms(past, len(x.error)) / (4.0 * step.phi.curvature)
        return (step.phi.slope * x.error + rounding) * UP + LOST

    def backward(self, step: Elementwise, inputs: Sequence[Value], y: Gradients) -> list[np.ndarray]:
        (x,), own = inputs, rounded(step)
        off = own.slope_error(x.values.abs() + reach_of(x)) * U + 2 * U * step.phi.slope
        past = past_threshold(step, x.values, reach_of(x))
        off = off if past is None else off + past
        rounding = norms(off * y.size, len(y.error)) + largest(off, len(y.error)) * 2 * y.error
        return [(step.phi.slope * y.error + step.phi.curvature * x.error * y.peak + rounding) * UP + LOST]


class KinkedRounding(Rounding):
    """A map whose slope jumps: where an entry is within its error of a kink, on either side of it; elsewhere it may bend."""

    def check(self, step: Kinked) -> None:
        kinks_of(step)

    def slope(self, step: Kinked, position: int) -> float:
        return step.slope

    def forward(self, step: Kinked, inputs: Sequence[Value]) -> np.ndarray:
        (x,) = inputs
        rounding = 16 * U * step.slope * x.norm + U * (16 * abs(step.at_zero) + kinks_of(step).value) * math.sqrt(x.entries)
        return (step.slope * x.error + (0.0 if step.kind == "ReLU" else rounding)) * UP + LOST

    def backward(self, step: Kinked, inputs: Sequence[Value], y: Gradients) -> list[np.ndarray]:
        (x,) = inputs
        near, kinks = _near(step, x), kinks_of(step)
        size = y.size if y.loose is None else y.size + y.loose * UP
        turned = norms(size * near, len(y.error)) + 2 * y.error * largest(near, len(y.error))
        bent = kinks.curvature * x.error * y.peak if kinks.curvature > 0 else 0.0
        own = kinks.slope_error * U * y.norm
        return [(step.slope * y.error + kinks.jump * turned + bent + own) * UP + LOST]

    def loose(self, step: Kinked, x: Value, y: Gradients) -> Tensor | None:
        if y.loose is None:
            return None
        if step.kind != "ReLU":
            return y.loose * step.slope * UP
        return y.loose * ((x.values > 0) | _near(step, x))


def _near(step: Kinked, x: Value) -> Tensor:
    """Which entries may lie on either side of a kink."""
    reach = reach_of(x)
    return sum(((x.values - kink).abs() <= reach) & (reach > 0) for kink in kinks_of(step).places) > 0


def reach_of(x: Value) -> Tensor:
    """(samples, 1, ...), how far an entry may be from the one computed here."""
    return x.values.new_tensor(x.apart).reshape(-1, *[1] * (x.values.dim() - 1))


def rule_of(step, rules: dict[type | str, Rounding]) -> Rounding:
    """The rule of a step, by its kind's name or by its type.

    Raises:
        UnboundedError: it has none.
    """
    rule = rules.get(step.kind) or rules.get(type(step))
    if rule is None:
        raise UnboundedError(
            f"{step.path or 'the model'}: nothing bounds the rounding of {step.kind}. Use affine layers, smooth activations or "
            f"ReLU, sums, average pooling, and batch normalisation in evaluation mode."
        )
    rule.check(step)
    return rule
