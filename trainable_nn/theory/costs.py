"""Convex costs gamma(z) of a network's outputs on all samples, with the constants that the theorems take of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .rounding import ROUNDOFF, down, up

ASSUMED_ROUNDING = 2.0**-44  # of a value whose cost states nothing: 512 units
ENTRY = 32  # roundings of one cross-entropy, more than max, exp (8 units), sum, log (8 units), quotients and the minus take
WIDE = 1 + 2.0**-20  # more than the rounding of a bound of rounding


@dataclass(frozen=True)
class Cost:
    r"""gamma(z; y), convex in z, for outputs z of one shape.

    ``value(z, y)`` is a scalar tensor, differentiable in z. ``smoothness`` >= sup \|\|hess gamma\|\|_2. ``infimum`` is
    inf gamma over all z. With e = gamma - infimum, one of two lower bounds of the gradient: ``pl`` = mu with
    \|\|grad gamma\|\|^2 >= mu e (the squared loss), or ``pl_squared(E)`` = a with \|\|grad gamma\|\|^2 >= a e^2 wherever
    e <= E (cross-entropy, whose infimum lies at infinity). Without either, nothing but descent can be proved.
    ``gradient_most`` >= sup \|\|grad gamma\|\| where that is finite. ``rounding(z, y, v)`` bounds \|v - gamma(z; y)\| for
    v = ``value(z, y)`` in float64; without it 2^-44 of v is assumed, and certificates say so.

    Units:
        Constants are for the value as it is returned: a mean over n terms carries 1 / n in each.
    Raises:
        ValueError: a constant is negative, not finite where it must be, or pl exceeds 2 * smoothness.
    """

    name: str
    value: Callable[[Tensor, Tensor], Tensor]
    smoothness: float
    pl: float = 0.0
    pl_squared: Callable[[float], float] | None = None
    infimum: float = 0.0
    gradient_most: float = math.inf
    rounding: Callable[[Tensor, Tensor, float], float] | None = None

    def __post_init__(self) -> None:
        if not (0.0 < self.smoothness < math.inf and 0.0 <= self.pl and math.isfinite(self.infimum)):
            raise ValueError(
                f"Cost {self.name}: smoothness must be positive and finite, pl at least 0, infimum finite; got "
                f"smoothness={self.smoothness}, pl={self.pl}, infimum={self.infimum}."
            )
        if self.pl > 2.0 * self.smoothness * (1.0 + 1e-12):
            raise ValueError(
                f"Cost {self.name}: pl={self.pl} exceeds 2 * smoothness={2 * self.smoothness}, which no smooth function "
                f"has (||grad||^2 <= 2 smoothness (gamma - infimum)). Check the two constants."
            )

    def rounding_at_most(self, outputs: Tensor, targets: Tensor, value: float) -> float:
        """What ``value``, as computed at these outputs, may be off; assumed where the cost doesn't state it."""
        return ASSUMED_ROUNDING * abs(value) if self.rounding is None else self.rounding(outputs, targets, value)

    def gradient_at_most(self, excess: float) -> float:
        r"""sup \|\|grad gamma\|\| where gamma - infimum <= excess: (2 smoothness excess)^(1/2), by one gradient step."""
        return min(self.gradient_most, up(math.sqrt(2.0 * self.smoothness * max(excess, 0.0)), 4))


def mse(entries: int) -> Cost:
    r"""torch's mse_loss, \|z - y\|^2 / M over M entries: smoothness 2 / M, mu = 4 / M.

    Rounding: a difference and a square are 3 roundings, the sum, in any order, M - 1 and the mean one, of terms of one sign; so
    the value errs relatively by at most (M + 3) u / (1 - (M + 3) u) and by what underflows.
    """
    _check_terms("mse", entries)

    def rounding(z: Tensor, y: Tensor, value: float) -> float:
        return (entries + 8) * ROUNDOFF * value * WIDE + 2.0**-1000

    return Cost("mse", F.mse_loss, smoothness=up(2.0 / entries), pl=down(4.0 / entries), rounding=rounding)


def cross_entropy(samples: int, classes: int) -> Cost:
    r"""torch's cross_entropy with class indices, the mean of c_i = -ln p_i over N samples.

    smoothness 1 / (2 N), \|\|grad\|\| <= (2 / N)^(1/2), infimum 0, not attained. Lower bound of the gradient, for a
    mean e <= E, so that each c_i <= N E: \|p - e_y\|^2 >= K / (K - 1) (1 - p_y)^2 by Cauchy-Schwarz, and
    1 - e^(-c) >= c k with k = (1 - e^(-N E)) / (N E), as 1 - e^(-c) is concave. So \|\|grad\|\|^2 >=
    K / (K - 1) N^(-2) k^2 sum c_i^2 >= K / (K - 1) k^2 e^2 / N.

    Rounding: let m be the largest |z_k| of a sample. z_k - max errs by 2 m u, which moves exp(z_k - max) by x e^-x u <= u / 2 each;
    with exp's 8 u and K - 1 additions the sum S in [1, K] errs by (2 K + 8) u of itself, ln S by as much and 8 u ln K. The two
    differences that are left, in either order, are of numbers up to 2 m + ln K: c_i errs by (2 K + ENTRY (1 + m + ln K)) u. The mean
    of N errs by N + 1 roundings of its size.

    Source:
        THEORY 4 and II.2.6; the factor K / (K - 1) is ours.
    """
    _check_terms("cross_entropy", samples)
    if classes < 2:
        raise ValueError(f"cross_entropy: at least 2 classes are needed, got {classes}. One class has no loss.")

    def pl_squared(excess: float) -> float:
        if not excess > 0.0:
            return down(classes / (classes - 1) / samples, 2)
        t = samples * excess
        k = -math.expm1(-t) / t
        return down(classes / (classes - 1) * k * k / samples, 12)

    def rounding(z: Tensor, y: Tensor, value: float) -> float:
        each = 2 * classes + ENTRY * (1.0 + float(z.abs().amax(1).mean()) + math.log(classes))
        return (each + (samples + 8) * (abs(value) + 2 * each * ROUNDOFF)) * ROUNDOFF * WIDE

    most = up(math.sqrt(2.0 / samples), 2)
    smoothness = up(0.5 / samples)
    return Cost("cross_entropy", F.cross_entropy, smoothness, pl_squared=pl_squared, gradient_most=most, rounding=rounding)


def cost_for(loss: str | Cost, outputs: Tensor, targets: Tensor) -> Cost:
    """The cost that ``loss`` names, for outputs and targets of these shapes.

    Raises:
        ValueError: the name is unknown, or the targets do not fit the outputs; torch would broadcast some of them.
        TypeError: loss is neither a name nor a Cost.
    """
    if isinstance(loss, Cost):
        return loss
    if not isinstance(loss, str):
        raise TypeError(f"loss: a name ({', '.join(NAMES)}) or a theory.Cost is needed, got a {type(loss).__name__}.")
    if loss == "mse":
        if outputs.shape != targets.shape or not targets.dtype.is_floating_point:
            raise ValueError(
                f"loss='mse': targets must be floats of the outputs' shape {tuple(outputs.shape)}, got "
                f"{targets.dtype} {tuple(targets.shape)}. Reshape them; for class labels use one-hot rows."
            )
        return mse(outputs.numel())
    if loss == "cross_entropy":
        _check_labels(outputs, targets)
        return cross_entropy(targets.numel(), outputs.shape[1])
    raise ValueError(
        f"loss: {loss!r} is unknown; use {', '.join(map(repr, NAMES))}, or a theory.Cost with its constants."
    )


NAMES = ("mse", "cross_entropy")


def _check_labels(outputs: Tensor, targets: Tensor) -> None:
    needed = (outputs.shape[0], *outputs.shape[2:]) if outputs.dim() > 1 else ()
    if outputs.dim() < 2 or targets.shape != torch.Size(needed) or targets.dtype != torch.int64:
        raise ValueError(
            f"loss='cross_entropy': outputs (N, K, ...) and int64 labels {needed or '(N, ...)'} are needed, got outputs "
            f"{tuple(outputs.shape)} and {targets.dtype} {tuple(targets.shape)}. Probabilities as targets are not covered."
        )
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < outputs.shape[1]:
        raise ValueError(
            f"loss='cross_entropy': labels run from {int(targets.min())} to {int(targets.max())}, where 0 to "
            f"{outputs.shape[1] - 1} are needed. torch's ignore_index is not covered; leave such samples out."
        )


def _check_terms(name: str, count: int) -> None:
    if count < 1:
        raise ValueError(f"{name}: needs at least one term, got {count}. Give samples.")
