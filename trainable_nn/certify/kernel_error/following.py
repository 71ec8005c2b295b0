r"""Rounding of the scale a(theta) of a SpectrallyBoundedResidual while its weights train: y = a z, a = c / h(r), r = t S / bound.

S is sums and products of sizes of single tensors, all terms of one sign, so relative errors add: a size 1.1 f (1e-24 + \|w\|^2)^(1/2) of
n entries errs by (n + 16) u, and by what the entries of P(v) err; a 8-norm of n entries by less. So r errs by e, relatively, the
sum over all sizes (``_Scale.relative``). What the proof shows in the scale is a factor 1, exactly, wherever there is a rule at all.

As 0 <= h' <= 1 and h >= r, h errs by h e of r's error. Its own formula h = 1 + s - w m, s = r - start, w = 1/2, m <= 1 with a
relative error of 30 u, errs by 32 u h. So a errs relatively by e + 48 u, the quotient and two products with it.

Its gradient is D_k a = -(c / h^2) h'(r) r D_k S / S. Computed, h' errs by 64 u of its own formula, differences of numbers up to 1,
and by h'' r e with h'' <= 2; as r <= h, both together count (64 u + 2 e) \|D_k S\| / S. All else errs relatively: 2 (e + 32 u) of h^2, 16 u of
quotients and products, and d_k of D_k S: e again, n + 64 roundings of the sums, twice what the entries of P(v) err, and what P' errs. With
s_k >= \|D_k S\| / S thus \|D_k a\| <= s_k errs by (4 e + 160 u + d_k) s_k.

A row in theta_k is <g, z> D_k a for each output's gradient g in y, and Cauchy-Schwarz gives sum over the outputs <g, z>^2 <= \|\|G\|\|^2 \|z\|^2.

On a ball a is at least and at most what ``FollowingScale`` proves there, so y moves by a_max \|move of z\| + \|move of a\| \|z\|.

Source: ours; h and its derivatives in ``theory.following_scale``, S in ``certify.regularity.branch_size``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np

from ...errors import UnboundedError
from ...modules.anchor import DiagonalPart, LinearPart
from ...modules.lipschitz import Reading, lipschitz_bound
from ...theory.following_scale import SizeOnBall
from ..regularity.branch_size import unit_sizes
from ..regularity.following import FollowingScale
from ..regularity.states import Ball
from .affine import RELATIVE, weight_error
from .rules import Rounding
from .states import LOST, UP, Gradients, Part, U, Value, gamma

SIZE = 16  # roundings of a size beside its sum: 1.1 f, 1e-24, the root, a row's factor, and the product or sum that takes it
SCALE, SLOPE, REST = 48, 160, 64  # of a, of D_k a, and of D_k S beside its sums


@dataclass(frozen=True)
class _Scale:
    """relative: e.  most: sup a here.  first: parameter -> sup ||D_k a||.  off: parameter -> the error of D_k a."""

    relative: float
    most: float
    first: dict[str, float]
    off: dict[str, float]


class FollowingRounding(Rounding):
    """The scale of a block that is not frozen; the second input, the block's, only says what holds from there."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[FollowingScale, _Scale] = WeakKeyDictionary()

    def check(self, step: FollowingScale) -> None:
        if step not in self._known:
            step.check()
            self._known[step] = _scale_of(step)

    def slope(self, step: FollowingScale, position: int) -> float:
        return self._of(step).most if position == 0 else 0.0

    def forward(self, step: FollowingScale, inputs: Sequence[Value]) -> np.ndarray:
        z, a = inputs[0], self._of(step)
        return a.most * (z.error + (a.relative + 4 * U) * z.norm) * UP + LOST

    def on_ball(self, step: FollowingScale, inputs: Sequence[Value], radius: float) -> tuple[np.ndarray, np.ndarray]:
        z = inputs[0]
        least, most, first, _ = step._scale(Ball(radius, len(z.error)))
        if not all(map(math.isfinite, first.values())):
            raise UnboundedError(f"{step.path}: within {radius:.4g} this SpectrallyBoundedResidual may set its scale anew.")
        moved = (most - least) * UP
        error = most * (z.error + (self._of(step).relative + 4 * U) * z.norm)
        return error * UP + LOST, (most * z.moved + moved * z.norm) * UP

    def backward(self, step: FollowingScale, inputs: Sequence[Value], y: Gradients) -> list[np.ndarray]:
        a = self._of(step)
        found = a.most * (y.error + (a.relative + 4 * U) * y.norm) * UP + LOST
        return [found, np.zeros(len(y.error))]

    def parts(self, step: FollowingScale, x: Value, y: Gradients) -> list[Part]:
        a, found = self._of(step), []
        paired = x.norm * y.norm * UP
        off = (y.error * x.norm + y.norm * x.error + gamma(x.entries + 8) * paired) * UP
        for name in step.parameters:
            columns = step.twin.get_parameter(_inside(step, name)).numel()
            error = ((a.first[name] + a.off[name]) * off + a.off[name] * paired) * UP + LOST
            size = (a.first[name] + a.off[name]) * paired * UP
            found.append(Part(name, error, size, columns, 4 * (columns + x.entries) + 64, columns + 8))
        return found

    def _of(self, step: FollowingScale) -> _Scale:
        self.check(step)
        return self._known[step]


def _inside(step: FollowingScale, name: str) -> str:
    return name.removeprefix(f"{step.path}.") if step.path else name


def _scale_of(step: FollowingScale) -> _Scale:
    seen: list[tuple[float, float]] = []  # what each size errs, and what its derivatives err beside

    def linear(part: LinearPart) -> SizeOnBall:
        layer = step.steps[f"{step.path}.{part.path}".lstrip(".")]
        entries, columns = weight_error(layer), layer.weight.numel() * U
        seen.append((columns + SIZE * U + entries, columns + 2 * entries + RELATIVE[type(layer.options)](layer)))
        return unit_sizes(part)

    def diagonal(part: DiagonalPart) -> SizeOnBall:
        seen.append(((part.weight.numel() + SIZE) * U, part.weight.numel() * U))
        return unit_sizes(part)

    reading = Reading("branch", any_weights=False, linear=linear, any_mode=True, diagonal=diagonal)
    lipschitz_bound(step.twin.branch, reading, step.twin._rules())
    r = (sum(size for size, _ in seen) + 8 * U) * UP
    size, (_, most, first, _) = step._size(Ball(0.0, 1)), step._scale(Ball(0.0, 1))
    relative = (r + SCALE * U) * UP
    beside = sum(own for _, own in seen) + (len(seen) + REST) * U  # of one parameter, at all its uses
    shares = {} if isinstance(size, float) else size.first
    off = {name: (4 * r + SLOPE * U + r + beside) * shares[name] * UP for name in step.parameters}
    return _Scale(relative, most * UP, first, off)
