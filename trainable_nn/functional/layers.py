"""Affine maps whose weight is normalised on the way: torch's functions applied to P(w)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ..linop import FrequencyGrid
from .normalise import entry_norm, weight_norm
from .schatten import schatten_norm

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_MODES = ("zeros", "reflect", "replicate", "circular")


def entry_norm_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1.0, gain: float = 1.0, leak: float = 0.0
) -> Tensor:
    r"""y = x P(w)^T + b with P(w) = gain * w (eps + w^2)^(-1/2) + leak * w, entry by entry.

    Shape:
        x: (\*, n) -> y: (\*, m). weight: (m, n). bias: (m,).
    Raises:
        TypeError, ValueError: as ``entry_norm``.
    """
    return F.linear(x, entry_norm(weight, eps, gain=gain, leak=leak), bias)


def weight_norm_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1.0, gain: float = 1.0
) -> Tensor:
    r"""y = x P(w)^T + b with P(w) = gain * w (eps + abs(w_row)^2)^(-1/2), row by row.

    Shape:
        x: (\*, n) -> y: (\*, m). weight: (m, n). bias: (m,).
    Raises:
        TypeError, ValueError: as ``weight_norm``.
    """
    return F.linear(x, weight_norm(weight, eps, gain=gain), bias)


def entry_norm_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    *,
    eps: float = 1.0,
    gain: float = 1.0,
    leak: float = 0.0,
) -> Tensor:
    """Convolution of one, two or three axes with the kernel P(w), entry by entry as in ``entry_norm_linear``.

    Shape:
        weight: (m, n / groups, k...) with one k for each axis; x and y as for torch's convolutions.
    Raises:
        TypeError, ValueError: as ``entry_norm``; ValueError for a padding mode that torch doesn't know.
    """
    kernel = entry_norm(weight, eps, gain=gain, leak=leak)
    return _convolve(x, kernel, bias, stride, padding, dilation, groups, padding_mode)


def weight_norm_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    *,
    eps: float = 1.0,
    gain: float = 1.0,
) -> Tensor:
    """Convolution of one, two or three axes with the kernel P(w), one filter as one row, as in ``weight_norm_linear``.

    Shape:
        weight: (m, n / groups, k...) with one k for each axis; x and y as for torch's convolutions.
    Raises:
        TypeError, ValueError: as ``weight_norm``; ValueError for a padding mode that torch doesn't know.
    """
    kernel = weight_norm(weight, eps, gain=gain)
    return _convolve(x, kernel, bias, stride, padding, dilation, groups, padding_mode)


def schatten_norm_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1.0, gain: float = 1.0, power: int = 16
) -> Tensor:
    r"""y = x P(w)^T + b with P(w) = gain * w (eps + S(w)^2)^(-1/2), S the Schatten norm of order 2 * power.

    Shape:
        x: (\*, n) -> y: (\*, m). weight: (m, n). bias: (m,).
    Raises:
        TypeError, ValueError: as ``schatten_norm``.
    """
    return F.linear(x, schatten_norm(weight, eps, power, gain=gain), bias)


def schatten_norm_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    *,
    eps: float = 1.0,
    gain: float = 1.0,
    power: int = 16,
    factor: float = 1.0,
    grid: FrequencyGrid | None = None,
) -> Tensor:
    """Convolution of one, two or three axes with the kernel P(w) of ``schatten_norm``, group by group.

    Its operator norm is below gain where factor is the ``geometry_factor`` of these arguments, or grid their ``frequency_grid``.

    Shape:
        weight: (m, n / groups, k...) with one k for each axis; x and y as for torch's convolutions.
    Raises:
        TypeError, ValueError: as ``schatten_norm``; ValueError for a padding mode that torch doesn't know.
    """
    kernel = schatten_norm(weight, eps, power, gain=gain, groups=groups, factor=factor, grid=grid)
    return _convolve(x, kernel, bias, stride, padding, dilation, groups, padding_mode)


def _convolve(x, kernel, bias, stride, padding, dilation, groups, padding_mode) -> Tensor:
    """torch's convolution; a padding other than zeros is put on first, as in ``torch.nn.Conv2d``."""
    axes = kernel.dim() - 2
    if axes not in _CONVOLUTIONS:
        raise ValueError(
            f"convolution: the weight has shape {tuple(kernel.shape)}, and 1, 2 or 3 axes after the two of the "
            f"channels are needed. For a matrix use the linear function."
        )
    if padding_mode not in _MODES:
        raise ValueError(f"convolution: padding_mode must be one of {', '.join(_MODES)}, got {padding_mode!r}.")
    if padding_mode != "zeros":
        x = F.pad(x, _both_sides(kernel.shape[2:], padding, dilation), mode=padding_mode)
        padding = 0
    return _CONVOLUTIONS[axes](x, kernel, bias, stride, padding, dilation, groups)


def _both_sides(kernel_size, padding, dilation) -> list[int]:
    """What ``F.pad`` takes: (before, after) of each axis, last axis first; 'same' puts the odd pixel behind."""
    axes = len(kernel_size)
    dilations = (dilation,) * axes if isinstance(dilation, int) else tuple(dilation)
    if padding == "valid":
        pairs = [(0, 0)] * axes
    elif padding == "same":
        spans = [d * (k - 1) for k, d in zip(kernel_size, dilations)]
        pairs = [(span // 2, span - span // 2) for span in spans]
    else:
        each = (padding,) * axes if isinstance(padding, int) else tuple(padding)
        pairs = [(p, p) for p in each]
    return [side for pair in reversed(pairs) for side in pair]
