r"""What is known of one step's value and gradients, whichever computation in float64 made them.

``error`` bounds the Euclidean distance of any computed quantity from the exact one, sample by sample. Two computed ones
are thus at most twice that apart, and a size that is measured on one of them holds for all with 2 ``error`` added. Where the
weights may move (``outputs``), ``moved`` bounds how far the exact value goes with them, and all of it holds for all of these weights.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from ..regularity.norms import frobenius_at_most

U = 2.0**-53
UP = 1.0 + 2.0**-20  # of each measured number: above the rounding of sums of 2^30 terms of one sign
LOST = 2.0**-450  # of each vector: above what underflows in it, 2^-1022 for each operation


def gamma(terms: float) -> float:
    """gamma_k = k u / (1 - k u): of a sum of products in any order, relative to the sum of their sizes."""
    return terms * U / (1.0 - terms * U) * (1.0 + 8 * U)


@dataclass(frozen=True)
class Value:
    """A step's output, as computed here, (batch, ...), and how far a computed one is from the exact, (samples,).

    samples: the batch; or 1, where a step mixes them and all of the batch is one vector. moved: (samples,), how far the exact one
    may be from that of the weights here, 0 where those are the only ones.
    """

    values: Tensor
    error: np.ndarray
    moved: np.ndarray | float = 0.0

    @property
    def apart(self) -> np.ndarray:
        """(samples,), how far any exact or computed one is from ``values`` at most."""
        return (2 * self.error + self.moved) * UP

    @cached_property
    def norm(self) -> np.ndarray:
        """At least that of the exact output and of every computed one."""
        return norms(self.values, len(self.error)) + self.apart

    @property
    def entries(self) -> int:
        """Of one sample."""
        return self.values.numel() // len(self.error)


@dataclass(frozen=True)
class Gradients:
    """Of all outputs of a sample together, in one step's output.

    size: (batch, ...), entry by entry the root of the sum of squares over the outputs, as computed here.
    error: (samples,), how far the computed ones are from the exact, over entries and outputs (Frobenius); but for what is
    ``loose``, (batch, ...), which bounds a further part entry by entry, and is None for nothing.
    """

    size: Tensor
    error: np.ndarray
    loose: Tensor | None = None

    def fastened(self) -> "Gradients":
        """With what is loose among the error."""
        if self.loose is None:
            return self
        return Gradients(self.size, (self.error + norms(self.loose, len(self.error))) * UP)

    @cached_property
    def norm(self) -> np.ndarray:
        """At least the Frobenius norm of the exact ones and of every computed ones."""
        return norms(self.size, len(self.error)) + 2 * self.fastened().error * UP

    @cached_property
    def peak(self) -> np.ndarray:
        """At least ``size`` at each entry, of the exact ones and of every computed ones."""
        return largest(self.size, len(self.error)) * UP + 2 * self.fastened().error * UP

    @property
    def entries(self) -> int:
        """Of one sample."""
        return self.size.numel() // len(self.error)


def norms(values: Tensor, samples: int) -> np.ndarray:
    """(samples,), not below the Euclidean norms of the samples."""
    return frobenius_at_most(values.reshape(samples, -1)) * UP + LOST


def largest(values: Tensor, samples: int) -> np.ndarray:
    """(samples,), the largest entry of each."""
    return values.reshape(samples, -1).amax(1).numpy()


@dataclass(frozen=True)
class Part:
    """The rows of the Jacobian in one parameter at one of its uses, all outputs of a sample together.

    error: (samples,), Frobenius distance of the computed rows from the exact.  size: (samples,), at least their norm, and
    at least the product of the norms of the factors that they are contracted from.  columns: of the rows.  depth: the
    longest chain of roundings where products of factors meet.  additions: of products of rows, piece by piece.
    """

    name: str
    error: np.ndarray
    size: np.ndarray
    columns: int
    depth: int
    additions: int
