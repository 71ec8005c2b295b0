"""Stateless layers y = f(x, weights, constants): checks, then arithmetic on named constants."""

from .activation import arctan, erf1, gelu1, isru, silu1, smooth_relu, softplus0, softsign, tanh
from .inverse import entry_norm_inverse, weight_norm_inverse
from .layers import (
    entry_norm_conv,
    entry_norm_linear,
    schatten_norm_conv,
    schatten_norm_linear,
    weight_norm_conv,
    weight_norm_linear,
)
from .normalise import EPS_RANGE, FLOATS, check_constants, entry_norm, weight_norm
from .schatten import check_power, schatten_norm, schatten_norm_inverse
from .skip import downsample_kernel, orthogonal_downsample2d

__all__ = [
    "EPS_RANGE",
    "FLOATS",
    "arctan",
    "check_constants",
    "check_power",
    "downsample_kernel",
    "entry_norm",
    "entry_norm_conv",
    "entry_norm_inverse",
    "entry_norm_linear",
    "erf1",
    "gelu1",
    "isru",
    "orthogonal_downsample2d",
    "schatten_norm",
    "schatten_norm_conv",
    "schatten_norm_inverse",
    "schatten_norm_linear",
    "silu1",
    "smooth_relu",
    "softplus0",
    "softsign",
    "tanh",
    "weight_norm",
    "weight_norm_conv",
    "weight_norm_inverse",
    "weight_norm_linear",
]
