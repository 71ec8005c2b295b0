"""Drop-in modules: forward is one call of a function in ``functional``."""

from .activation import GELU1, ISRU, Arctan, Erf1, SiLU1, SmoothReLU, Softplus0, SoftSign, Tanh
from .conv import (
    EntryNormConv1d,
    EntryNormConv2d,
    EntryNormConv3d,
    WeightNormConv,
    WeightNormConv1d,
    WeightNormConv2d,
    WeightNormConv3d,
)
from .linear import EntryNormLinear, WeightNormLinear
from .residual import SpectrallyBoundedResidual
from .skip import OrthogonalDownsample2d

__all__ = [
    "GELU1",
    "ISRU",
    "Arctan",
    "EntryNormConv1d",
    "EntryNormConv2d",
    "EntryNormConv3d",
    "EntryNormLinear",
    "Erf1",
    "OrthogonalDownsample2d",
    "SiLU1",
    "SmoothReLU",
    "SoftSign",
    "Softplus0",
    "SpectrallyBoundedResidual",
    "Tanh",
    "WeightNormConv",
    "WeightNormConv1d",
    "WeightNormConv2d",
    "WeightNormConv3d",
    "WeightNormLinear",
]
