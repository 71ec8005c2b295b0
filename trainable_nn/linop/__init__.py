"""Linear maps as operators, and proved bounds of their norms."""

from .conv_parameter import ConvParameterJacobian
from .frequency_grid import FrequencyGrid, frequency_grid
from .gram import ntk
from .jacobian import Jacobian
from .norm import matrix_norm_at_most
from .operator_norm import convolution_norm_at_most, operator_norm_at_most
from .parameter_jacobian import ParameterJacobian
from .spectrum import Extremes, extreme_singular_values
from .toeplitz import ToeplitzConv

__all__ = [
    "ConvParameterJacobian",
    "Extremes",
    "FrequencyGrid",
    "Jacobian",
    "ParameterJacobian",
    "ToeplitzConv",
    "convolution_norm_at_most",
    "extreme_singular_values",
    "frequency_grid",
    "matrix_norm_at_most",
    "ntk",
    "operator_norm_at_most",
]
