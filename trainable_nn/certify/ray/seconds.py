r"""phi'' at the centre of a ray by formulas whose rounding is known: \|fl phi''(z) - phi''(z)\| <= units u.

Counted as in ``kernel_error.activations``: exp, tanh and the like err by 8 u, u the roundoff, + - * / by u, a power by 8 u more than
what its base makes. With e = exp(-\|z\|), p = e / (1 + e)^2 = s (1 - s) errs by 28 u p and c = 1 - 2 s = -+(1 - e) / (1 + e) by 20 u:

    tanh        -2 t (1 - t^2): 1 - t^2 errs by 18 u, so 2 (18 + 8 + 4) u
    sigmoid     p c: 28 u p + 20 u p + u p, p <= 1 / 4
    softplus    beta p at beta z, whose own rounding moves p by at most \|z p'\| u <= u / 4
    silu        2 p + z p c: 60 u p and 54 u \|z\| p, where \|z\| p <= 0.23
    gelu        (2 - z^2) n(z), n the normal density: the exponent's rounding counts z^2 u, so (2 + z^2) (z^2 + 16) u n(z) <= 20 u
    gelu tanh   q (v' + z (v'' / 2 - t v'^2)), v = k (z + c z^3), q = 1 - t(v)^2 = 4 e / (1 + e)^2 for e = exp(-2 \|v\|): v errs by
                6 u \|v\|, so q by (12 \|v\| + 32) u q, t by 16 u; all terms' sizes times that are below 100 u
    mish        q s (2 + z (1 - s - 2 t s)), t = tanh w, w = softplus(z), q = 1 - t^2 as above: w errs by 20 u w, q by (40 w + 32) u q,
                the bracket by 64 u (1 + \|z\|), and s q (1 + \|z\|) (80 w + 128) <= 200
    erf         -2 z exp(-z^2): as gelu, 2 \|z\| (z^2 + 16) u exp(-z^2) <= 16 u
    arctan, isru, smooth relu: powers of 1 + z^2, which errs by 2 u: (2.5 * 2 + 8 + 8) u of numbers that are at most 1

Past \|z\| = FAR exponentials are taken at FAR: phi'' is below u at both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ...theory.nonlinearities import GELU_TANH_SLOPE, GELU_TO_SLOPE_1, SILU_TO_SLOPE_1
from ..kernel_error.activations import beta_of
from ..regularity.elementwise import Elementwise

FAR = 48.0
K, C = math.sqrt(2.0 / math.pi), 0.044715


@dataclass(frozen=True)
class Second:
    """A formula of phi'', and the units u of its error."""

    formula: Callable[[Tensor], Tensor]
    units: float


def second_of(step: Elementwise) -> Second | None:
    """Of this activation; None where there is no formula."""
    if step.kind == "Softplus":
        beta = beta_of(step)
        return Second(lambda z: beta * _logistic(beta * z), 32.0 * beta)
    if step.kind == "GELU" and step.phi.slope == GELU_TANH_SLOPE:
        return GELU_TANH
    return SECOND.get(step.kind)


def _near(z: Tensor) -> Tensor:
    return z.clamp(-FAR, FAR)


def _logistic(z: Tensor) -> Tensor:
    e = torch.exp(-z.abs())
    return e / (1.0 + e).square()


def _sigmoid(z: Tensor) -> Tensor:
    e = torch.exp(-z.abs())
    return -z.sign() * (1.0 - e) * e / (1.0 + e) ** 3


def _tanh(z: Tensor) -> Tensor:
    t = torch.tanh(z)
    return -2.0 * t * (1.0 - t.square())


def _silu(z: Tensor) -> Tensor:
    z = _near(z)
    return 2.0 * _logistic(z) + z * _sigmoid(z)


def _gelu(z: Tensor) -> Tensor:
    square = _near(z).square()
    return (2.0 - square) * torch.exp(-0.5 * square) / math.sqrt(2.0 * math.pi)


def _gelu_tanh(z: Tensor) -> Tensor:
    z = z.clamp(-10.0, 10.0)  # where q is below e^-80
    square = z.square()
    v = K * (z + C * z * square)
    slope, bend = K * (1.0 + 3.0 * C * square), 6.0 * K * C * z
    return 4.0 * _logistic(2.0 * v) * (slope + z * (0.5 * bend - torch.tanh(v) * slope.square()))


def _mish(z: Tensor) -> Tensor:
    z = _near(z)
    w, s = -F.logsigmoid(-z), torch.sigmoid(z)
    return 4.0 * _logistic(2.0 * w) * s * (2.0 + z * (1.0 - s - 2.0 * torch.tanh(w) * s))


def _erf(z: Tensor) -> Tensor:
    z = _near(z)
    return -2.0 * z * torch.exp(-z.square())


GELU_TANH = Second(_gelu_tanh, 128.0)
SECOND: dict[str, Second] = {
    "Tanh": Second(_tanh, 64.0),
    "Sigmoid": Second(_sigmoid, 32.0),
    "Softplus0": Second(_logistic, 32.0),
    "SiLU": Second(_silu, 64.0),
    "SiLU1": Second(lambda z: SILU_TO_SLOPE_1 * _silu(z), 64.0),
    "Mish": Second(_mish, 256.0),
    "GELU": Second(_gelu, 32.0),
    "GELU1": Second(lambda z: GELU_TO_SLOPE_1 * _gelu(z), 32.0),
    "Erf1": Second(_erf, 32.0),
    "Arctan": Second(lambda z: -2.0 * z * (1.0 + z.square()) ** -2.0, 32.0),
    "ISRU": Second(lambda z: -3.0 * z * (1.0 + z.square()) ** -2.5, 32.0),
    "SmoothReLU": Second(lambda z: 0.5 * (1.0 + z.square()) ** -1.5, 32.0),
}
