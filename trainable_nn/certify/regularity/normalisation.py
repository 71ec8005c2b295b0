r"""Batch normalisation: a fixed scale in evaluation; in training a map of the whole batch, with or without a floor.

For a channel of n values, centred part w, var = |w|^2 / n, s = (var + eps)^(1/2), the map is v = w / m(s); plain, m = s.

    plain    \|\|J v\|\| = 1 / s, \|\|D^2 v\|\| <= n^(-1/2) min(C3 / eps, (2 / sqrt 3) / s^2), |v| <= n^(1/2)
    floored  m = max(s, floor): linear below the floor, plain above it; in between its slope jumps
    smooth   m = floor + s^2 / (4 floor) below 2 floor: \|\|D^2 v\|\| <= 0.9744 floor^(-2) n^(-1/2), plain above

The last: 1 / m = h(var) has h' = -k h^2, h'' = 2 k^2 h^3, k = 1 / (4 floor), and D^2 v is a symmetric 3-tensor, so its norm
is that of (var / n)^(1/2) \|6 h' t + 4 h'' var t^3\| for t in [0, 1], at most (var / n)^(1/2) 6 k h^2; largest at var = floor / (3 k).

Source: paper A, (25) to (29); THEORY_PAPERS II.2.3. The smooth floor is ours.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from ...theory.composition import times
from ...theory.nonlinearities import C3
from .norms import deviations, frobenius_at_most
from .states import Backward, Ball, Effect, Local, State, Tangents
from .steps import Step, U
from .twin import doubled

SMOOTH_CURVATURE = 0.9744  # 6 / 2 times max x (1 + x^2)^-2 = 3 sqrt 3 / 16
UP = 1.0 + 2.0**-40


class Normalisation(Step):
    """y = gamma v(x) + beta by channels; gamma and beta may be trained."""

    source = "paper A (25)-(29); THEORY_PAPERS II.2.3"

    def __init__(self, path: str, module: nn.Module) -> None:
        super().__init__(path, type(module).__name__)
        self.module = twin = doubled(module)
        channels = module.num_features
        self.gamma = torch.ones(channels, dtype=torch.float64) if twin.weight is None else twin.weight
        self.beta = torch.zeros(channels, dtype=torch.float64) if twin.bias is None else twin.bias
        self.trains = tuple(p is not None and p.requires_grad for p in (module.weight, module.bias))
        self.parameters = tuple(
            f"{path}.{name}".lstrip(".") for name, trains in zip(("weight", "bias"), self.trains) if trains
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        x = inputs[0]
        shape = (1, -1, *(1,) * (x.dim() - 2))
        return self.normalised(x) * self.gamma.reshape(shape) + self.beta.reshape(shape)

    def normalised(self, x: Tensor) -> Tensor:
        """v(x)."""
        raise NotImplementedError

    def steepness(self, ball: Ball, x: State) -> tuple[np.ndarray, np.ndarray]:
        """sup ||J v|| and sup ||D^2 v|| of each channel."""
        raise NotImplementedError

    def push(self, tangents: Tensor, x: Tensor, position: int = 0) -> Tensor:
        return torch.func.vmap(lambda t: torch.func.jvp(self.forward, (x,), (t,))[1])(tangents)

    def largest_gamma(self, ball: Ball) -> np.ndarray:
        return self.gamma.abs().numpy() + (ball.radius if self.trains[0] else 0.0)

    def local(self, ball: Ball, inputs: Sequence[State]) -> list[Local]:
        x, gamma = inputs[0], self.largest_gamma(ball)
        slope, curvature = self.steepness(ball, x)
        J = float(times(gamma, slope).max())
        a = float(times(gamma, curvature).max())
        turned = float(times(ball.radius, slope.max())) if self.trains[0] else 0.0
        drift = np.minimum(times(a, x.delta) + turned, 2 * J)
        rounding = (4 * x.centre.numel() // max(len(gamma), 1) + 64) * U * J
        return [Local(np.full(ball.samples, J), drift, rounding, a)]

    def size(self, ball: Ball, inputs: Sequence[State], local: Sequence[Local]) -> np.ndarray:
        linear = times(local[0].J, inputs[0].delta) + self._norms_now(ball, inputs[0])
        moved = sum(float(times(ball.radius, D)) for D in self._holds(ball, inputs[0], trained=True)[1])
        return linear + moved

    def error(self, ball: Ball, inputs: Sequence[State]) -> np.ndarray:
        x = inputs[0]
        slope, _ = self.steepness(replace(ball, radius=0.0), _still(ball, x))
        J = float((self.gamma.abs().numpy() * slope).max())
        terms = x.centre.numel() // max(len(self.gamma), 1) + 64
        return terms * U * (J * ball.norms(x) + self._norms_now(ball, x))

    def _norms_now(self, ball: Ball, x: State) -> np.ndarray:
        return ball.measured("outputs", lambda: frobenius_at_most(ball.rows(self.forward(x.centre))))

    def effects(self, ball: Ball, x: State) -> list[Effect]:
        each, whole = self._holds(ball, x, trained=True)
        return [Effect(name, e, w) for name, e, w in zip(self.parameters, each, whole)]

    def _holds(self, ball: Ball, x: State, *, trained: bool):
        """D of gamma: the longest channel of v(x); D of beta: the root of a channel's entries."""
        slope, _ = self.steepness(ball, x)
        each, whole = ball.measured("channels", lambda: self._channels(ball, x.centre))
        each = each + times(float(slope.max()), x.delta)
        whole = whole + float(times(float(slope.max()), x.whole_delta))
        entries = x.centre.numel() // x.centre.shape[1]
        root = math.sqrt(entries) * UP
        bound = self.longest(entries)
        found = [
            (np.minimum(each, bound), min(whole, bound)),
            (np.full(ball.samples, root / math.sqrt(ball.samples) * UP), root),
        ]
        kept = [pair for pair, trains in zip(found, self.trains) if trains or not trained]
        return [pair[0] for pair in kept], [pair[1] for pair in kept]

    def _channels(self, ball: Ball, x: Tensor) -> tuple[np.ndarray, float]:
        """Norm of the longest channel of v(x), for each sample and for all together."""
        values = self.normalised(x)
        samples = values.reshape(ball.samples, -1, *values.shape[1:]).transpose(1, 2).flatten(2)
        each = samples.square().sum(2).sqrt().amax(1).numpy() * UP
        return each, float(values.transpose(0, 1).flatten(1).square().sum(1).sqrt().amax()) * UP

    def longest(self, entries: int) -> float:
        """sup |v| of a channel with this many entries."""
        return math.inf

    def curvature(self, ball: Ball, x: State, at: Tangents, own: Sequence[int], after: Backward) -> np.ndarray:
        from .elementwise import quadratic

        slope, second = self.steepness(ball, x)
        a = float(times(self.largest_gamma(ball), second).max())
        Q = quadratic(times(after.norm, a), at)
        if self.trains[0]:
            steep = float(slope.max())
            by_sample = np.sqrt(np.square(times(after.norm[:, None] * steep, at.each)).sum(axis=0))
            cross = np.minimum(by_sample, times(float(after.norm.max()) * steep, at.whole))
            Q[own[0], :] += cross
            Q[:, own[0]] += cross
        return Q

    def constants(self, ball: Ball, x: State) -> tuple[float, float]:
        return (float(self.steepness(ball, x)[0].max()), 0.0) if self.trains[0] else (0.0, 0.0)

    def everywhere(self) -> float:
        if self.trains[0]:
            return math.inf
        return float((self.gamma.abs().numpy() * self.steepest()).max()) * UP

    def steepest(self) -> np.ndarray:
        """sup ||J v|| over every batch."""
        raise NotImplementedError


class FixedNormalisation(Normalisation):
    """Evaluation: v(x) = (x - mean) / m, the mean and m being buffers."""

    derivation = "J = max |gamma| / m, D_gamma = the longest channel of v(x), b = 1 / m, linear in x"

    def __init__(self, path: str, module: nn.Module) -> None:
        super().__init__(path, module)
        self.mean = self.module.running_mean
        self.scale = 1.0 / denominator(module, self.module.running_var + module.eps)

    def normalised(self, x: Tensor) -> Tensor:
        shape = (1, -1, *(1,) * (x.dim() - 2))
        return (x - self.mean.reshape(shape)) * self.scale.reshape(shape)

    def linear(self, x: Tensor) -> Tensor:
        return x * (self.scale * self.gamma).reshape(1, -1, *(1,) * (x.dim() - 2))

    def steepness(self, ball: Ball, x: State) -> tuple[np.ndarray, np.ndarray]:
        scale = self.scale.numpy() * UP
        return scale, np.zeros_like(scale)

    def steepest(self) -> np.ndarray:
        return self.scale.numpy() * UP


class BatchNormalisation(Normalisation):
    """Training: mean and variance of the batch, whose samples meet here."""

    mixes_samples = True
    derivation = "J = |gamma| / m(s), a = |gamma| sup ||D^2 v||, with s at least its value now less delta n^(-1/2)"

    def normalised(self, x: Tensor) -> Tensor:
        axes = [0, *range(2, x.dim())]
        centred = x - x.mean(axes, keepdim=True)
        return centred / denominator(self.module, centred.square().mean(axes, keepdim=True) + self.module.eps)

    def longest(self, entries: int) -> float:
        return math.sqrt(entries) * UP

    def steepness(self, ball: Ball, x: State) -> tuple[np.ndarray, np.ndarray]:
        n, eps = x.centre.numel() // x.centre.shape[1], self.module.eps
        spread, slack = ball.measured("spread", lambda: self._spread(x.centre))
        moved = x.whole_delta / math.sqrt(n) * UP
        low, high = np.maximum(spread - slack - moved, 0.0), spread + slack + moved
        s_low, s_high = np.sqrt(eps + low**2) / UP, np.sqrt(eps + high**2) * UP
        slope = UP / denominator(self.module, torch.from_numpy(s_low**2)).numpy()
        return slope, self._curvature(s_low, s_high) / math.sqrt(n) * UP

    def _spread(self, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Standard deviations of the channels, and what rounding can have added."""
        spread, slack = deviations(x.transpose(0, 1).flatten(1))
        return spread.numpy(), slack.numpy()

    def _curvature(self, s_low: np.ndarray, s_high: np.ndarray) -> np.ndarray:
        plain = np.minimum(C3 / self.module.eps, 2.0 / math.sqrt(3.0) / s_low**2) * UP
        floor = getattr(self.module, "floor", None)
        if floor is None:
            return plain
        if self.module.smooth:
            return np.where(s_low >= 2 * floor, plain, np.maximum(SMOOTH_CURVATURE, 2 / math.sqrt(3.0) / 4) / floor**2)
        return np.where(s_high < floor, 0.0, np.where(s_low > floor, plain, math.inf))

    def steepest(self) -> np.ndarray:
        least = torch.full_like(self.gamma, self.module.eps)
        return (UP / denominator(self.module, least)).numpy()


def denominator(module: nn.Module, squared: Tensor) -> Tensor:
    """m(s), for s^2 = var + eps."""
    s, floor = squared.sqrt(), getattr(module, "floor", None)
    if floor is None:
        return s
    if module.smooth:
        return torch.where(s < 2 * floor, floor + squared / (4 * floor), s)
    return s.clamp(min=floor)


def _still(ball: Ball, x: State) -> State:
    """The state as if it did not move."""
    zero = np.zeros(ball.samples)
    return State(x.centre, zero, zero, ball.norms(x), 0.0, zero, zero, zero, place=x.place)
