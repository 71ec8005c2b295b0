r"""Layer and group normalisation: y = gamma v(x) + beta, v = w / s in each group of n entries of one sample.

w is the group less its mean, s^2 = \|w\|^2 / n + eps: the map of batch normalisation on one channel (``normalisation``), so
\|\|J v\|\| <= 1 / s <= eps^(-1/2), \|\|D^2 v\|\| <= n^(-1/2) min(C3 / eps, (2 / sqrt 3) / s^2) and |v| <= n^(1/2), everywhere; and when x
moves by delta, s falls by delta n^(-1/2) at most. Groups are beside each other, so the steepest counts.

Source: paper A, (25) to (29), for one sample; THEORY_PAPERS II.2.3.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ...theory.composition import times
from ...theory.nonlinearities import C3
from .elementwise import quadratic
from .norms import deviations, frobenius_at_most
from .states import Backward, Ball, Effect, Local, State, Tangents
from .steps import Step, U
from .twin import doubled

UP = 1.0 + 2.0**-40


class SampleNormalisation(Step):
    """nn.LayerNorm or nn.GroupNorm."""

    source = "paper A (25)-(29); THEORY_PAPERS II.2.3"
    derivation = "J = |gamma| / s, a = |gamma| n^(-1/2) min(C3 / eps, 1.1547 / s^2), s at least its value now less delta n^(-1/2)"

    def __init__(self, path: str, module: nn.LayerNorm | nn.GroupNorm) -> None:
        super().__init__(path, type(module).__name__)
        self.module = twin = doubled(module)
        self.is_layer_norm, self.eps = isinstance(module, nn.LayerNorm), float(module.eps)
        self.gamma = None if twin.weight is None else twin.weight.detach()
        self.beta = None if twin.bias is None else twin.bias.detach()
        self.trains = tuple(p is not None and p.requires_grad for p in (module.weight, module.bias))
        self.parameters = tuple(
            f"{path}.{name}".lstrip(".") for name, trains in zip(("weight", "bias"), self.trains) if trains
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.module(inputs[0])

    def push(self, tangents: Tensor, x: Tensor, position: int = 0) -> Tensor:
        return torch.func.vmap(lambda t: torch.func.jvp(self.forward, (x,), (t,))[1])(tangents)

    def local(self, ball: Ball, inputs: Sequence[State]) -> list[Local]:
        gamma, (slope, curvature) = self._largest_gamma(ball), self._steepness(ball, inputs[0])
        J, a = times(gamma, slope), float(times(gamma, curvature).max())
        turned = times(ball.radius, slope) if self.trains[0] else 0.0
        drift = np.minimum(times(a, inputs[0].delta) + turned, 2 * J)
        rounding = float((4 * self._entries(inputs[0].centre) + 64) * U * J.max())
        return [Local(J, drift, rounding, a)]

    def size(self, ball: Ball, inputs: Sequence[State], local: Sequence[Local]) -> np.ndarray:
        x = inputs[0]
        moved = sum(times(ball.radius, effect.D) for effect in self.effects(ball, x))
        linear = times(local[0].J, x.delta) + self._norms_now(ball, x) + moved
        shift = 0.0 if self.beta is None else float(self.beta.norm()) * UP + (ball.radius if self.trains[1] else 0.0)
        root, uses = math.sqrt(x.centre.numel() // ball.samples) * UP, self._uses(ball, x.centre)
        return np.minimum(linear, float(times(self._largest_gamma(ball), root)) + shift * math.sqrt(uses) * UP)

    def error(self, ball: Ball, inputs: Sequence[State]) -> np.ndarray:
        x = inputs[0]
        zero = np.zeros(ball.samples)
        still = State(x.centre, zero, zero, ball.norms(x), 0.0, zero, zero, zero, place=x.place)
        J = self._largest_gamma(Ball(0.0, ball.samples)) * self._steepness(ball, still)[0]
        return (4 * self._entries(x.centre) + 64) * U * (J * ball.norms(x) + self._norms_now(ball, x))

    def effects(self, ball: Ball, x: State) -> list[Effect]:
        """D of gamma: the longest of the entries of v that one number scales; D of beta: the root of how many it shifts."""
        if not self.parameters:
            return []
        slope, _ = self._steepness(ball, x)
        now, together = ball.measured("scaled", lambda: self._scaled(ball, x.centre))
        uses, n = self._uses(ball, x.centre), self._entries(x.centre)
        most = math.sqrt(n * (uses if self.is_layer_norm else len(x.centre) // ball.samples)) * UP
        each = np.minimum(now + times(slope, x.delta), most)
        whole = min(together + float(times(slope.max(), x.whole_delta)), float(np.sqrt(np.square(each).sum())) * UP)
        root = math.sqrt(uses) * UP
        found = [(each, whole), (np.full(ball.samples, root), root * math.sqrt(ball.samples) * UP)]
        return [Effect(name, *pair) for name, pair in zip(self.parameters, (f for f, t in zip(found, self.trains) if t))]

    def curvature(self, ball: Ball, x: State, at: Tangents, own: Sequence[int], after: Backward) -> np.ndarray:
        slope, second = self._steepness(ball, x)
        Q = quadratic(times(after.norm, times(self._largest_gamma(ball), second)), at)
        if self.trains[0]:
            steep = times(after.norm, slope)
            by_sample = np.sqrt(np.square(times(steep[:, None], at.each)).sum(axis=0))
            cross = np.minimum(by_sample, times(float(steep.max()), at.whole))
            Q[own[0], :] += cross
            Q[:, own[0]] += cross
        return Q

    def constants(self, ball: Ball, x: State) -> tuple[float, float]:
        return (float(self._steepness(ball, x)[0].max()), 0.0) if self.trains[0] else (0.0, 0.0)

    def everywhere(self) -> float:
        if self.trains[0] or self.eps <= 0.0:
            return math.inf
        return self._largest_gamma(Ball(0.0, 1)) / math.sqrt(self.eps) * UP

    def _largest_gamma(self, ball: Ball) -> float:
        now = 1.0 if self.gamma is None else float(self.gamma.abs().max())
        return now + (ball.radius if self.trains[0] else 0.0)

    def _grouped(self, x: Tensor) -> Tensor:
        """(batch, groups, entries of a group)."""
        if self.is_layer_norm:
            return x.reshape(len(x), -1, math.prod(self.module.normalized_shape))
        return x.reshape(len(x), self.module.num_groups, -1)

    def _entries(self, x: Tensor) -> int:
        """n."""
        return math.prod(self.module.normalized_shape) if self.is_layer_norm else x[0].numel() // self.module.num_groups

    def _uses(self, ball: Ball, x: Tensor) -> int:
        """Entries of a sample that one number of gamma scales; of all of them where the samples count as one."""
        return x.numel() // ball.samples // (self._entries(x) if self.is_layer_norm else self.module.num_channels)

    def _steepness(self, ball: Ball, x: State) -> tuple[np.ndarray, np.ndarray]:
        """sup ||J v|| and sup ||D^2 v|| of each sample."""
        root = math.sqrt(self._entries(x.centre))
        spread, slack = (found.reshape(ball.samples, -1) for found in ball.measured("spread", lambda: self._spread(x.centre)))
        low = np.maximum(spread - slack - (x.delta / root * UP)[:, None], 0.0).min(axis=1)
        squared = (self.eps + np.square(low)) / UP
        with np.errstate(divide="ignore"):
            curved = np.minimum(C3 / self.eps if self.eps > 0 else math.inf, 2.0 / math.sqrt(3.0) / squared)
            return UP / np.sqrt(squared), curved / root * UP

    def _spread(self, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """(batch, groups): the deviation now, and what rounding can have added."""
        spread, slack = deviations(self._grouped(x))
        return spread.numpy(), slack.numpy()

    def _scaled(self, ball: Ball, x: Tensor) -> tuple[np.ndarray, float]:
        """The norm of the entries of v that one number of gamma scales: the largest of each sample, and of all together."""
        groups = self._grouped(x)
        centred = groups - groups.mean(2, keepdim=True)
        v = centred / (centred.square().mean(2, keepdim=True) + self.eps).sqrt()
        squares = v.square().sum(1) if self.is_layer_norm else v.reshape(len(x), self.module.num_channels, -1).square().sum(2)
        each = squares.reshape(ball.samples, -1, squares.shape[1]).sum(1)
        return each.amax(1).sqrt().numpy() * UP, float(squares.sum(0).amax().sqrt()) * UP

    def _norms_now(self, ball: Ball, x: State) -> np.ndarray:
        return ball.measured("outputs", lambda: frobenius_at_most(ball.rows(self.forward(x.centre))))
