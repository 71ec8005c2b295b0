"""The rounding of a computed Jacobian's own entries and of the loss: proved where the steps have rules, else assumed and said so."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ..theory.costs import Cost
from ..theory.rounding import ROUNDOFF, up
from ..theory.samples import SVD_CONSTANT
from .certificate import Hypothesis
from .kernel_error import JacobianError, jacobian_error_at_most
from .kernel_error.outputs import REFUSALS
from .layers import path_in, sentence
from .problem import Problem

PROVED = "the rounding of DF's entries is bounded"
ASSUMED = "the rounding of DF's entries is as assumed"
LOSS_PROVED = "the rounding of outputs and loss is bounded"
LOSS_ASSUMED = "the rounding of outputs and loss is as assumed"
NO_ROUNDING = "the Cost states no rounding of its value. State it: Cost(..., rounding=...)."
KINKS = "a network with kinks reaches no grade that needs the proof."
MOST_OF_SMALLEST = 0.5  # of the smallest singular value that a proof may take away; a worse one is not used
NEGLIGIBLE = 1e-9  # of the largest
HOPELESS = 1e-4  # of a value, that its rounding may be where a bound of DF's is still worth its passes


@dataclass(frozen=True)
class Entries:
    r"""error: what is proved, None where nothing is; reason: why not, and path: of the step that stands against it.

    taken: the Frobenius norm that counts, 0 where entries are taken as exact.
    """

    error: JacobianError | None = None
    reason: str = ""
    path: str = ""
    taken: float = 0.0

    def of_jacobian(self, rows: int, columns: int, frobenius: float) -> Entries:
        r"""With what counts for a matrix of this size: the proof, or 10 max(rows, columns) u \|\|J\|\|_F (II.4.1 item 7)."""
        assumed = SVD_CONSTANT * max(rows, columns) * ROUNDOFF * frobenius
        return replace(self, taken=up(assumed, 4) if self.error is None else self.error.jacobian)

    def of_kernel(self) -> Entries:
        """With what counts for a kernel: the proof; without one entries are taken as exact."""
        return self if self.error is None else replace(self, taken=self.error.jacobian)

    def products(self, gram: Tensor, columns: int) -> float:
        r"""Of the products of rows in a kernel by layers: proved, or columns u \|\|J\|\|_F^2 of plain inner products."""
        if self.error is not None:
            return self.error.products(gram)
        return columns * ROUNDOFF * float(gram.trace()) * (1 + 1e-9)

    def chosen(self, smallest: float, largest: float, gram: Tensor | None = None) -> Entries:
        """Itself; or without its proof, where that would leave too little of the smallest singular value."""
        if self.error is None:
            return self
        products = 0.0 if gram is None else math.sqrt(self.error.products(gram))
        if max(self.error.jacobian, products) <= max(MOST_OF_SMALLEST * smallest, NEGLIGIBLE * largest):
            return self
        reason = (
            f"what is proved of it, {self.error.jacobian:.3g}, is too much beside the smallest singular value, {smallest:.3g}. "
            f"Normalised layers in contractive blocks keep the bound small."
        )
        return Entries(None, reason)

    def row(self) -> Hypothesis:
        """A row that says on which of the two the present lambda rests."""
        if self.error is not None:
            source = "rounding carried through the network (Higham 2002, chapter 3)"
            return Hypothesis(PROVED, source, "", True, self.taken, None, grade="ball")
        return Hypothesis(ASSUMED, "II.4.1 item 7", self.path, True, self.taken, None, "measured", self.reason, "ball")

    def note(self) -> tuple[str, ...]:
        """What a reader must know beside the numbers."""
        if self.error is not None:
            return ()
        return (f"The rounding of DF's entries is assumed, not proved: {self.reason}",)


def entries_of(problem: Problem, names: list[str], known: dict | None) -> Entries:
    """What is proved of the Jacobian in these parameters; ``known`` keeps norms of weights for the bounds that follow."""
    try:
        return Entries(jacobian_error_at_most(problem.model, problem.inputs, names=names, known=known, most=HOPELESS))
    except REFUSALS as error:
        return Entries(None, sentence(error), path_in(error, problem.model))


def loss_row(error: float | None, cost: Cost, refused: Exception | None, model: nn.Module) -> Hypothesis:
    """A row that says whether the enclosure of the loss is proved; error: of the outputs, None where it is assumed."""
    reason = _assumed_for(error, cost, refused)
    if not reason:
        source = "rounding carried through the network (Higham 2002, chapter 3)"
        return Hypothesis(LOSS_PROVED, source, "", True, error, None, grade="ball")
    path = "" if refused is None else path_in(refused, model)
    return Hypothesis(LOSS_ASSUMED, "II.4.1 item 7", path, True, error, None, "measured", reason, "ball")


def loss_note(rows: Iterable[Hypothesis]) -> tuple[str, ...]:
    """What a reader must know where that row says that the rounding is assumed."""
    return tuple(
        f"The rounding of outputs and loss is assumed, not proved: {row.remedy}" for row in rows if row.name == LOSS_ASSUMED
    )


def _assumed_for(error: float | None, cost: Cost, refused: Exception | None) -> str:
    """Why the rounding of outputs or loss is assumed; "" where it is proved."""
    if error is None:
        return "no step was looked at." if refused is None else sentence(refused)
    return NO_ROUNDING if cost.rounding is None else ""
