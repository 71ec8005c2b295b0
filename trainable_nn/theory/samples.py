"""What the theorems ask of the data: independent samples, distinct samples, a covariance that is not degenerate.

Each number comes with the noise that it must exceed: what float64 arithmetic adds, and what the rounding of the
data's own dtype could have made of data for which the condition fails.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .rounding import ROUNDOFF, down, up

SVD_CONSTANT = 10  # computed singular values err by at most this times max(m, n) u ||A||_2 (II.4.1 item 7)
GRAMS_AT_ONCE = 2**24  # entries of the batch of Grams


@dataclass(frozen=True)
class Condition:
    """A lower bound, rounding in float64 taken off, and what the rounding of the data itself could have made."""

    value: float
    noise: float

    @property
    def holds(self) -> bool:
        return self.value > self.noise


def independence(samples: np.ndarray, *, bias: bool = False, roundoff: float = ROUNDOFF) -> Condition:
    """A lower bound of sigma_min over the sample side of [X, 1]: positive for samples that are linearly independent.

    Shape:
        samples: (N, d), one sample a row. With N > d (+ 1 for the bias) it is 0.
    Units:
        roundoff: unit roundoff of the dtype that the data came in.
    Raises:
        ValueError: no samples, or a value that is not finite.
    """
    x = _checked("independence", samples)
    if bias:
        x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    if x.shape[0] > x.shape[1]:
        return Condition(0.0, 0.0)
    values = np.linalg.svd(x, compute_uv=False)
    computed = SVD_CONSTANT * max(x.shape) * ROUNDOFF * values[0]
    noise = roundoff * np.linalg.norm(x) if roundoff > ROUNDOFF else 0.0
    return Condition(down(float(max(values[-1] - computed, 0.0)), 2), up(float(noise), 4) if noise else 0.0)


@dataclass(frozen=True)
class Pair:
    """The two nearest samples and their distance."""

    first: int
    second: int
    distance: float


def nearest_pair(samples: np.ndarray) -> Pair | None:
    r"""The two samples that are nearest, None for a single one; lambda(DF) <= \|DF_i - DF_j\|^2 / 2 (II.4.1 item 6)."""
    x = _checked("nearest_pair", samples)
    if len(x) < 2:
        return None
    squares = np.einsum("nd,nd->n", x, x)
    gram = squares[:, None] + squares[None, :] - 2.0 * (x @ x.T)
    gram[np.tril_indices(len(x))] = np.inf
    close = np.argsort(gram, axis=None)[: min(16, len(x))]  # cancellation hides who is nearest, so look at several
    pairs = [divmod(int(k), len(x)) for k in close]
    pairs = [(i, j) for i, j in pairs if i < j]
    first, second = min(pairs, key=lambda p: float(np.linalg.norm(x[p[0]] - x[p[1]])))
    return Pair(first, second, float(np.linalg.norm(x[first] - x[second])))


def covariance_at_least(samples: np.ndarray, *, roundoff: float = ROUNDOFF) -> Condition:
    """A lower bound of the least eigenvalue of the biased covariance: positive only for N >= d + 1 samples (II.2.4)."""
    x = _checked("covariance_at_least", samples)
    if len(x) <= x.shape[1]:
        return Condition(0.0, 0.0)
    centred = (x - x.mean(axis=0)) / math.sqrt(len(x))
    values = np.linalg.svd(centred, compute_uv=False)
    size = np.linalg.norm(x) / math.sqrt(len(x))
    least = max(values[-1] - SVD_CONSTANT * max(x.shape) * ROUNDOFF * size, 0.0)
    return Condition(down(float(least**2), 4), up(float((roundoff * size) ** 2), 4))


def weighted_gram_at_least(samples: np.ndarray, slopes: np.ndarray, *, bias: bool = False) -> float:
    r"""min over units i of lambda_min(X diag(s_i^2) X^T + [bias] 1 1^T): sigma(D f_1)^2 of a layer y_i = P(w_i) x + b_i.

    An entrywise P has D_w y_i = X diag(P'(w_i)), so D f_1 (D f_1)^T is block diagonal, one N x N block a unit. It is
    monotone in each slope, so lower bounds of the slopes give a lower bound.

    Shape:
        samples: (N, d); slopes: (units, d), or (1, d) for one that all share.
    Cost:
        An eigenvalue decomposition N x N for each unit.
    Source:
        Paper A, Lemma A.9, kept by units (THEORY 4b) instead of sigma(X)^2 min slope^2.
    """
    x = _checked("weighted_gram_at_least", samples)
    n, d = x.shape
    if n > d + bias or not np.all(np.isfinite(slopes)):
        return 0.0
    least = math.inf
    at_once = max(1, GRAMS_AT_ONCE // max(n * d, n * n))
    for start in range(0, len(slopes), at_once):
        scaled = x[None] * slopes[start : start + at_once, None, :]
        grams = scaled @ scaled.transpose(0, 2, 1)
        traces = np.trace(grams, axis1=1, axis2=2) + n * bias
        values = np.linalg.eigvalsh(grams + float(bias))[:, 0]
        errors = 2 * SVD_CONSTANT * (n + d) * ROUNDOFF * traces
        least = min(least, float(np.min(values - errors)))
    return down(least, 2)


def _checked(where: str, samples: np.ndarray) -> np.ndarray:
    x = np.asarray(samples, dtype=np.float64)
    if x.size == 0 or x.ndim == 0:
        raise ValueError(f"{where}: samples of shape {np.shape(samples)} hold no values. Give at least one sample.")
    x = x.reshape(len(x), -1)
    if not np.all(np.isfinite(x)):
        raise ValueError(f"{where}: the samples hold values that are not finite. Take them out.")
    return x
