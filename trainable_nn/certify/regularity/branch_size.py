r"""The smooth size S(theta) of a branch on a ball of parameters: what ``modules.lipschitz`` multiplies, with derivatives.

A linear part has s = 1.1 f l, l = (1e-24 + \|w\|^2)^(1/2), w = diag(gamma / floor) P(v). With D_k = sup \|D_k w\| and
W_kl = sup \|D_k D_l w\| on the ball, \|D_k s\| / s <= D_k / l and \|D_k D_l s\| / s <= W_kl / l + D_k D_l / l^2, and l is at
least its value now less what w moves. A diagonal part has 1.1 N, N the 8-norm of gamma / floor: \|D N\| <= 1 / floor, since
the 8/7-norm of its gradient is 1 and no less than the Euclidean one, and \|D^2 N\| <= 7 / (floor^2 N).

V, what is proved at the anchors, is at most 1 / 1.1 of s where nothing but the Frobenius norm proves it, and at most
B + f \|w - w0\| with an anchor.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from ...errors import UnboundedError
from ...modules.anchor import ABOVE, Anchor, DiagonalPart, LinearPart, acting_weight, distance_to
from ...theory.composition import times
from ...theory.following_scale import MARGIN, SizeOnBall
from .affine import Affine
from .states import Ball, U

TINY = 1e-12  # the root of what is added to |w|^2
TINIEST = 1e-24  # the eighth root of what is added to N^8


@dataclass
class Parts:
    """Sizes of a branch's parts on one ball, in the place of what bounds them at one point.

    prefix: path of the block.  modules, anchors: by paths in it.  steps: by paths in the network.  floors: of l, by part.
    seen: part -> (1.1 f, the largest s), as they are asked for.
    """

    ball: Ball
    prefix: str
    modules: Mapping[str, nn.Module]
    anchors: Mapping[str, Anchor]
    steps: Mapping[str, Affine]
    floors: Mapping[str, float] = field(default_factory=dict)
    seen: dict[str, tuple[float, float]] = field(default_factory=dict)

    def linear(self, part: LinearPart) -> SizeOnBall:
        step = self._step(part)
        slope, radius = step.slope(self.ball), step.moved(self.ball)
        reach, row = float(times(slope, radius)), _norm(step.weight.flatten(1).norm(dim=1).max(), step.free.shape[1])
        rho, unit, gamma = self._scales(part)
        weight = self._name(part.path) if step.trains_weight else ""
        speeds = {weight: float(times(rho, slope)), gamma: float(times(unit, row + reach))}
        bends = {(weight, weight): float(times(rho, step.bend(self.ball))), (weight, gamma): float(times(unit, slope))}
        bends[gamma, weight] = bends[weight, gamma]
        moved = float(times(rho, reach)) + (float(times(unit * row, self.ball.radius)) if gamma else 0.0)
        acting = acting_weight(part).detach().double()
        size = self._size(part, ABOVE * part.factor, acting.norm(), acting.numel(), moved, TINY, speeds, bends)
        return SizeOnBall(size.least, size.most, self._ratio(part, size, moved), size.first, size.second)

    def diagonal(self, part: DiagonalPart) -> SizeOnBall:
        unit = MARGIN / part.floor
        name = self._name(part.path) if self.modules[part.path].weight.requires_grad else ""
        scales = part.weight.detach().double().abs() / part.floor
        now = scales.square().square().square().sum() ** 0.125
        moved = float(times(unit, self.ball.radius)) if name else 0.0
        size = self._size(part, ABOVE, now, part.weight.numel(), moved, TINIEST, {name: unit}, {}, bend=7.0)
        largest = (float(scales.max()) + moved) * MARGIN  # what is proved, on the ball; at most N everywhere
        ratio = min(1.0 / ABOVE, largest / size.least) * MARGIN
        return SizeOnBall(size.least, size.most, ratio, size.first, size.second)

    def _size(self, part, factor, now: Tensor, entries: int, moved, tiny, speeds, bends, bend=1.0) -> SizeOnBall:
        """factor (tiny^p + n^p)^(1/p) for a norm n whose argument has these derivatives; ``bend`` / n bounds its second one."""
        low, high = float(now) / (1.0 + entries * U) / MARGIN - moved, _norm(now, entries) + moved
        least = max(low, tiny, self.floors.get(part.path, 0.0))
        first = {k: speed / least * MARGIN for k, speed in speeds.items() if k}
        second = {(k, l): times(bend, times(first[k], first[l])) * MARGIN for k in first for l in first}
        for (k, l), value in bends.items():
            if k and l:
                second[k, l] = second[k, l] + value / least * MARGIN
        most = factor * (high + tiny) * MARGIN
        self.seen[part.path] = factor, most
        return SizeOnBall(factor * least / MARGIN, most, 1.0, first, {pair: float(v) for pair, v in second.items()})

    def _ratio(self, part: LinearPart, size: SizeOnBall, moved: float) -> float:
        """sup V / s: by the Frobenius norm everywhere, or by the anchor on the ball."""
        roundings = 1.0 + (2 * (part.weight[0].numel() + 8) + 16) * U
        ratio, anchor = roundings / ABOVE, self.anchors.get(part.path)
        if anchor is not None and anchor.fits(part):
            proved = (float(anchor.bound) + distance_to(anchor, part) + part.factor * moved) * roundings
            ratio = min(ratio, min(proved, part.supremum) / size.least)
        return ratio * MARGIN

    def _scales(self, part: LinearPart) -> tuple[float, float, str]:
        """sup \\|gamma / floor\\|, 1 / floor and the parameter, "" where it does not train; (1, 0, "") without one."""
        if part.rows is None:
            return 1.0, 0.0, ""
        after = self.modules[part.after]
        unit, trains = MARGIN / after.floor, after.weight.requires_grad
        moved = float(times(unit, self.ball.radius)) if trains else 0.0
        return float(part.rows.detach().abs().max()) * MARGIN + moved, unit, self._name(part.after) if trains else ""

    def _step(self, part: LinearPart) -> Affine:
        path = f"{self.prefix}.{part.path}".lstrip(".")
        if path not in self.steps:
            raise UnboundedError(f"{path}: the block's scale reads this layer, and its branch does not run it. Remove it.")
        return self.steps[path]

    def _name(self, path: str) -> str:
        return f"{self.prefix}.{path}.weight".lstrip(".")


def _norm(now: Tensor, entries: int) -> float:
    """At least the norm that float64 has computed."""
    return float(now) * (1.0 + entries * U) * MARGIN


def unit_sizes(part: LinearPart | DiagonalPart) -> SizeOnBall:
    """1 for each part: their product is the number before them."""
    return SizeOnBall(1.0, 1.0, 1.0)


def least_that_matter(parts: Parts, number: float, needed: float) -> dict[str, float]:
    """The least l of each part where a product of sizes, times the number, is at least ``needed``, from the most of the others."""
    floors = {}
    for path, (factor, _) in parts.seen.items():
        others = math.prod([most for other, (_, most) in parts.seen.items() if other != path], start=number * factor)
        if 0.0 < others < math.inf:
            floors[path] = needed / others / MARGIN
    return floors
