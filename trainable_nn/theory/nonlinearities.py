"""Constants of activations: sup |phi'|, sup |phi''| and phi(0), as floats that are never below the truth.

``slope`` bounds the Lipschitz constant of phi, ``curvature`` that of phi'. A curvature of
infinity says that phi' jumps, so phi is not C^1 and no certificate of smoothness covers it.

Source: THEORY_PAPERS II.2.5. Each closed form is recomputed in 40 digits by the tests, which
also hold that no entry exceeds the truth by more than a relative 1e-15.
"""

import math
from dataclasses import dataclass

from .rounding import up

GELU_SLOPE = 1.128904145185155  # Phi(sqrt 2) + sqrt 2 Phi'(sqrt 2), at z = sqrt 2
GELU_TANH_SLOPE = 1.128993068658772  # at z = 1.41850400...
GELU_CURVATURE = 0.7978845608028654  # 2 / sqrt(2 pi), at z = 0; the tanh form has the same
SILU_SLOPE = 1.099839320128867  # at z = 2.39935728..., where z tanh(z / 2) = 2
MISH_SLOPE = 1.088498161251728  # at z = 1.49057117...
MISH_CURVATURE = 0.6442046372369725  # at z = -0.08793443...
TANH_CURVATURE = 0.769800358919501  # 4 / (3 sqrt 3), at tanh(z)^2 = 1 / 3
SIGMOID_CURVATURE = 0.09622504486493763  # 1 / (6 sqrt 3)
ERF1_CURVATURE = 0.8577638849607069  # sqrt 2 e^(-1/2), at z^2 = 1 / 2
ARCTAN_CURVATURE = 0.649519052838329  # 3 sqrt 3 / 8, at z^2 = 1 / 3
C3 = 0.8586501033599193  # 48 / (25 sqrt 5) = max of 3 t (1 + t^2)^(-5/2), at t = 1 / 2
SELU_SLOPE = 1.758099340847377  # scale * alpha, on the left of 0
LN2 = 0.6931471805599454

GELU_TO_SLOPE_1 = math.nextafter(1.0 / GELU_SLOPE, 0.0)  # rounded down, so the scaled slope is at most 1
SILU_TO_SLOPE_1 = math.nextafter(1.0 / SILU_SLOPE, 0.0)


@dataclass(frozen=True)
class Nonlinearity:
    """One activation: its formula, and upper bounds of its slope, its curvature and its value at zero."""

    formula: str
    slope: float
    curvature: float
    at_zero: float = 0.0


NONLINEARITIES = {
    "relu": Nonlinearity("max(z, 0)", 1.0, math.inf),
    "softplus": Nonlinearity("ln(1 + e^z)", 1.0, 0.25, LN2),
    "softplus0": Nonlinearity("ln(1 + e^z) - ln 2", 1.0, 0.25),
    "tanh": Nonlinearity("tanh z", 1.0, TANH_CURVATURE),
    "sigmoid": Nonlinearity("1 / (1 + e^-z)", 0.25, SIGMOID_CURVATURE, 0.5),
    "gelu": Nonlinearity("z Phi(z)", GELU_SLOPE, GELU_CURVATURE),
    "gelu_tanh": Nonlinearity("z (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) / 2", GELU_TANH_SLOPE, GELU_CURVATURE),
    "gelu1": Nonlinearity("z Phi(z) / 1.12890...", 1.0, up(GELU_CURVATURE * GELU_TO_SLOPE_1)),
    "silu": Nonlinearity("z / (1 + e^-z)", SILU_SLOPE, 0.5),
    "silu1": Nonlinearity("z / (1 + e^-z) / 1.09984...", 1.0, 0.5 * SILU_TO_SLOPE_1),
    "mish": Nonlinearity("z tanh(ln(1 + e^z))", MISH_SLOPE, MISH_CURVATURE),
    "elu": Nonlinearity("z, or e^z - 1 where z < 0", 1.0, 1.0),
    "selu": Nonlinearity("1.0507 z, or 1.7581 (e^z - 1) where z < 0", SELU_SLOPE, math.inf),
    "erf1": Nonlinearity("(sqrt(pi) / 2) erf z", 1.0, ERF1_CURVATURE),
    "arctan": Nonlinearity("arctan z", 1.0, ARCTAN_CURVATURE),
    "softsign": Nonlinearity("z / (1 + |z|)", 1.0, 2.0),
    "isru": Nonlinearity("z (1 + z^2)^(-1/2)", 1.0, C3),
    "smooth_relu": Nonlinearity("(z + (1 + z^2)^(1/2) - 1) / 2", 1.0, 0.5),
}
