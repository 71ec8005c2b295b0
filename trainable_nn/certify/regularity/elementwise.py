r"""Smooth activations: on the ball each entry z stays within delta of its value now, so its slope and curvature do too.

sup |phi'| <= min(sup everywhere, |phi'(z)| + M delta) and sup |phi''| <= min(M, |phi''(z)| + jerk delta), entry by
entry. The second derivative is diagonal, so weighted by what follows, B, it is at most max_j \|B_j\| |phi''(z_j)|.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...theory.composition import times
from .states import Backward, Ball, Local, State, Tangents
from .steps import Step, U

SLACK = 2.0**-40  # of the largest slope or curvature, at least 1: far above the rounding of autograd's in float64


@dataclass(frozen=True)
class Smooth:
    """Constants of phi: slope >= |phi'|, curvature >= |phi''|, jerk >= |phi'''|, largest >= |phi|."""

    slope: float
    curvature: float
    jerk: float = np.inf
    at_zero: float = 0.0
    largest: float = np.inf

    @property
    def slack(self) -> tuple[float, float]:
        """At least what autograd's phi' and phi'' in float64 are off by."""
        return SLACK * max(self.slope, 1.0), SLACK * max(self.curvature, 1.0)


class Elementwise(Step):
    """y = phi(x), entry by entry."""

    source = "THEORY_PAPERS II.2.5 and II.2.7: J = B, a = M"

    def __init__(self, path: str, kind: str, function: Callable[[Tensor], Tensor], phi: Smooth) -> None:
        super().__init__(path, kind)
        self.function, self.phi = function, phi
        self.derivation = (
            f"|phi'| <= min({phi.slope:.6g}, |phi'(z)| + {phi.curvature:.6g} delta), "
            f"|phi''| <= min({phi.curvature:.6g}, |phi''(z)| + {phi.jerk:.6g} delta)"
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(inputs[0])

    def push(self, tangents: Tensor, x: Tensor, position: int = 0) -> Tensor:
        return tangents * self._derivatives(x)[0]

    def local(self, ball: Ball, inputs: Sequence[State]) -> list[Local]:
        state, phi = inputs[0], self.phi
        most, least, _ = self._extremes(ball, state)
        moved = times(phi.curvature, state.delta)
        J = np.minimum(most + moved, phi.slope)
        slack = phi.slack[0]
        lower = float(np.maximum(least - 2 * slack - moved, 0.0).min()) / (1 + 8 * U)
        drift = np.minimum(moved + slack, 2 * phi.slope)
        return [Local(J, drift, 4 * U * phi.slope, float(self._most_curved(ball, state).max()), lower)]

    def size(self, ball: Ball, inputs: Sequence[State], local: Sequence[Local]) -> np.ndarray:
        root = np.sqrt(ball.rows(inputs[0].centre).shape[1])
        linear = self.phi.slope * inputs[0].size + abs(self.phi.at_zero) * root
        return np.minimum(linear, self.phi.largest * root)

    def error(self, ball: Ball, inputs: Sequence[State]) -> np.ndarray:
        root = np.sqrt(ball.rows(inputs[0].centre).shape[1])
        return 32 * U * (self.phi.slope * ball.norms(inputs[0]) + (abs(self.phi.at_zero) + 1.0) * root)

    def curvature(self, ball: Ball, x: State, at: Tangents, own: Sequence[int], after: Backward) -> np.ndarray:
        if after.columns is None:
            return quadratic(times(after.norm, self._most_curved(ball, x)), at)
        return quadratic(times(after.columns, self._curvatures(ball, x)).max(axis=1), at)

    def everywhere(self) -> float:
        return self.phi.slope

    def _extremes(self, ball: Ball, state: State) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(samples,) each: the largest and the least |phi'(z)| and the largest |phi''(z)| now."""

        def measure():
            derivatives = zip(self._derivatives(state.centre), self.phi.slack)
            first, second = (np.abs(ball.rows(d).numpy()) + slack for d, slack in derivatives)
            return first.max(axis=1), first.min(axis=1), second.max(axis=1)

        return ball.measured("slopes", measure)

    def _most_curved(self, ball: Ball, state: State) -> np.ndarray:
        """(samples,) the largest entry of ``_curvatures``, which grow together."""
        return np.minimum(self._extremes(ball, state)[2] + times(self.phi.jerk, state.delta), self.phi.curvature)

    def forget(self) -> None:
        """Drop the derivatives that are kept."""
        self._kept = (None,)

    def _curvatures(self, ball: Ball, state: State) -> np.ndarray:
        """(samples, entries)."""
        second = np.abs(ball.rows(self._derivatives(state.centre)[1]).numpy()) + self.phi.slack[1]
        return np.minimum(second + times(self.phi.jerk, state.delta)[:, None], self.phi.curvature)

    def _derivatives(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """phi'(z) and phi''(z); kept, since they are asked for more than once."""
        if getattr(self, "_kept", (None,))[0] is not z:
            with torch.enable_grad():
                point = z.detach().requires_grad_()
                (first,) = torch.autograd.grad(self.function(point).sum(), point, create_graph=True)
                (second,) = torch.autograd.grad(first.sum(), point) if first.requires_grad else (torch.zeros_like(z),)
            self._kept = (z, (first.detach(), second.detach()))
        return self._kept[1]


def quadratic(weights: np.ndarray, at: Tangents) -> np.ndarray:
    """Entries at least sup ||(w_i |x_i'| |x_i''|)_i||: by samples, or the largest sample times all together."""
    weighted = times(weights[:, None], at.each)
    finite = np.isfinite(weighted).all() and np.isfinite(at.each).all()
    by_sample = np.sqrt(np.square(weighted).T @ np.square(at.each)) if finite else np.inf
    joint = times(weighted.max(axis=0)[:, None], at.whole[None, :])
    return np.minimum(np.minimum(joint, joint.T), by_sample)
