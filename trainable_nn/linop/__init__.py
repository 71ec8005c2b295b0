"""Linear maps as operators, and proved bounds of their norms."""

from .conv_parameter import ConvParameterJacobian
from .data_spectrum import KernelExtremes, kernel_extremes, noise_floor
from .frequency_grid import FrequencyGrid, frequency_grid
from .gram import KernelBlock, ntk, ntk_blocks
from .jacobian import Jacobian
from .network_norms import LayerBound, operator_norms_at_most
from .norm import matrix_norm_at_most
from .operator_norm import convolution_norm_at_most, operator_norm_at_most
from .parameter_jacobian import ParameterJacobian
from .spectrum import Extremes, extreme_singular_values
from .subgradient import differentiable_norm_at_most
from .toeplitz import ToeplitzConv

__all__ = [
    "ConvParameterJacobian",
    "Extremes",
    "FrequencyGrid",
    "Jacobian",
    "KernelBlock",
    "KernelExtremes",
    "LayerBound",
    "ParameterJacobian",
    "ToeplitzConv",
    "convolution_norm_at_most",
    "differentiable_norm_at_most",
    "extreme_singular_values",
    "frequency_grid",
    "kernel_extremes",
    "matrix_norm_at_most",
    "noise_floor",
    "ntk",
    "ntk_blocks",
    "operator_norm_at_most",
    "operator_norms_at_most",
]
