r"""Affine layers y = P(w) * x + b, dense or convolution, with P the identity, entry, weight or Schatten norm.

With U the input's patches (the input itself for a dense layer) as a matrix of columns, y = P(w) U + b, so

    D_w = sup \|P'\| \|U\|,   D_b = (positions)^(1/2),   J = \|P(w) *\|,   b = g sup \|P'\|,   c = sup \|P''\| \|U\|,

g = how often one pixel is used, rooted (``geometry_factor``). On the ball P(w) moves by at most sup \|P'\| R.

Source: paper A, (17) to (21), (30) to (33); THEORY_PAPERS II.2.1, II.2.2, II.2.7.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import UnboundedError
from ...linop import convolution_norm_at_most, matrix_norm_at_most
from ...theory.composition import times
from ...theory.convolution import geometry_factor
from ...theory.parameterisation_balls import IdentityConstants, curvatures_on_ball, slopes_on_ball, steepest_entries
from ...theory.parameterisations import EntryNormConstants
from ...theory.schatten import SchattenNormConstants
from ..held import acting_weight
from .graph import Graph
from .patches import applied, patch_norms
from .states import Backward, Ball, Effect, Local, State, Tangents
from .steps import Step, U
from .twin import doubled, matrix_of

BLOCK = 2**22  # entries of a weight at a time; a larger one is read in its own dtype
TIGHT = 2**18  # entries of a kernel up to which the convolution's own norm is found, and not its matrix's


class Affine(Step):
    """y = P(w) * x + b."""

    source = "paper A (17)-(21), Lemma A.7; THEORY_PAPERS II.2.1, II.2.2, II.2.7"

    def __init__(self, path: str, module: nn.Module, shape: tuple[int, ...], known: dict | None = None) -> None:
        """shape: of one sample of the input. known: norms that were proved before, for the same weights."""
        super().__init__(path, type(module).__name__)
        self.shape, self._norms = tuple(shape), {} if known is None else known
        self.module = twin = doubled(module)
        self.options = module.constants() if hasattr(module, "constants") else IdentityConstants()
        is_twin = module.weight.dtype == torch.float64 and module.weight.device.type == "cpu"
        self.weight = acting_weight(module if is_twin else twin)
        self.bias = None if twin.bias is None else twin.bias.detach()
        in_place = module.weight.numel() > BLOCK and module.weight.dtype == torch.float32
        self.free = matrix_of(module.weight if in_place else twin.weight).cpu().numpy()
        del twin.__dict__["_parameters"]["weight"]
        self.length = float(torch.linalg.vector_norm(self.weight)) * (1 + self.weight.numel() * U)
        self.groups = getattr(module, "groups", 1)
        trains_weight = module.weight.requires_grad
        self.trains_bias = module.bias is not None and module.bias.requires_grad
        names = [("weight", trains_weight), ("bias", self.trains_bias)]
        self.parameters = tuple(f"{path}.{name}".lstrip(".") for name, trains in names if trains)
        self.trains_weight = trains_weight
        self.derivation = "J = ||P(w)|| + sup|P'| R, D = sup|P'| ||patches||, b = g sup|P'|, c = sup|P''| ||patches||"

    @property
    def is_dense(self) -> bool:
        return self.weight.dim() == 2

    def forward(self, *inputs: Tensor) -> Tensor:
        return applied(self.module, self.weight, inputs[0], self.bias)

    def linear(self, x: Tensor) -> Tensor:
        return applied(self.module, self.weight, x, None)

    @property
    def growth(self) -> float:
        """g: ||patches|| <= g ||x||."""
        if self.is_dense:
            return 1.0
        m = self.module
        return geometry_factor(m.kernel_size, m.stride, m.padding, m.dilation, m.padding_mode, self.shape[1:])

    def moved(self, ball: Ball) -> float:
        """sup distance of w from its value now."""
        return ball.radius if self.trains_weight else 0.0

    def slope(self, ball: Ball) -> float:
        """sup ||P'|| on the ball."""
        return self._largest(slopes_on_ball, ball)

    def bend(self, ball: Ball) -> float:
        """sup ||P''|| on the ball."""
        return self._largest(curvatures_on_ball, ball)

    def _largest(self, profile, ball: Ball) -> float:
        key = (self.path, profile.__name__, self.moved(ball))
        if key not in self._norms:
            if ("steepest", self.path) not in self._norms:
                self._norms["steepest", self.path] = self._steepest()
            free = self._norms["steepest", self.path]
            pieces = self._profiles(profile, ball) if free is None else [(0, profile(self.options, free, self.moved(ball), free))]
            self._norms[key] = max((float(p.max(initial=0.0)) for _, p in pieces), default=0.0)
        return self._norms[key]

    def _steepest(self) -> np.ndarray | None:
        """The entries that the largest slopes and curvatures come from; None where all rows must be seen."""
        if not isinstance(self.options, EntryNormConstants) or self.free.size == 0:
            return None
        step = max(1, BLOCK // self.free.shape[1])
        blocks = (self.free[start : start + step] for start in range(0, len(self.free), step))
        return np.concatenate([steepest_entries(self.options, block) for block in blocks], axis=1)

    def _profiles(self, profile, ball: Ball):
        """(rows, slopes or curvatures of P on the ball, by entries or rows), some rows at a time.

        A Schatten norm takes a group whole, since its rows meet.
        """
        effective, rows = matrix_of(self.weight).numpy(), len(self.free)
        step = rows // self.groups
        if not isinstance(self.options, SchattenNormConstants):
            step = max(1, BLOCK // max(self.free.shape[1], 1))
        for start in range(0, rows, max(step, 1)):
            block = slice(start, min(start + step, rows))
            free = self.free[block].astype(np.float64, copy=False)
            yield block, profile(self.options, free, self.moved(ball), effective[block])

    @property
    def norm_now(self) -> float:
        """||P(w) *|| now, a proved bound."""
        key = (self.path, self.shape)
        if key not in self._norms:
            rows, columns = self.free.shape[0] // self.groups, self.free.shape[1]
            now = matrix_norm_at_most(self.weight) if self.is_dense else self._convolution_norm()
            self._norms[key] = now * (1.0 + self.options.norm_allowance(rows, columns, U)) * (1 + 4 * U)
        return self._norms[key]

    def _convolution_norm(self) -> float:
        """Of the convolution where that is found in a second, else of its kernel as a matrix, times the geometry."""
        m = self.module
        if self.weight.numel() > TIGHT:
            groups = matrix_of(self.weight).reshape(self.groups, -1, self.free.shape[1])
            return max(matrix_norm_at_most(group) for group in groups) * self.growth * (1 + 4 * U)
        geometry = {"stride": m.stride, "padding": m.padding, "dilation": m.dilation, "padding_mode": m.padding_mode}
        return convolution_norm_at_most(self.weight, self.shape, groups=self.groups, **geometry)

    def everywhere(self) -> float:
        if not self.trains_weight:
            return self.norm_now
        return self._supremum(self.growth)

    def _supremum(self, growth: float) -> float:
        if isinstance(self.options, SchattenNormConstants):  # L bounds the operator norm on images of every size
            return self.options.operator_norm_supremum()
        rows, columns = self.free.shape[0] // self.groups, self.free.shape[1]
        return float(times(self.options.operator_norm_supremum(rows, columns), growth))

    def local(self, ball: Ball, inputs: Sequence[State]) -> list[Local]:
        growth = self.growth
        unmoved = self.free.size > BLOCK and not inputs[0].tau.any() and (self.path, self.shape) not in self._norms
        now = growth * self.length if unmoved else self.norm_now  # of no weight where the input never moves
        moved = float(times(growth * self.slope(ball), self.moved(ball)))
        J = min(now + moved, self._supremum(growth)) if self.trains_weight else now
        drift = min(moved, now + J)
        ones = np.ones(ball.samples)
        return [Local(J * ones, drift * ones, self._rounding(growth), 0.0, self.least(moved))]

    def _rounding(self, growth: float) -> float:
        terms = self.free.shape[1] + 24
        return terms * U * growth * self.length

    def least(self, moved: float) -> float:
        """sigma of a dense layer on the output side, less what it moves and LAPACK's rounding."""
        if not self.is_dense or self.weight.numel() > 2**20 or self.weight.shape[0] > self.weight.shape[1]:
            return 0.0
        values = torch.linalg.svdvals(self.weight)
        if values.numel() == 0:
            return 0.0
        margin = 64 * (sum(self.weight.shape) + 24) * U * float(values[0])
        return max(float(values[-1]) - margin - moved, 0.0)

    def size(self, ball: Ball, inputs: Sequence[State], local: Sequence[Local]) -> np.ndarray:
        linear = times(local[0].J, inputs[0].size)
        if self.bias is None:
            return linear
        bias = float(self.bias.square().sum().sqrt()) * (1 + self.bias.numel() * U)
        bias += ball.radius if self.trains_bias else 0.0
        return linear + bias * math.sqrt(self._positions(ball, inputs[0].centre)) * (1 + 4 * U)

    def _positions(self, ball: Ball, x: Tensor) -> int:
        """Places of the output that one entry of the bias is added to, in one sample."""
        if self.is_dense:
            return x.numel() // x.shape[-1] // ball.samples
        key = ("positions", self.path, self.shape)
        if key not in self._norms:
            with torch.no_grad():
                self._norms[key] = self.linear(x[:1]).numel() // self.weight.shape[0]
        return self._norms[key] * len(x) // ball.samples

    def error(self, ball: Ball, inputs: Sequence[State]) -> np.ndarray:
        x = inputs[0].centre
        bias = 0.0 if self.bias is None else float(self.bias.square().sum().sqrt())
        now = ball.norms(inputs[0])
        size = self.growth * self.length * now + bias * math.sqrt(self._positions(ball, x))
        return self._rounding(self.growth) * now + 8 * U * size

    def effects(self, ball: Ball, x: State) -> list[Effect]:
        found = []
        if self.trains_weight:
            each, whole = self._patches(ball, x)
            slope = self.slope(ball)
            found.append(Effect(self.parameters[0], times(slope, each), float(times(slope, whole))))
        if self.trains_bias:
            root = math.sqrt(self._positions(ball, x.centre)) * (1 + 2 * U)
            every = root * math.sqrt(ball.samples) * (1 + 2 * U)
            found.append(Effect(self.parameters[-1], np.full(ball.samples, root), every))
        return found

    def _patches(self, ball: Ball, x: State) -> tuple[np.ndarray, float]:
        """sup ||U|| on the ball, for each sample and for all together."""
        growth = self.growth
        by_size = growth * x.size
        each, whole = self._patches_now(ball, x)
        each = np.minimum(each + growth * x.delta, by_size)
        whole = min(whole + float(growth * x.whole_delta), float(np.sqrt(np.square(each).sum())))
        return each, whole

    def _patches_now(self, ball: Ball, x: State) -> tuple[np.ndarray, float]:
        key = ("patches", x.place, self.path)
        if key not in ball.memo:
            uses = self.free.shape[1]
            positions = x.centre.numel() // uses if self.is_dense else self._positions(ball, x.centre) * ball.samples
            ball.memo[key] = patch_norms(
                self.module, uses, positions, x.centre, ball.samples, self.growth * ball.norms(x)
            )
        return ball.memo[key]

    def curvature(self, ball: Ball, x: State, at: Tangents, own: Sequence[int], after: Backward) -> np.ndarray | None:
        if not self.trains_weight:
            return None
        Q, place = np.zeros((len(at.whole), len(at.whole))), own[0]
        mixed = float(times(self.growth, self.slope(ball)))
        weighted = times(after.norm[:, None] * mixed, at.each)
        by_sample = np.sqrt(np.square(weighted).sum(axis=0))
        cross = np.minimum(by_sample, times(float(after.norm.max()) * mixed, at.whole))
        Q[place, :] += cross
        Q[:, place] += cross
        Q[place, place] += self._own_curvature(ball, x, after)
        return Q

    def _own_curvature(self, ball: Ball, x: State, after: Backward) -> float:
        """sup ||B P''[v, v] U||: a convex function of the shares of v^2, so the worst is one row, or one entry."""
        largest = self.bend(ball)
        if largest == 0.0:
            return 0.0
        each, whole = self._patches(ball, x)
        norm = after.norm
        plain = min(float(times(norm.max(), whole)), float(np.sqrt(np.square(times(norm, each)).sum())))
        bound = float(times(largest, plain))
        rows_meet = isinstance(self.options, SchattenNormConstants)
        vectors = self.is_dense and x.centre.dim() == 2 and ball.samples == len(x.centre)
        if rows_meet or not vectors or after.columns is None or self.free.size > BLOCK or not np.isfinite(each).all():
            return bound
        columns = np.minimum(after.columns, norm[:, None])  # (samples, rows)
        if isinstance(self.options, EntryNormConstants):
            entries = np.minimum(np.abs(x.centre.numpy()) + x.delta[:, None], x.size[:, None])
            sharp = lambda rows: np.sqrt(np.square(columns[:, rows]).T @ np.square(entries))
        else:
            by_sample = np.sqrt(np.square(columns * each[:, None]).sum(axis=0))
            by_row = np.minimum(columns.max(axis=0) * whole, by_sample)[:, None]
            sharp = lambda rows: by_row[rows]
        worst = max(float((p * sharp(rows)).max()) for rows, p in self._profiles(curvatures_on_ball, ball))
        return min(worst, bound)

    def constants(self, ball: Ball, x: State) -> tuple[float, float]:
        if not self.trains_weight:
            return 0.0, 0.0
        return self.growth * self.slope(ball), float(times(self.bend(ball), self._patches(ball, x)[1]))


def affine(graph: Graph, module: nn.Module, path: str, source: int) -> int:
    value = graph.nodes[source].value
    if module.weight.dim() > 2 and value.dim() != module.weight.dim():
        raise UnboundedError(
            f"{path}: {type(module).__name__} got an input of shape {tuple(value.shape)} without a batch axis. Add one."
        )
    shape = tuple(value.shape[1:])
    step = graph.known.get(("step", path, shape))
    if step is None:
        if module.weight.is_meta or not torch.isfinite(module.weight).all():
            raise ValueError(
                f"{path}: the weight of {type(module).__name__} is NaN, infinite or on the meta device. Load it."
            )
        step = graph.known["step", path, shape] = Affine(path, module, shape, graph.known)
    return graph.add(step, source)
