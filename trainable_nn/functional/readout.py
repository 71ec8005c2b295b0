"""The linear, parameter-free readout of an image: orthonormal rows, means over the image first."""

import torch
from torch import Tensor

from .skip import ON_CPU


def cosine_basis(size: int, count: int) -> Tensor:
    """The first ``count`` rows of the orthonormal cosine transform (DCT-II) of ``size`` values, in float64."""
    frequency, place = torch.arange(count, **ON_CPU), torch.arange(size, **ON_CPU)
    rows = (2.0 / size) ** 0.5 * torch.cos(torch.pi / size * torch.outer(frequency, place + 0.5))
    if count:
        rows[0] = size**-0.5
    return rows


def readout_kernel(out_features: int, channels: int, pixels: int) -> Tensor:
    """Orthonormal rows (out_features, channels * pixels) in float64: cosines over channels times cosines over pixels.

    Rows 0 ... channels - 1 are constant over the pixels: (pixels)^(1/2) times the mean over the image, mixed over
    channels. Further outputs take the next frequency over the pixels.
    """
    frequencies = -(-out_features // channels)
    over_channels = cosine_basis(channels, min(channels, out_features))
    over_pixels = cosine_basis(pixels, frequencies)
    rows = torch.einsum("fp,kc->fkcp", over_pixels, over_channels).reshape(-1, channels * pixels)
    return rows[:out_features].contiguous()
