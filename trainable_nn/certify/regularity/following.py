r"""The scale a(theta) of a SpectrallyBoundedResidual while its weights train: y = a(theta) z, z the branch's output.

a = 1 / h(t S / bound) wherever the proof does not show, V <= 0.95 t S; a is C^3 there (``theory.following_scale``), and autograd
follows it. With A_k >= sup \|D_k a\| and A_kl >= sup \|D_k D_l a\| on the ball,

    J = sup a,  D_k = A_k \|z\|,  b_k = A_k,  c_kl = A_kl \|z\|,  a_zz = 0,

and the branch's own weights are parameters twice: of its layers, and here. From the block's input to y the slope is at
most ``bound``, at all weights. With ``tight=True`` the block proves new anchors and sets t anew as soon as V > 0.93 t S in a
forward pass; on a ball on which that is excluded it is one function, and no other ball has bounds.
"""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ... import modules as ours
from ...errors import UnboundedError
from ...modules.lipschitz import Reading, lipschitz_bound
from ...modules.residual import MARGIN as BELOW
from ...modules.residual import LASTING, REACHED, hold_scales
from ...theory.composition import norm_at_most, times
from ...theory.following_scale import MARGIN, SizeOnBall, scale_on
from ...theory.rounding import up
from .affine import Affine
from .branch_size import Parts, least_that_matter, unit_sizes
from .graph import Graph
from .states import Backward, Ball, Effect, Local, State, Tangents
from .steps import Step, U

START = 0.5  # of the smooth maximum: below it the scale does not move


def following(graph: Graph, module: ours.SpectrallyBoundedResidual, path: str, source: int) -> int:
    """a branch(x): the branch's own steps, then the scale.

    Raises:
        UnboundedError: a part of the branch has no rule.
    """
    before = len(graph.nodes)
    branch = graph.read(module.branch, f"{path}.branch".lstrip("."), source)
    steps = {node.step.path: node.step for node in graph.nodes[before:] if isinstance(node.step, Affine)}
    key = ("twin", path)
    if key not in graph.known:
        graph.known[key] = hold_scales(copy.deepcopy(module)).to("cpu", torch.float64)
    return graph.add(FollowingScale(path, graph.known[key], steps), branch, source)


class FollowingScale(Step):
    """y = a(theta) z. The second input is the block's, for the bound that holds from there."""

    source = "ours: the scale of SpectrallyBoundedResidual; paper A, Lemma A.8"
    covers_block = True

    def __init__(self, path: str, twin: ours.SpectrallyBoundedResidual, steps: dict[str, Affine]) -> None:
        """twin: the block in float64, whose scale is held."""
        super().__init__(path, type(twin).__name__)
        self.twin, self.steps, self._sizes = twin, steps, {}
        self.rest = (1.0 - BELOW) * (1.0 - torch.finfo(torch.float64).eps)  # of 1 / h
        with torch.no_grad():
            self.now = float(twin.scale) * (1.0 - torch.finfo(torch.float64).eps)
        self.tightness = float(twin.tightness.clamp(1e-30, 1.0))
        self.limit = LASTING if twin.tight else REACHED
        self.terms = sum(p.numel() for p in twin.branch.parameters()) + 256
        still = self._size(Ball(0.0, 1))
        self.parameters = () if isinstance(still, float) else tuple(still.first)
        self.derivation = f"a = 1 / h(t S / {twin.bound:g}), t = {self.tightness:.4g}: D = |D a| |z|, b = |D a|, c = |D^2 a| |z|"

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.now * inputs[0]

    def push(self, tangents: Tensor, x: Tensor, position: int = 0) -> Tensor:
        return self.now * tangents

    def everywhere(self) -> float:
        """Of the whole, from the block's input."""
        return up(self.twin.bound)

    def check(self) -> None:
        still = self._size(Ball(0.0, 1))
        if isinstance(still, float) or self._is_one_function(still):
            return
        found = f"V / (t S) is {still.ratio / self.tightness:.3g}, and {self.limit:.3g} is where"
        if self.twin.tight:
            raise UnboundedError(
                f"{self.path}: the slack of this SpectrallyBoundedResidual is spent ({found} it sets its scale anew), so at these "
                f"weights training follows no fixed function. Call certify() on the block first, or build it with tight=False."
            )
        raise UnboundedError(
            f"{self.path}: the scale of this SpectrallyBoundedResidual has kinks here ({found} its proof shows in it). Set tight "
            f"to True and call certify() on the block, or set its tightness to 1."
        )

    def local(self, ball: Ball, inputs: Sequence[State]) -> list[Local]:
        least, most, first, _ = self._scale(ball)
        moved = min(max(most - self.now, self.now - least), float(times(ball.radius, norm_at_most(np.array([*first.values()])))))
        ones, rounding = np.ones(ball.samples), self.terms * U * most
        zero = np.zeros(ball.samples)
        return [Local(most * ones, (moved + rounding) * ones, rounding, 0.0, least), Local(zero, zero)]

    def error(self, ball: Ball, inputs: Sequence[State]) -> np.ndarray:
        return self.terms * U * self.now * ball.norms(inputs[0])

    def effects(self, ball: Ball, x: State) -> list[Effect]:
        first, whole = self._scale(ball)[2], norm_at_most(x.size)
        return [Effect(name, times(first[name], x.size), float(times(first[name], whole))) for name in self.parameters]

    def curvature(self, ball: Ball, x: State, at: Tangents, own: Sequence[int], after: Backward) -> np.ndarray | None:
        if not self.parameters:
            return None
        _, _, first, second = self._scale(ball)
        Q, weighted = np.zeros((len(at.whole), len(at.whole))), times(after.norm[:, None], at.each)
        cross = np.minimum(np.sqrt(np.square(weighted).sum(axis=0)), times(float(after.norm.max()), at.whole))
        size = norm_at_most(times(after.norm, x.size))
        for name, place in zip(self.parameters, own):
            Q[place, :] += times(first[name], cross)
            Q[:, place] += times(first[name], cross)
            for other, there in zip(self.parameters, own):
                Q[place, there] += float(times(second[name, other], size))
        return Q

    def constants(self, ball: Ball, x: State) -> tuple[float, float]:
        _, _, first, second = self._scale(ball)
        bent = norm_at_most(np.array([*second.values()]))
        return norm_at_most(np.array([*first.values()])), float(times(bent, norm_at_most(x.size)))

    def _size(self, ball: Ball) -> SizeOnBall | float:
        return self._read(self._parts(ball))

    def _parts(self, ball: Ball, floors: dict[str, float] | None = None) -> Parts:
        modules = dict(self.twin.named_modules(remove_duplicate=False))
        return Parts(ball, self.path, modules, self.twin._anchors, self.steps, floors or {})

    def _read(self, parts: Parts | None) -> SizeOnBall | float:
        """S by the block's own rules; with None the number before the sizes."""
        linear, diagonal = (parts.linear, parts.diagonal) if parts else (unit_sizes, unit_sizes)
        reading = Reading("branch", any_weights=False, linear=linear, any_mode=True, diagonal=diagonal)
        try:
            found = lipschitz_bound(self.twin.branch, reading, self.twin._rules())
            return found if isinstance(found, SizeOnBall) else float(found)
        except TypeError as error:
            raise UnboundedError(
                f"{self.path}: a rule of its own bounds the branch of this SpectrallyBoundedResidual, and says nothing of how "
                f"that bound moves ({error}). freeze() the block, or use layers that the package's rules know."
            ) from error

    def _is_one_function(self, size: SizeOnBall) -> bool:
        return size.ratio <= self.limit * self.tightness

    def _scale(self, ball: Ball) -> tuple[float, float, dict, dict]:
        """Least and largest a on the ball, A_k and A_kl; infinite derivatives where it isn't one function."""
        if ball.radius not in self._sizes:
            self._sizes[ball.radius] = self._found(ball)
        return self._sizes[ball.radius]

    def _found(self, ball: Ball) -> tuple[float, float, dict, dict]:
        parts = self._parts(ball)
        size = self._read(parts)
        if isinstance(size, float):
            return self.now / MARGIN, self.now * MARGIN, {}, {}
        if not self._is_one_function(size):
            nothing = {(k, l): np.inf for k in self.parameters for l in self.parameters}
            return 0.0, 1.0, dict.fromkeys(self.parameters, np.inf), nothing
        per = self.tightness / self.twin.bound  # r = per S
        a = scale_on(per * size.least / MARGIN, per * size.most * MARGIN, START)
        if size.is_product and per * size.least < START:  # a moves only where r > START, which keeps each size up
            number = self._read(None).most
            size = self._read(self._parts(ball, least_that_matter(parts, number, START / per)))
        rate, bent = self.rest * a.first, self.rest * a.second
        first = {k: float(times(rate, s)) * MARGIN for k, s in size.first.items()}
        second = {
            (k, l): float(times(bent, times(s, size.first[l])) + times(rate, size.second.get((k, l), 0.0))) * MARGIN
            for k, s in size.first.items()
            for l in size.first
        }
        return self.rest * a.least / MARGIN, self.rest * a.most * MARGIN, first, second
