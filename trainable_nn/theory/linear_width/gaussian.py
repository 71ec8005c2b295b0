"""Gaussian integrals of paper B: c_phi by Gauss-Legendre, Sigma(X) and lambda(X) by Gauss-Hermite quadrature.

The number of nodes grows until two rules agree; ``error`` is their difference, an estimate and not a bound, and
the constants made from these integrals are the paper's, which no certificate uses.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from ...errors import DatasetError
from .activations import nonlinearity_called, value_and_slope

NODES = (40, 80, 120, 180, 240)
TOLERANCE = 1e-10  # of an entry of Sigma; elu and softsign, whose slope has a kink, do not reach it
REACH = 12.0  # c_phi integrates over [-REACH, REACH]; beyond, the normal density is below 1e-31
AT_ONCE = 2**22  # nodes times pairs in one array


@dataclass(frozen=True)
class Integral:
    """A number by quadrature, how far the last two rules lie apart, and the nodes per dimension of the last."""

    value: float
    error: float
    nodes: int


@dataclass(frozen=True)
class MatrixIntegral:
    """A symmetric matrix by quadrature, the largest difference of an entry between the last two rules, the nodes."""

    value: np.ndarray
    error: float
    nodes: int


@functools.cache
def _rule(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights for the mean over z ~ N(0, 1)."""
    z, weights = np.polynomial.hermite_e.hermegauss(nodes)
    return z, weights / weights.sum()


@functools.cache
def c_phi(nonlinearity: str) -> Integral:
    """c_phi = 1 / E[phi(z)^2], z ~ N(0, 1). The paper prints 1 / E[phi]^2, which is infinite for an odd phi."""
    nonlinearity_called(nonlinearity)
    coarse, fine = (_inverse_mean_square(nonlinearity, nodes) for nodes in (NODES[-2], NODES[-1]))
    return Integral(fine, abs(fine - coarse), NODES[-1])


def _inverse_mean_square(nonlinearity: str, nodes: int) -> float:
    """1 / E[phi^2] by one rule on each side of 0, where some activations have a kink."""
    node, weight = np.polynomial.legendre.leggauss(nodes)
    z = np.concatenate([(node - 1) * REACH / 2, (node + 1) * REACH / 2])
    density = np.tile(weight, 2) * REACH / 2 * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return 1.0 / float(density @ value_and_slope(nonlinearity, z)[0] ** 2)


def sigma_matrix(inputs: np.ndarray, nonlinearity: str) -> MatrixIntegral:
    """Sigma(X) = E[phi'(X w) phi'(X w)^T] * X X^T (entry by entry), w ~ N(0, I).

    Entry (i, j) is an integral over the plane: with u = |x_i| z and v = |x_j| (rho z + sqrt(1 - rho^2) z').

    Shape:
        inputs: (n, d) -> (n, n).
    Cost:
        O(n^2 N^2) for N nodes, at most 240.
    Raises:
        DatasetError: inputs that are not a finite matrix.
    Source:
        Paper B, Lemma 2.3.
    """
    nonlinearity_called(nonlinearity)
    x = matrix_of(inputs)
    lengths = np.linalg.norm(x, axis=1)
    gram = x @ x.T
    over = np.outer(lengths, lengths)
    cosine = np.clip(np.divide(gram, over, out=np.zeros_like(gram), where=over > 0), -1.0, 1.0)
    np.fill_diagonal(cosine, 1.0)
    rows, columns = np.triu_indices(len(x))
    previous, error = None, np.inf
    for nodes in NODES:
        means = _means(nonlinearity, lengths[rows], lengths[columns], cosine[rows, columns], nodes)
        error = float(np.max(np.abs(means - previous), initial=0.0)) if previous is not None else np.inf
        if error <= TOLERANCE:
            break
        previous = means
    sigma = np.empty_like(gram)
    sigma[rows, columns] = sigma[columns, rows] = means * gram[rows, columns]
    return MatrixIntegral(sigma, error, nodes)


def smallest_eigenvalue(inputs: np.ndarray, nonlinearity: str) -> Integral:
    """lambda(X) = lambda_min(Sigma(X)). By Weyl's inequality its error is at most n times that of an entry."""
    sigma = sigma_matrix(inputs, nonlinearity)
    n = len(sigma.value)
    rounding = 8 * n * np.finfo(float).eps * float(np.abs(sigma.value).sum(axis=1).max())
    largest = float(np.max(np.abs(matrix_of(inputs) @ matrix_of(inputs).T)))
    value = float(np.linalg.eigvalsh(sigma.value)[0])
    return Integral(value, n * sigma.error * largest + rounding, sigma.nodes)


def matrix_of(inputs: np.ndarray) -> np.ndarray:
    """The inputs as a finite float64 matrix with at least one row and one column."""
    x = np.asarray(inputs.detach().cpu() if hasattr(inputs, "detach") else inputs)
    if x.ndim != 2 or 0 in x.shape or x.dtype.kind not in "fiu":
        raise DatasetError(
            f"linear_width: the inputs must be a matrix of real numbers, one sample a row, "
            f"got shape {tuple(x.shape)} of {x.dtype}. Flatten each sample first."
        )
    x = x.astype(np.float64)
    if not np.isfinite(x).all():
        row = int(np.argmin(np.isfinite(x).all(axis=1)))
        raise DatasetError(f"linear_width: row {row} of the inputs is not finite. Remove it or repair it.")
    return x


def _means(name: str, u: np.ndarray, v: np.ndarray, cosine: np.ndarray, nodes: int) -> np.ndarray:
    """E[phi'(u z) phi'(v (c z + sqrt(1 - c^2) z'))] for each pair."""
    z, weights = _rule(nodes)
    means = np.empty(len(u))
    size = max(1, AT_ONCE // nodes**2)
    for start in range(0, len(u), size):
        part = slice(start, start + size)
        c = cosine[part]
        s = np.sqrt(np.maximum(0.0, (1 - c) * (1 + c)))
        first = value_and_slope(name, np.multiply.outer(u[part], z))[1]  # pairs, nodes
        plane = c[:, None, None] * z[:, None] + s[:, None, None] * z
        second = value_and_slope(name, v[part, None, None] * plane)[1] @ weights
        means[part] = (first * second) @ weights
    return means
