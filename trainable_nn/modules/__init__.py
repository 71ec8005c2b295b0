"""Drop-in modules: forward is one call of a function in ``functional``."""

from .activation import GELU1, ISRU, Arctan, Erf1, SiLU1, SmoothReLU, Softplus0, SoftSign, Tanh
from .contractive import ContractiveResidual
from .conv import (
    EntryNormConv1d,
    EntryNormConv2d,
    EntryNormConv3d,
    WeightNormConv,
    WeightNormConv1d,
    WeightNormConv2d,
    WeightNormConv3d,
)
from .floored import FlooredBatchNorm1d, FlooredBatchNorm2d, FlooredBatchNorm3d
from .linear import EntryNormLinear, WeightNormLinear
from .readout import OrthogonalReadout
from .residual import SpectrallyBoundedResidual
from .skip import OrthogonalDownsample2d
from .spectral import SpectralNormConv1d, SpectralNormConv2d, SpectralNormConv3d, SpectralNormLinear

__all__ = [
    "GELU1",
    "ISRU",
    "Arctan",
    "ContractiveResidual",
    "EntryNormConv1d",
    "EntryNormConv2d",
    "EntryNormConv3d",
    "EntryNormLinear",
    "Erf1",
    "FlooredBatchNorm1d",
    "FlooredBatchNorm2d",
    "FlooredBatchNorm3d",
    "OrthogonalDownsample2d",
    "OrthogonalReadout",
    "SiLU1",
    "SmoothReLU",
    "SoftSign",
    "Softplus0",
    "SpectralNormConv1d",
    "SpectralNormConv2d",
    "SpectralNormConv3d",
    "SpectralNormLinear",
    "SpectrallyBoundedResidual",
    "Tanh",
    "WeightNormConv",
    "WeightNormConv1d",
    "WeightNormConv2d",
    "WeightNormConv3d",
    "WeightNormLinear",
]
