"""What a convolution or a linear layer of torch is: its weight as float64 kernels of each group, its axes; or an error."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from ..errors import UnboundedError
from .axes import Axis

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
MODES = ("zeros", "reflect", "replicate", "circular")
HERE = "operator_norm_at_most"


@dataclass(frozen=True)
class Convolution:
    """kernel: (groups, rows, columns, *kernel), float64, on the CPU; axes: one for each of the last dimensions."""

    kernel: Tensor
    axes: tuple[Axis, ...]

    @classmethod
    def from_arguments(
        cls,
        kernel: Tensor,
        sizes: Sequence[int | None],
        stride: int | Sequence[int],
        padding: str | int | Sequence,
        dilation: int | Sequence[int],
        mode: str,
    ) -> "Convolution":
        """Torch's arguments, an int for all axes or one value for each.

        Raises:
            ValueError: a number of values that fits no axis, a negative padding, a mode that torch doesn't have.
        """
        taps = tuple(kernel.shape[3:])
        strides, dilations = _for_each("stride", stride, taps, 1), _for_each("dilation", dilation, taps, 1)
        if mode not in MODES:
            raise ValueError(f"{HERE}: padding_mode must be one of {MODES}, got {mode!r}. Choose one of them.")
        pads = _pads(padding, taps, strides, dilations)
        axes = zip(sizes, taps, strides, pads, dilations)
        return cls(kernel, tuple(Axis(n, k, s, before, after, d, mode) for n, k, s, (before, after), d in axes))


def read_layer(layer: nn.Module, input_shape: Sequence[int] | None) -> Tensor | Convolution:
    """A linear layer's weight, or a convolution; a transposed one is read as its adjoint, which has the same norm.

    Raises:
        UnboundedError: no layer of torch, or one with a forward or weight that its class does not tell.
    """
    name = type(layer).__name__
    _check_forward(layer, name)
    weight = weight_of(layer)
    if isinstance(layer, nn.Linear):
        matrix = read_weight(weight, 1, name)[0]
        if input_shape is not None and (len(input_shape) == 0 or input_shape[-1] != weight.shape[1]):
            raise ValueError(
                f"{name}: input_shape {tuple(input_shape)} must end in in_features={weight.shape[1]}. "
                f"Give one that does, or None."
            )
        return matrix
    transposed = isinstance(layer, _ConvTransposeNd)
    kernel = read_weight(weight, layer.groups, name)
    sizes = sizes_of(input_shape, weight.dim() - 2, layer.in_channels, name)
    if transposed and input_shape is not None:
        sizes = _transposed_sizes(layer, sizes, name)
    read = Convolution.from_arguments(kernel, sizes, layer.stride, layer.padding, layer.dilation, layer.padding_mode)
    if not transposed:
        return read
    more = [extra // s * s for extra, s in zip(layer.output_padding, layer.stride)]  # outputs that the adjoint hasn't
    return replace(read, axes=tuple(replace(a, after=a.after - m) for a, m in zip(read.axes, more)))


def weight_of(layer: nn.Module) -> Tensor:
    """The weight that acts, attached to its graph."""
    return layer.effective_weight() if hasattr(layer, "effective_weight") else layer.weight


def read_weight(weight: Tensor, groups: int, name: str) -> Tensor:
    """(groups, rows, columns, *kernel) in float64 on the CPU.

    Raises:
        ValueError: the weight has no values, no entries, wrong shape, or entries that are not finite.
        TypeError: the entries are no real floats.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        found = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{name}: the weight must hold real floats, got {found}. Convert it first.")
    if is_lazy(weight) or weight.is_meta:
        raise ValueError(f"{name}: the weight has no values yet (meta device or lazy). Materialise and load it first.")
    if not 2 <= weight.dim() <= 5 or weight.numel() == 0:
        raise ValueError(f"{name}: a weight of shape {tuple(weight.shape)} is no kernel. Give 2 to 5 axes, none empty.")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"{name}: groups={groups} doesn't divide the weight's {weight.shape[0]} rows. Correct groups.")
    values = weight.detach().to("cpu", torch.float64)
    if not torch.isfinite(values).all():
        raise ValueError(f"{name}: the weight has entries that are NaN or infinite. Replace them first.")
    return values.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])


def sizes_of(input_shape: Sequence[int] | None, axes: int, channels: int, name: str) -> list[int | None]:
    """The image's sizes, from a shape with or without channels and batch; None for each axis without a shape."""
    if input_shape is None:
        return [None] * axes
    shape = tuple(input_shape)
    whole = all(isinstance(n, int) and n >= 1 for n in shape)
    if not whole or not axes <= len(shape) <= axes + 2:
        raise ValueError(
            f"{name}: input_shape {shape} must be {axes} whole numbers above 0, with or without channels and batch "
            f"before them. Give the image's sizes, or None for every size."
        )
    if len(shape) > axes and shape[-axes - 1] != channels:
        raise ValueError(
            f"{name}: input_shape {shape} has {shape[-axes - 1]} channels, and the layer takes {channels}. "
            f"Correct it, or leave the channels out."
        )
    return list(shape[-axes:])


def _check_forward(layer: nn.Module, name: str) -> None:
    known = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
    if not isinstance(layer, nn.Module) or not isinstance(layer, known):
        raise UnboundedError(
            f"{HERE}: {name} is no convolution or linear layer of torch, and nothing else is bounded. Give one of "
            f"those, or its weight to convolution_norm_at_most."
        )
    if hasattr(layer, "effective_weight"):
        return
    plain = {getattr(base, hook, None) for base in (*known, _ConvNd) for hook in ("forward", "_conv_forward")}
    own = any(getattr(type(layer), hook, None) not in plain for hook in ("forward", "_conv_forward"))
    computed = "weight" not in layer._parameters and not hasattr(layer, "parametrizations")
    if own or computed or "forward" in vars(layer) or "_conv_forward" in vars(layer):
        raise UnboundedError(
            f"{HERE}: {name} has a forward or a weight of its own, so its weight may not be the one that acts. "
            f"Give it a method effective_weight(), or give the weight to convolution_norm_at_most."
        )


def _for_each(what: str, value: int | Sequence[int], taps: tuple[int, ...], least: int) -> tuple[int, ...]:
    values = (value,) * len(taps) if isinstance(value, int) else tuple(value)
    if len(values) == 1:
        values *= len(taps)
    if len(values) != len(taps) or not all(isinstance(v, int) and v >= least for v in values):
        raise ValueError(
            f"{HERE}: {what} must be {len(taps)} whole numbers of at least {least}, got {value}. Give one, or one "
            f"for each axis."
        )
    return values


def _pads(padding, taps: tuple[int, ...], strides: tuple[int, ...], dilations: tuple[int, ...]) -> list[tuple[int, int]]:
    """(before, after) for each axis; 'same' puts the odd pixel after."""
    if padding == "same" and set(strides) != {1}:
        raise ValueError(f"{HERE}: padding='same' needs stride 1, got {strides}, as in torch. Give numbers instead.")
    if padding == "same":
        spans = [d * (k - 1) for k, d in zip(taps, dilations)]
        return [(span // 2, span - span // 2) for span in spans]
    if padding == "valid":
        return [(0, 0)] * len(taps)
    if type(padding) is str:
        raise ValueError(f"{HERE}: padding must be 'same', 'valid' or numbers, got {padding!r}. Choose one of them.")
    if not isinstance(padding, int) and any(not isinstance(p, int) for p in padding):
        before, after = ([pair[side] for pair in padding] for side in (0, 1))
        return list(zip(_for_each("padding", before, taps, 0), _for_each("padding", after, taps, 0)))
    return [(p, p) for p in _for_each("padding", padding, taps, 0)]


def _transposed_sizes(layer: _ConvTransposeNd, sizes: Sequence[int], name: str) -> list[int]:
    """The output's sizes: (n - 1) s - 2 p + d (k - 1) + output_padding + 1."""
    numbers = zip(sizes, layer.stride, layer.padding, layer.dilation, layer.kernel_size, layer.output_padding)
    out = [(n - 1) * s - 2 * p + d * (k - 1) + extra + 1 for n, s, p, d, k, extra in numbers]
    if min(out) < 1:
        raise ValueError(f"{name}: input_shape {tuple(sizes)} gives no output: sizes {out}. Give a larger one.")
    return out
