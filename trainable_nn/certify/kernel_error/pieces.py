"""A batch in pieces whose numbers fit, each read as a graph of its own; one piece where samples meet."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ..regularity.graph import Graph
from ..regularity.network import check_inputs, read_graph
from ..regularity.rules import RULES
from .walk import check

MOST_NUMBERS = 2**27  # of float64 kept at once for one piece of the batch
KEPT = 5  # numbers kept for each activation: value, gradient, its size, and two on the way


class Pieces:
    """The pieces of a batch; iterating reads them. probe: the first two samples. meet: whether a step mixes samples.

    Raises:
        UnboundedError: a step has no rule, by its path; TypeError, ValueError: inputs or weights that nothing can be said of.
    """

    def __init__(self, model: nn.Module, inputs: Tensor, known: dict) -> None:
        """known: norms that were proved before, for the same weights."""
        check_inputs(model, inputs)
        self.model, self.inputs, self.known = model, inputs, known
        few = min(2, len(inputs))
        self.probe = read_graph(model, inputs[:few], RULES, known)
        check(self.probe)
        self.meet = any(node.step.mixes_samples for node in self.probe.nodes)
        numbers = KEPT * sum(node.value.numel() for node in self.probe.nodes) / few
        self._size = len(inputs) if self.meet else max(1, min(len(inputs), int(MOST_NUMBERS / numbers)))

    def __iter__(self) -> Iterator[tuple[Graph, int]]:
        """Each piece and how many samples of it stay by themselves: one, all together, where they meet."""
        for piece in self.inputs.split(self._size):
            whole = len(piece) == len(self.inputs) <= 2
            yield self.probe if whole else read_graph(self.model, piece, RULES, self.known), 1 if self.meet else len(piece)
