"""What is known of a step's output while the graph is walked: at the centre, and on the ball around it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from torch import Tensor

from .norms import frobenius_at_most

U = 2.0**-53
Measured = TypeVar("Measured")


@dataclass(frozen=True)
class Ball:
    """All parameters within ``radius`` of the present ones; ``samples`` is 1 where a step mixes them, else the batch.

    memo: what was measured at the centre before, and is the same for every radius.  place: of the step that looks at it.
    """

    radius: float
    samples: int
    memo: dict = field(default_factory=dict)
    place: int = -1

    def at(self, place: int) -> "Ball":
        """The same ball, seen from a step."""
        return replace(self, place=place)

    def measured(self, what: str, measure: Callable[[], Measured]) -> Measured:
        """Of this step and the values at the centre: computed for the first radius alone."""
        key = (what, self.place)
        if key not in self.memo:
            self.memo[key] = measure()
        return self.memo[key]

    def norms(self, state: "State") -> np.ndarray:
        """(samples,) upper bounds of the Euclidean norms of a step's output now."""
        if state.place < 0:
            return frobenius_at_most(self.rows(state.centre))
        return self.at(state.place).measured("norms", lambda: frobenius_at_most(self.rows(state.centre)))

    def rows(self, values: Tensor) -> Tensor:
        """One row for each sample."""
        return values.reshape(self.samples, -1)


@dataclass
class State:
    """One output, sample by sample: each array is (samples,) or (samples, uses).

    centre: its value now, in float64; only its shape, once all that is asked of it was measured.  error: how far rounding took it from the exact one.
    delta: sup distance from ``centre`` on the ball, error included.  size: sup norm on the ball.
    whole_delta: as delta, for all samples together.
    tau: sup norm of the Jacobian in the output of each parametrised step; drift: sup distance of that Jacobian from
    the computed one, whose norm is tau_centre. jacobians: the computed ones, (columns, \\*shape), while they are kept.
    """

    centre: Tensor
    error: np.ndarray
    delta: np.ndarray
    size: np.ndarray
    whole_delta: float
    tau: np.ndarray
    drift: np.ndarray
    tau_centre: np.ndarray
    jacobians: dict[int, Tensor] | None = field(default=None)
    place: int = -1  # of the step in the graph


@dataclass(frozen=True)
class Local:
    """A step's constants on the ball, as a map of one of its inputs: arrays are (samples,).

    J: sup norm of its Jacobian.  drift: sup distance of that from the Jacobian at the centre.  rounding: a product
    of the computed Jacobian with a unit vector errs by at most this.  J_lower: inf of its least singular value, output
    side.  a: sup norm of its second derivative.
    """

    J: np.ndarray
    drift: np.ndarray
    rounding: float = 0.0
    a: float = 0.0
    J_lower: float = 0.0


@dataclass(frozen=True)
class Effect:
    """How far a parameter tensor moves the step that uses it: sup norm of d(output) / d(parameter)."""

    name: str
    D: np.ndarray  # for each sample
    whole: float  # for all samples together


@dataclass(frozen=True)
class Tangents:
    """sup norms of d(input) / d(parameter): for each sample (samples, parameters), and for all together."""

    each: np.ndarray
    whole: np.ndarray


@dataclass(frozen=True)
class Backward:
    """Of the Jacobian from a step's output to the network's: sup norm and sup of its columns' norms, by sample."""

    norm: np.ndarray
    columns: np.ndarray | None  # (samples, size of the output)

    def column_bound(self) -> np.ndarray:
        """(samples, size or 1)."""
        return self.norm[:, None] if self.columns is None else self.columns
