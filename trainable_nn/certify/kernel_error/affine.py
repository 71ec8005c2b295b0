r"""Rounding of affine layers y = P(w) * x + b, and of their rows.

With D the gradients in y and V the patches of x, a row in w is P'(w)[D V^T], and \|\|D V^T\|\| <= \|\|D\|\| g \|x\|, g the root of how often one
pixel is used. So errors d of D and e of x give \|\|P'\|\| g (d \|x\| + \|\|D\|\| e), and the sum over T positions gamma_T of the product of
the sizes. P and P' as computed err relatively, entry by entry or row by row (``RELATIVE``).
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...linop import matrix_norm_at_most
from ...theory.parameterisation_balls import IdentityConstants
from ...theory.parameterisations import EntryNormConstants, WeightNormConstants
from ...theory.schatten import SchattenNormConstants
from ..regularity.affine import Affine
from ..regularity.patches import applied
from ..regularity.states import Ball
from .rules import Rounding
from .schatten import derivative_error
from .states import LOST, UP, Gradients, Part, U, Value, gamma, norms

LARGE = 2**20  # entries of a weight whose norm takes more than half a second to prove
BLOCK = 2**22  # entries of a weight whose sizes are formed at a time
# of P'(w)[m], relative to sup ||P'|| ||m||: an entry's factor is a product; a row's is gain rho (m - n <n, m>), |n| <= 1
RELATIVE = {
    IdentityConstants: lambda step: 0.0,
    EntryNormConstants: lambda step: 48 * U,
    WeightNormConstants: lambda step: 4 * (step.free.shape[1] + 16) * U,
    SchattenNormConstants: derivative_error,
}


class AffineRounding(Rounding):
    """Dense layers and convolutions, by inner products.

    quick: whether a norm that is not known yet is that of a convolution's kernel as a matrix, times the geometry, or the Frobenius
    norm of a large weight: found in a hundredth of the time, and larger by up to the root of the kernel's size, or of the rank.
    """

    def __init__(self, quick: bool = False) -> None:
        self.quick = quick

    def carried(self, step: Affine, error: np.ndarray | float) -> np.ndarray | float:
        """||P(w) *|| error; the norm is not asked for where there is none."""
        if not np.any(error):
            return error
        return (_matrix_norm(step) if self.quick else step.norm_now) * error

    def slope(self, step: Affine, position: int) -> float:
        return step.norm_now

    def forward(self, step: Affine, inputs: Sequence[Value]) -> np.ndarray:
        (x,) = inputs
        size = _sizes(step, x)
        own = gamma(step.free.shape[1] + 4) + weight_error(step)
        return (self.carried(step, x.error) + own * (size + _far(step, x.apart))) * UP + LOST

    def on_ball(self, step: Affine, inputs: Sequence[Value], radius: float) -> tuple[np.ndarray, np.ndarray]:
        r"""With \|\|V\|\| <= sup \|\|P'\|\| R the move of P(w): \|V u\| <= g \|\|V\|\| \|u\|, and so for |V| |u|; y moves by W v + V x + c."""
        (x,) = inputs
        ball, g = Ball(radius, len(x.error)), step.growth
        turned = g * step.slope(ball) * radius * UP if step.trains_weight else 0.0
        shifted = math.sqrt(step._positions(ball, x.values)) * radius * UP if step.trains_bias else 0.0
        own = gamma(step.free.shape[1] + 4) + weight_error(step)
        size = _sizes(step, x) + _far(step, x.apart) + turned * x.norm + shifted
        error = self.carried(step, x.error) + turned * x.error + own * size
        return error * UP + LOST, (self.carried(step, x.moved) + turned * x.norm + shifted) * UP

    def backward(self, step: Affine, inputs: Sequence[Value], y: Gradients) -> list[np.ndarray]:
        (x,) = inputs
        size = norms(_pulled(step, x.values, y.size), len(x.error))
        own = gamma((len(step.weight) // step.groups + 1) * _uses(step) + 8) + weight_error(step)
        return [(self.carried(step, y.error) + own * (size + _far(step, 2 * y.error))) * UP + LOST]

    def parts(self, step: Affine, x: Value, y: Gradients) -> list[Part]:
        found, rows = [], len(step.weight) // step.groups
        positions = y.entries // len(step.weight)
        if step.trains_weight:
            slope, columns = step.slope(Ball(0.0, len(x.error))), step.free.shape[1]
            size = slope * step.growth * x.norm * y.norm * UP
            error = slope * step.growth * (y.error * x.norm + y.norm * x.error) * UP
            error = (error + (gamma(positions + 4) + RELATIVE[type(step.options)](step)) * size) * UP + LOST
            taps = 1 if step.is_dense else step.weight.shape[2]
            depth = columns + rows + 2 * positions + 64
            found.append(Part(step.parameters[0], error, size, step.weight.numel(), depth, rows * taps + 8))
        if step.trains_bias:
            root = math.sqrt(positions) * UP
            error = root * (y.error + gamma(positions + 4) * y.norm) * UP + LOST
            found.append(Part(step.parameters[-1], error, root * y.norm * UP, len(step.weight), 0, 8))
        return found


def _sizes(step: Affine, x: Value) -> np.ndarray:
    """Norms of |W| |x| + |b|; of a weight with many entries some rows at a time."""
    samples, bias = len(x.error), None if step.bias is None else step.bias.abs()
    if not step.is_dense or step.weight.numel() <= BLOCK:
        return norms(applied(step.module, step.weight.abs(), x.values.abs(), bias), samples)
    rows, squares, size = max(1, BLOCK // step.weight.shape[1]), np.zeros(samples), x.values.abs()
    for start in range(0, len(step.weight), rows):
        block = slice(start, start + rows)
        part = applied(step.module, step.weight[block].abs(), size, None if bias is None else bias[block])
        squares += norms(part, samples) ** 2
    return np.sqrt(squares) * UP


def weight_error(step: Affine) -> float:
    """Of each computed entry of P(w), relatively; twice that between two computations."""
    if isinstance(step.options, IdentityConstants):
        return 0.0
    rows, columns = len(step.weight) // step.groups, step.free.shape[1]
    return 2 * step.options.rounding_allowance(max(rows, columns), U)


def _matrix_norm(step: Affine) -> float:
    """At least ||P(w) *||: what is known, the norm as a matrix, or of a large one the Frobenius norm."""
    if (step.path, step.shape) in step._norms:
        return step.norm_now
    rows, columns = len(step.free) // step.groups, step.free.shape[1]
    allowed = (1.0 + step.options.norm_allowance(rows, columns, U)) * UP
    if step.weight.numel() > LARGE:
        return step.length * step.growth * allowed
    if step.is_dense:
        return step.norm_now
    key = ("matrix norm", step.path)
    if key not in step._norms:
        step._norms[key] = max(matrix_norm_at_most(group) for group in step.weight.reshape(step.groups, rows, columns))
    return step._norms[key] * step.growth * allowed


def _far(step: Affine, error: np.ndarray) -> np.ndarray:
    """|| |W| v || for ||v|| <= error."""
    return step.growth * step.length * error


def _uses(step: Affine) -> int:
    """How often one pixel is used at most."""
    return math.ceil(step.growth**2 * (1 - 1e-12))


def _pulled(step: Affine, x: Tensor, y: Tensor) -> Tensor:
    """|W|^T y."""
    weight, m = step.weight.abs(), step.module
    if step.is_dense:
        return y @ weight
    if m.padding_mode == "zeros" and not isinstance(m.padding, str):
        geometry = (list(m.stride), list(m.padding), list(m.dilation), False, [0] * len(m.stride), m.groups)
        return torch.ops.aten.convolution_backward(y, x, weight, None, *geometry, [True, False, False])[0]
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        return torch.autograd.grad(applied(m, weight, point, None), point, y)[0]
