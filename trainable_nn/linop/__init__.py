"""Linear maps as operators, and proved bounds of their norms."""

from .conv_parameter import ConvParameterJacobian
from .jacobian import Jacobian
from .norm import matrix_norm_at_most
from .toeplitz import ToeplitzConv

__all__ = ["ConvParameterJacobian", "Jacobian", "ToeplitzConv", "matrix_norm_at_most"]
