r"""How far phi(z) and phi'(z), as torch computes them in float64, are from the formula's: in units of u, by |z|.

    |fl phi(z) - phi(z)| <= u (value_slope |z| + value),   |fl phi'(z) - phi'(z)| <= u (c0 + c1 |z| + c3 |z|^3)

Assumed: exp, expm1, log1p, tanh, erf, atan, hypot and powers err by at most 4 units in the last place (ELEMENTARY = 8 u), as
vector libraries state; + - * / and roots round correctly. Each number is the sum over torch's own formula, rounded
up, where the chain of one elementary function after another is

    tanh      8 u |tanh|;                 1 - y^2: 2 * 8 u y^2 + 2 u
    sigmoid   1 / (1 + e^-z): 10 u;       s (1 - s): 12 u s
    silu      z s;                        s (1 + z (1 - s)): 1 - s errs by 12 u, times |z|
    mish      z tanh(log1p(e^z)): 24 u;   t + z s (1 - t^2): 1 - t^2 errs by 50 u, times |z|
    gelu      z (1 + erf(z / sqrt 2)) / 2: 1 + erf errs by 12 u;   its derivative + z exp(-z^2 / 2) / sqrt(2 pi), where
              the exponent's error counts z^2 u, and |z|^3 exp(-z^2 / 2) has a maximum
    gelu tanh as gelu;                    its derivative has z (1 - t^2) (1 + 0.134 z^2), where 1 - t^2 errs by 26 u
    softplus  -log sigmoid(-z): min(z, 0) and log1p(e^-|z|) apart, 16 u of log 2
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UnboundedError
from ...theory.nonlinearities import GELU_TANH_SLOPE
from ..regularity.elementwise import Elementwise


@dataclass(frozen=True)
class Rounded:
    """The numbers above."""

    value_slope: float
    value: float
    c0: float
    c1: float = 0.0
    c3: float = 0.0

    def slope_error(self, size: Tensor) -> Tensor:
        """Of phi' at entries of at most this size, in units of u."""
        return self.c0 + self.c1 * size + self.c3 * size**3


TABLE = {
    "Tanh": Rounded(10, 0, 24),
    "Sigmoid": Rounded(0, 12, 16),
    "SiLU": Rounded(16, 0, 32, 20),
    "SiLU1": Rounded(20, 0, 40, 24),
    "Mish": Rounded(32, 0, 80, 100),
    "Softsign": Rounded(4, 0, 16),
    "SoftSign": Rounded(4, 0, 16),
    "GELU": Rounded(16, 0, 40),
    "GELU1": Rounded(20, 0, 48),
    "Softplus0": Rounded(4, 24, 24),
    "SmoothReLU": Rounded(4, 24, 64),
    "Erf1": Rounded(14, 0, 32),
    "Arctan": Rounded(12, 0, 16),
    "ISRU": Rounded(16, 0, 48),
    "ELU": Rounded(12, 12, 24),
}
GELU_TANH = Rounded(20, 0, 48, 24, 4)
THRESHOLD = 20.0  # the least that torch's softplus may have here; above it its own is z


def rounded(step: Elementwise) -> Rounded:
    """Of this activation.

    Raises:
        UnboundedError: it has no entry.
    """
    if step.kind == "Softplus":  # log1p(e^(beta z)) / beta: the exponent's error counts |beta z| u
        return Rounded(14, 16 / beta_of(step), 24)
    if step.kind == "GELU" and step.phi.slope == GELU_TANH_SLOPE:
        return GELU_TANH
    if step.kind not in TABLE:
        raise UnboundedError(
            f"{step.path}: nothing bounds the rounding of {step.kind}. Use one of {', '.join(sorted(TABLE))}."
        )
    return TABLE[step.kind]


def beta_of(step: Elementwise) -> float:
    """Of a softplus, whose curvature is beta / 4."""
    return 4.0 * step.phi.curvature


def past_threshold(step: Elementwise, z: Tensor, reach: Tensor) -> Tensor | None:
    """sup |softplus' - 1| where torch's softplus may be z itself: e^(-beta z), and 1 / beta of it for the value.

    reach: (batch, 1, ...), how far an entry may be from z.
    """
    if step.kind != "Softplus":
        return None
    least = beta_of(step) * (z - reach) * (1 - 2.0**-40)
    most = beta_of(step) * (z + reach) * (1 + 2.0**-40)
    return torch.where(most >= THRESHOLD * (1 - 2.0**-40), torch.exp(-least.clamp(max=700.0)) * 1.01, 0.0)
