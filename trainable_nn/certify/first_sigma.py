r"""sigma_min(D f_1)^2 of the first layer on balls: min over its units of lambda_min(X diag(P'(w_i)^2) X^T + [bias] 1 1^T).

A lower bound of the slopes is monotone in \|w\|, so on a ball \|w\| grows by its radius. Units one by one cost a Gram matrix
each; where that is too dear, one Gram matrix stands for all of them, with the least slope of each column over the units.
A row norm's slope is one number a row, so there the least of them is exact.
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import torch

from ..theory import samples
from ..theory.rounding import up
from .regularity import FirstLayer

MOST_WORK = 1e10  # multiplications for the Gram matrices of all units at one radius, some seconds
BLOCK = 2**22  # entries of the weight at a time


class FirstSigma:
    """The first layer at these samples, (N, d)."""

    def __init__(self, first: FirstLayer, data: np.ndarray) -> None:
        self.first, self.data = first, data

    def squared_at_least(self, radius: float) -> float:
        """A lower bound of sigma_min(D f_1)^2 within the radius; infinity: everywhere."""
        slopes = slopes_at_least(self.first, radius, self.lengths)
        return max(samples.weighted_gram_at_least(self.data, slopes, bias=bool(self.first.bias)), 0.0)

    @property
    def work(self) -> float:
        """Multiplications for all units one by one."""
        n, d = self.data.shape
        return float(len(self.first.weight)) * (n * n * d + 10.0 * n**3)

    @property
    def is_by_units(self) -> bool:
        return self.first.kind != "entry" or self.work <= MOST_WORK

    @cached_property
    def lengths(self) -> np.ndarray:
        """|w|: of all entries, of the largest in each column, or the length of the longest row."""
        if self.first.kind not in ("entry", "weight"):
            return np.zeros((1, 1))
        w = torch.as_tensor(self.first.weight).detach().flatten(1)
        if self.first.kind == "entry" and self.is_by_units:
            return np.abs(w.to(torch.float64).numpy())
        found = np.zeros((1, w.shape[1] if self.first.kind == "entry" else 1))
        for rows in w.split(max(1, BLOCK // max(w.shape[1], 1))):
            block = np.abs(rows.to(torch.float64).numpy())
            if self.first.kind == "weight":
                block = _row_lengths(block)
            np.maximum(found, block.max(axis=0, keepdims=True, initial=0.0), out=found)
        return found


def slopes_at_least(first: FirstLayer, radius: float, lengths: np.ndarray) -> np.ndarray:
    """Lower bounds of P' within the radius for weights of these sizes, or (1, 1) for all weights.

    Entries: gain eps (eps + w^2)^(-3/2) + leak. Rows: gain eps (eps + |w_i|^2)^(-3/2), radial (paper A, (30)).
    """
    if first.kind == "identity":
        return np.ones((1, 1))
    if first.kind not in ("entry", "weight"):
        return np.zeros((1, 1))
    leak = float(first.leak or 0.0)
    if math.isinf(radius):
        return np.full((1, 1), leak)
    t = (lengths + up(radius)) / math.sqrt(first.eps)
    slopes = first.gain / math.sqrt(first.eps) * (1.0 / np.hypot(1.0, t)) ** 3
    return slopes * (1 - 2.0**-40) + leak * (1 - 2.0**-52)


def _row_lengths(w: np.ndarray) -> np.ndarray:
    """(rows, 1), rounded up."""
    largest = w.max(axis=1, keepdims=True, initial=0.0)
    scaled = np.divide(w, largest, out=np.zeros_like(w), where=largest > 0)
    return largest * np.sqrt(np.square(scaled).sum(axis=1, keepdims=True)) * (1 + 2.0**-40)
