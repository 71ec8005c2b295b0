r"""How far a network's computed outputs are from the exact ones: the forward half of the walk, for one set of weights or a ball of them.

Descent is followed for thousands of steps, and a walk at each would cost more than the step. So ``OutputsAlong`` proves one bound
for all weights within R of the present ones (``Rounding.on_ball``: norms and sizes that hold on the ball) and asks for the distance
alone, until the weights leave the ball. R is the largest of a few for which the bound is at most ``WORSE`` times that of R = 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import TrainableNNError, UnboundedError
from ...theory.rounding import up
from ..regularity.affine import Affine
from ..regularity.graph import Graph
from .affine import AffineRounding
from .pieces import Pieces
from .states import UP, norms
from .walk import RULES as ROUNDINGS
from .walk import values_of

HOPELESS = 1e-4  # of the largest value in the network, that the bound may be: above it norms have multiplied, and nothing is said
WORSE = 4.0
RADII = 6  # tried at once, each a quarter of the one before
FIRST = 0.5  # of the norm of the weights: the first radius that is tried
FORWARD = {**ROUNDINGS, Affine: AffineRounding(quick=True)}
REFUSALS = (TrainableNNError, ValueError, TypeError, NotImplementedError, RuntimeError)  # of networks without rules


def outputs_error_at_most(model: nn.Module, inputs: Tensor, *, known: dict | None = None) -> float:
    r"""\|\|F' - F\|\|_F at most, F the exact outputs on all inputs and F' those computed in float64, in whatever order sums are taken.

    model: in float64 on the CPU.  known: norms that were proved before, for the same weights.

    Assumes: as ``bound``.
    Cost:
        Two forward passes, one with absolute values, and a proved norm of each weight as a matrix.
    Raises:
        UnboundedError: a step has no rule, by its path; or the bound says nothing, since norms multiply.
        TypeError, ValueError: inputs or weights that nothing can be said of.
    """
    (error,) = errors_on_balls(model, inputs, (0.0,), known=known)
    return error


def errors_on_balls(model: nn.Module, inputs: Tensor, radii: Sequence[float], *, known: dict | None = None) -> list[float]:
    """The bound for all weights within each of these radii of the present ones, infinite where a ball has none.

    Raises:
        As ``outputs_error_at_most``, for the first radius.
    """
    squares = np.zeros(len(radii))
    for graph, samples in Pieces(model, inputs, {} if known is None else known):
        squares += [_square(graph, samples, radius, k == 0) for k, radius in enumerate(radii)]
    return [up(math.sqrt(square), 4) * UP for square in squares.tolist()]


def _square(graph: Graph, samples: int, radius: float, must: bool) -> float:
    """Of the error, all samples of the graph together."""
    try:
        error = values_of(graph, samples, radius, FORWARD)[-1].error
    except UnboundedError:
        if must:
            raise
        return math.inf
    square = float((error * error).sum()) * UP
    if must:
        largest = max(float(np.sqrt(np.square(norms(node.value, samples)).sum())) for node in graph.nodes)
        if not math.sqrt(square) <= HOPELESS * largest:
            raise UnboundedError(
                f"the model: rounding of its outputs is bounded by no less than {math.sqrt(square) / largest:.2g} of the largest values "
                f"in it, since norms of layers multiply on the way. Normalised layers in contractive blocks keep it small."
            )
    return square


class OutputsAlong:
    """The bound at a model's present weights, while they move: proved on a ball, and anew where they have left it.

    at_now: None where the bound has to be assumed, and ``refused`` says why. walks: how often it was proved.
    """

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        self.model, self.inputs = model, inputs
        self.refused: Exception | None = None
        self.walks = 0
        self._centre: list[Tensor] = []
        self._radius, self._error = -1.0, math.inf
        self._try = FIRST * self._norm([p.detach() for p in self._moving()])

    def at_now(self) -> float | None:
        """At least the error of the outputs at the present weights.

        Cost:
            A distance, and now and then a walk for each of ``RADII`` balls.
        """
        if self.refused is not None:
            return None
        if not self._distance() <= self._radius:
            try:
                self._prove()
            except REFUSALS as error:
                self.refused = error
                return None
        return self._error

    def _prove(self) -> None:
        radii = [0.0, *(self._try * 4.0**-k for k in range(RADII))]
        found = errors_on_balls(self.model, self.inputs, radii)
        self._radius, self._error = max((r, e) for r, e in zip(radii, found) if e <= WORSE * found[0])
        self._try = max(4.0 * self._radius, self._try * 4.0**-RADII)
        self._centre = [p.detach().clone() for p in self._moving()]
        self.walks += 1

    def _distance(self) -> float:
        return math.inf if not self._centre else self._norm([p.detach() - c for p, c in zip(self._moving(), self._centre)])

    def _moving(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @staticmethod
    def _norm(tensors: Sequence[Tensor]) -> float:
        return float(torch.stack([torch.linalg.vector_norm(t) for t in tensors]).norm()) * UP if tensors else 0.0
