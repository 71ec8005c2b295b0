r"""The calculus of bounds along a network: vectors c and matrices Q in place of products of suprema.

Move each layer's parameters at speed v_l = \|\|d theta_l/ds\|\|. Then layer l's output moves at speed at most c_l . v and
with acceleration at most v^T Q_l v, where

    c_l = J_l c_(l-1) + D_l e_l
    Q_l = J_l Q_(l-1) + a_l c_(l-1) c_(l-1)^T + b_l (e_l c_(l-1)^T + c_(l-1) e_l^T) + c_l e_l e_l^T.

An entry Q[k, l] bounds the block (k, l) of the second derivative by itself, so two valid matrices may be joined by
the smaller of each entry. \|\|DF\|\| <= \|c_L\|, and as a symmetric bilinear map is no larger off its diagonal,
Lip(DF) <= lambda_max(Q_L).

Source: THEORY_PAPERS II.2.7, which sharpens paper A, Lemma A.5.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .regularity import Regularity
from .rounding import product_up, up

SAFETY = 1.0 + 2.0**-30  # more than 2^22 roundings of sums and products of numbers >= 0


@dataclass(frozen=True)
class Composition:
    """c (layers,) and Q (layers, layers) after a chain, both at least the exact values of the recursion."""

    value: float
    c: np.ndarray
    Q: np.ndarray

    @property
    def jacobian(self) -> float:
        """An upper bound of ||DF||: the Euclidean norm of c."""
        return norm_at_most(self.c)

    @property
    def jacobian_lipschitz(self) -> float:
        """An upper bound of Lip(DF): the largest eigenvalue of Q."""
        return perron_at_most(self.Q)

    def smoothness(self, gradient: float, hessian: float) -> float:
        """beta = sup ||D2 gamma|| ||DF||^2 + sup ||D gamma|| Lip(DF), of the loss gamma(F)."""
        linear = product_up([hessian, self.jacobian, self.jacobian])
        return up(linear + product_up([gradient, self.jacobian_lipschitz]))


def chain(layers: Sequence[Regularity]) -> Composition:
    """The composition of layers one after the other; layer l's constants hold where the layers before it end.

    Raises:
        ValueError: no layers.
    """
    if not layers:
        raise ValueError("chain: at least one layer is needed, got none.")
    count = len(layers)
    c, Q = np.zeros(count), np.zeros((count, count))
    for index, layer in enumerate(layers):
        own = np.zeros(count)
        own[index] = 1.0
        cross = np.outer(own, c)
        Q = times(layer.J, Q) + times(layer.a, np.outer(c, c)) + times(layer.b, cross + cross.T)
        Q = Q + times(layer.c, np.outer(own, own))
        c = times(layer.J, c) + times(layer.D, own)
    return Composition(layers[-1].value, c * SAFETY, Q * SAFETY)


def beside(one: Composition, other: Composition) -> Composition:
    """The sum of two maps of the same input, with parameters of their own: c and Q one after the other."""
    blocks = [one.Q, other.Q]
    sizes = [len(one.c), len(other.c)]
    Q = np.zeros((sum(sizes), sum(sizes)))
    Q[: sizes[0], : sizes[0]], Q[sizes[0] :, sizes[0] :] = blocks
    return Composition(up(one.value + other.value), np.concatenate([one.c, other.c]), Q)


def times(a, b):
    """The product of numbers >= 0 in which 0 times infinity is 0: what does not depend stays, however far it is let."""
    with np.errstate(invalid="ignore", over="ignore"):
        product = np.multiply(a, b)
    return np.where((np.asarray(a) == 0) | (np.asarray(b) == 0), 0.0, product)


def norm_at_most(vector: np.ndarray) -> float:
    """At least the Euclidean norm of numbers >= 0."""
    largest = float(np.max(vector, initial=0.0))
    if largest == 0.0 or math.isinf(largest):
        return largest
    return largest * math.sqrt(float(np.sum(np.square(vector / largest)))) * SAFETY


def perron_at_most(Q: np.ndarray) -> float:
    """At least the largest eigenvalue of a symmetric matrix with entries >= 0.

    For every x > 0, lambda_max(Q) <= max_k (Q x)_k / x_k (Collatz and Wielandt); an eigenvector computed in floats
    is such an x, whatever its error. Its least entries are raised so that none is 0.

    Raises:
        ValueError: an entry is negative or NaN.
    """
    if not np.all(Q >= 0):
        raise ValueError("perron_at_most: the matrix must have entries of at least 0. Check the bounds that made it.")
    largest = float(np.max(Q, initial=0.0))
    if largest == 0.0 or math.isinf(largest):
        return largest
    scaled = Q / largest * SAFETY
    x = np.abs(np.linalg.eigh(scaled)[1][:, -1])
    best = float(scaled.sum(axis=1).max())
    for floor in (1e-12, 1e-8, 1e-5, 1e-3):
        y = np.maximum(x, floor * x.max())
        best = min(best, float((scaled @ y / y).max()))
    return best * largest * SAFETY
