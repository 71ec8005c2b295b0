r"""How far the exact P(w + u d) is from its Taylor model as it was computed, u in [0, 1], in the Frobenius norm.

Two parts. Rounding of the coefficients, u the roundoff: what is a product errs relatively; where a sum of signs is in one, as
<w, d>, the sizes are taken in its place. And the weights themselves: a step of gradient descent stores w + d in float64, d = -h g
with three roundings, so the weights meant are all those within 4 u \|w\| + 8 u \|d\| of w + u d, entry by entry, the exact one among
them, and P moves by sup \|\|P'\|\| of that. c_0 stands for P(w) as ``Affine`` has it, which errs by ``weight_error``.

    entries   each coefficient is a product of powers of eps + w^2: fewer than 64 roundings
    rows      psi = q^(-1/2): q_0 errs by (n + 2) u, q_1 by gamma_n 2 \|w\| \|d\|, powers by 5 / 2 of that and 10 u:
              (5 n + 128) u (psi + \|psi'\| (2 \|w\| \|d\| + \|d\|^2) + psi'' (2 \|w\| \|d\|)^2 / 2), the products with w and d included
    Schatten  c_1 = a d - <a w - v, d> w / \|w\|^2, a w = P(w), v the gradient P'(w)^T w: v errs by D sup \|\|P'\|\| \|w\|, D =
              ``derivative_error``, P(w) by e of itself, sums of N products by gamma_N: 4 (D + e + 4 (N + 16) u) (a + sup \|\|P'\|\|) \|d\|
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...theory.parameterisations import EntryNormConstants, WeightNormConstants
from ...theory.schatten import SchattenNormConstants
from ..kernel_error.affine import weight_error
from ..kernel_error.schatten import derivative_error
from ..kernel_error.states import LOST, UP, U
from ..regularity.affine import Affine
from ..regularity.states import Ball
from .taylor import Taylor
from .weights import least_row, segment


SMALL = 1e-100  # a weight's norm below which products underflow


def norm(values: Tensor) -> float:
    """At least the Euclidean norm."""
    return float(torch.linalg.vector_norm(values)) * UP + LOST


def stored(w: Tensor, d: Tensor) -> Tensor:
    """How far an entry may be from w + u d where float64 holds the weights, and h g is rounded."""
    return (4.0 * w.abs() + 8.0 * d.abs()) * (U * UP)


def weight_error_along(step: Affine, model: Taylor, w: Tensor, d: Tensor) -> float:
    """model: of P(w + u d), w and d (rows, columns), with c_0 as the step has it."""
    own = norm(weight_error(step) * model.c0)
    kind = type(step.options)
    if kind is EntryNormConstants:
        return own + _entries(step.options, model, w, d)
    if kind is WeightNormConstants:
        return own + _rows(step.options, w, d)
    if kind is SchattenNormConstants:
        return own + _schatten(step, w, d)
    return norm(stored(w, d))


def _entries(constants: EntryNormConstants, model: Taylor, w: Tensor, d: Tensor) -> float:
    low, _ = segment(w, d)
    off = stored(w, d)
    nearest = (low.sqrt() - off).clamp_min(0.0).square()
    slope = constants.gain * constants.eps * (constants.eps + nearest) ** -1.5 + constants.leak
    return norm(off * slope) + norm(64 * U * (model.c0.abs() + model.c1.abs() + model.c2.abs()))


def _rows(constants: WeightNormConstants, w: Tensor, d: Tensor) -> float:
    sizes, moves = (torch.linalg.vector_norm(v, dim=1, keepdim=True) * UP for v in (w, d))
    off = torch.linalg.vector_norm(stored(w, d), dim=1, keepdim=True) * UP
    nearest = ((least_row(constants, w, d) - constants.eps).clamp_min(0.0).sqrt() - off).clamp_min(0.0).square()
    steepest = constants.gain * (constants.eps + nearest).rsqrt()
    q, cross = constants.eps + w.square().sum(1, keepdim=True), 2.0 * sizes * moves
    psi = q**-0.5 + 0.5 * q**-1.5 * (cross + moves.square()) + 0.375 * q**-2.5 * cross.square()
    own = (5 * w.shape[1] + 128) * U * psi * constants.gain * (sizes + moves)
    return norm(off * steepest) + norm(own)


def _schatten(step: Affine, w: Tensor, d: Tensor) -> float:
    moved = norm(d)
    sizes, images = (torch.linalg.vector_norm(v.reshape(step.groups, -1), dim=1) for v in (w, step.weight))
    if bool(((sizes > 0) & (sizes < SMALL)).any()):
        return math.inf
    scales = torch.where(sizes > 0, images / sizes, step.options.gain * step.options.eps**-0.5)
    steep = (step.slope(Ball(0.0, 1)) + float(scales.max())) * UP
    own = 4 * (derivative_error(step) + weight_error(step) + 4 * (w.numel() + 16) * U) * steep * moved
    off = norm(stored(w, d))
    return (own + step.slope(Ball(moved + off, 1)) * off) * UP
