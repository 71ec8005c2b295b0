"""Smooth activations of slope at most 1, each with proved bounds of its slope and curvature.

Class attributes: ``slope_bound`` >= sup |phi'|, ``curvature_bound`` >= sup |phi''| (or the
Lipschitz constant of phi'), ``value_at_zero`` = phi(0).
"""

from torch import Tensor, nn

from .. import functional
from ..theory.nonlinearities import NONLINEARITIES, Nonlinearity


class Activation(nn.Module):
    r"""An elementwise map phi with constants that hold for every input.

    Shape:
        z: any -> the same.
    """

    slope_bound: float
    curvature_bound: float
    value_at_zero: float

    def __init_subclass__(cls, constants: Nonlinearity | None = None, **keywords) -> None:
        super().__init_subclass__(**keywords)
        if constants is not None:
            cls.slope_bound, cls.curvature_bound = constants.slope, constants.curvature
            cls.value_at_zero = constants.at_zero


class Softplus0(Activation, constants=NONLINEARITIES["softplus0"]):
    """phi(z) = ln(1 + e^z) - ln 2: softplus that is 0 at 0; curvature at most 1/4."""

    def forward(self, z: Tensor) -> Tensor:
        return functional.softplus0(z)


class SmoothReLU(Activation, constants=NONLINEARITIES["smooth_relu"]):
    """phi(z) = (z + (1 + z^2)^(1/2) - 1) / 2: 0 at 0; curvature at most 1/2."""

    def forward(self, z: Tensor) -> Tensor:
        return functional.smooth_relu(z)


class Tanh(Activation, constants=NONLINEARITIES["tanh"]):
    """phi(z) = tanh(z); curvature at most 4 / (3 sqrt 3) = 0.770."""

    def forward(self, z: Tensor) -> Tensor:
        return functional.tanh(z)


class GELU1(Activation, constants=NONLINEARITIES["gelu1"]):
    """phi(z) = z Phi(z) / 1.12890...: GELU divided by its largest slope; curvature at most 0.707."""

    def forward(self, z: Tensor) -> Tensor:
        return functional.gelu1(z)


class SiLU1(Activation, constants=NONLINEARITIES["silu1"]):
    """phi(z) = z / (1 + e^(-z)) / 1.09984...: SiLU divided by its largest slope; curvature at most 0.455."""

    def forward(self, z: Tensor) -> Tensor:
        return functional.silu1(z)


class Erf1(Activation, constants=NONLINEARITIES["erf1"]):
    """phi(z) = (sqrt(pi) / 2) erf(z): slope 1 at 0; curvature at most sqrt 2 e^(-1/2) = 0.858."""

    def forward(self, z: Tensor) -> Tensor:
        return functional.erf1(z)


class Arctan(Activation, constants=NONLINEARITIES["arctan"]):
    """phi(z) = arctan(z); curvature at most 3 sqrt 3 / 8 = 0.650."""

    def forward(self, z: Tensor) -> Tensor:
        return functional.arctan(z)


class SoftSign(Activation, constants=NONLINEARITIES["softsign"]):
    """phi(z) = z / (1 + |z|): C^1, with a slope of Lipschitz constant 2."""

    def forward(self, z: Tensor) -> Tensor:
        return functional.softsign(z)


class ISRU(Activation, constants=NONLINEARITIES["isru"]):
    """phi(z) = z (1 + z^2)^(-1/2), the inverse square root unit; curvature at most 48 / (25 sqrt 5) = 0.859."""

    def forward(self, z: Tensor) -> Tensor:
        return functional.isru(z)
