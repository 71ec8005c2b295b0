"""What the walk asks of every step, and the steps without parameters: input, sum, fixed linear map, kinked map."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ...theory.composition import times
from .states import Backward, Ball, Effect, Local, State, Tangents

U = 2.0**-53


class Step:
    """One traced step y = f(theta, x, ...) of the network."""

    source = "THEORY_PAPERS II.2.7"
    derivation = ""
    mixes_samples = False
    covers_block = False  # whether ``everywhere`` bounds the map from the last input, through all that leads to the first
    parameters: tuple[str, ...] = ()  # names of the trainable ones

    def __init__(self, path: str, kind: str) -> None:
        self.path, self.kind = path, kind

    def forward(self, *inputs: Tensor) -> Tensor:
        """The value in float64, differentiable in the inputs."""
        raise NotImplementedError

    def push(self, tangents: Tensor, x: Tensor, position: int = 0) -> Tensor:
        """J t of each tangent (columns, *shape of x) of the input at this position; for a linear map by default."""
        return torch.func.vmap(self.linear)(tangents)

    def linear(self, x: Tensor) -> Tensor:
        """The linear part in x."""
        return self.forward(x)

    def local(self, ball: Ball, inputs: Sequence[State]) -> list[Local]:
        """The constants for each input."""
        raise NotImplementedError

    def size(self, ball: Ball, inputs: Sequence[State], local: Sequence[Local]) -> np.ndarray:
        """sup norm of the output on the ball, from the inputs' sizes; infinity where nothing bounds it."""
        return sum(times(here.J, state.size) for here, state in zip(local, inputs))

    def error(self, ball: Ball, inputs: Sequence[State]) -> np.ndarray:
        """What rounding adds to the computed output, (samples,)."""
        return np.zeros(ball.samples)

    def effects(self, ball: Ball, x: State) -> list[Effect]:
        """The parameters' hold on the output."""
        return []

    def curvature(self, ball: Ball, x: State, at: Tangents, own: Sequence[int], after: Backward) -> np.ndarray | None:
        """What the step's second derivative adds to the network's Q (parameters, parameters); None for nothing.

        own: places of the step's parameters among all.
        """
        return None

    def constants(self, ball: Ball, x: State) -> tuple[float, float]:
        """(b, c): sup norms of the mixed second derivative and of that in the parameters, the samples together."""
        return 0.0, 0.0

    def everywhere(self) -> float:
        """sup ||J|| over all parameters and inputs; for a sum, of each input alone."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise UnboundedError where nothing bounds the step's derivatives in its parameters."""

    def forget(self) -> None:
        """Drop what is kept of the values at the centre."""


class Input(Step):
    """The data."""

    derivation = "the data do not depend on the parameters"


class Sum(Step):
    """y = sum of scale_k x_k."""

    source = "THEORY_PAPERS II.2.7, residual: J = 1"
    derivation = "linear, and each term enters with its scale"

    def __init__(self, path: str, scales: Sequence[float]) -> None:
        super().__init__(path, "sum")
        self.scales = tuple(float(scale) for scale in scales)

    def forward(self, *inputs: Tensor) -> Tensor:
        terms = [x if scale == 1.0 else scale * x for scale, x in zip(self.scales, inputs)]
        return sum(terms[1:], terms[0])

    def push(self, tangents: Tensor, x: Tensor, position: int = 0) -> Tensor:
        return self.scales[position] * tangents

    def local(self, ball: Ball, inputs: Sequence[State]) -> list[Local]:
        return [
            Local(np.full(ball.samples, abs(s)), np.zeros(ball.samples), 2 * len(self.scales) * U * abs(s), 0.0, abs(s))
            for s in self.scales
        ]

    def error(self, ball: Ball, inputs: Sequence[State]) -> np.ndarray:
        terms = [abs(s) * ball.norms(state) for s, state in zip(self.scales, inputs)]
        return 2 * len(terms) * U * sum(terms)


class FixedLinear(Step):
    """y = A x with no parameters.

    norm: at least ||A||.  absolute: at least the norm of |A|, entry by entry.  terms: how many products one output sums.
    lower: at most the smallest singular value of A over its outputs.  moves_only: A is a permutation.
    """

    moves_only = False
    source = "THEORY_PAPERS II.2.7, fixed linear map: a = b = c = 0"

    def __init__(
        self, path: str, kind: str, function: Callable[[Tensor], Tensor], norm: float, *, absolute: float | None = None,
        terms: int = 0, lower: float = 0.0, derivation: str = "linear",
    ) -> None:  # fmt: skip
        super().__init__(path, kind)
        self.function, self.norm, self.lower = function, norm, lower
        self.rounding = (terms + 2) * U * (norm if absolute is None else absolute) if terms else 0.0
        self.derivation = derivation

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(inputs[0])

    def local(self, ball: Ball, inputs: Sequence[State]) -> list[Local]:
        ones = np.full(ball.samples, self.norm)
        return [Local(ones, np.zeros(ball.samples), self.rounding, 0.0, self.lower)]

    def error(self, ball: Ball, inputs: Sequence[State]) -> np.ndarray:
        return self.rounding * ball.norms(inputs[0])

    def everywhere(self) -> float:
        return self.norm


class Kinked(Step):
    """A map with a Lipschitz constant whose slope jumps: ReLU and its kin, and max pooling. It has no curvature bound."""

    source = "THEORY_PAPERS II.2.5: not C1"

    def __init__(self, path: str, kind: str, function: Callable[[Tensor], Tensor], slope: float, at_zero: float) -> None:
        super().__init__(path, kind)
        self.function, self.slope, self.at_zero = function, slope, at_zero
        self.derivation = f"slope at most {slope:g}; its slope jumps, so Lip(J) is infinite"

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(inputs[0])

    def push(self, tangents: Tensor, x: Tensor, position: int = 0) -> Tensor:
        _, pull = torch.func.vjp(self.function, x)
        zero = torch.zeros_like(self.function(x))
        forward = torch.func.vjp(lambda u: pull(u)[0], zero)[1]
        return torch.func.vmap(lambda t: forward(t)[0])(tangents)

    def local(self, ball: Ball, inputs: Sequence[State]) -> list[Local]:
        slope = np.full(ball.samples, self.slope)
        return [Local(slope, 2 * slope, 0.0, np.inf)]

    def size(self, ball: Ball, inputs: Sequence[State], local: Sequence[Local]) -> np.ndarray:
        entries = ball.rows(inputs[0].centre).shape[1]
        return self.slope * inputs[0].size + abs(self.at_zero) * entries**0.5

    def error(self, ball: Ball, inputs: Sequence[State]) -> np.ndarray:
        return 16 * U * self.slope * ball.norms(inputs[0])

    def curvature(self, ball, x, at, own, after) -> np.ndarray:
        depends = (at.whole > 0).astype(float)
        return times(np.inf, np.outer(depends, depends) * float(after.norm.max() > 0))

    def everywhere(self) -> float:
        return self.slope
