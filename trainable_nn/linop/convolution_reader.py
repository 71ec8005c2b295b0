"""What a convolution computes, read from a module of torch or of this package, or from a kernel and arguments."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
DEFAULTS = {
    "stride": 1,
    "padding": 0,
    "dilation": 1,
    "groups": 1,
    "padding_mode": "zeros",
    "transposed": False,
    "output_padding": 0,
}


class EffectiveKernel(nn.Module):
    """w -> P(w), the kernel that acts: what ``torch.func.functional_call`` differentiates."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> Tensor:
        effective = getattr(self.layer, "effective_weight", None)
        return effective() if callable(effective) else self.layer.weight

    def parameters_of_kernel(self) -> dict[str, Tensor]:
        """The free parameters w by their names, without the bias."""
        bias = ("layer.bias", "layer.parametrizations.bias")
        return {name: p for name, p in self.named_parameters() if not name.startswith(bias)}

    @property
    def is_identity(self) -> bool:
        """Whether the kernel is the parameter itself."""
        return not hasattr(self.layer, "effective_weight") and "weight" in self.layer._parameters


@dataclass(frozen=True)
class Convolution:
    """The kernel that acts now, the bias, where they come from (None for a plain kernel), and torch's arguments."""

    kernel: Tensor
    bias: Tensor | None
    source: EffectiveKernel | None
    arguments: dict


def read_convolution(where: str, convolution, arguments: dict) -> Convolution:
    """Read a module or a kernel; its values stay attached to the graph of autograd.

    Raises:
        TypeError: neither module nor tensor, a layer that computes something else, or integer entries.
        ValueError: arguments beside a module, a kernel without values, or one with NaN or infinite entries.
    """
    if isinstance(convolution, Tensor):
        found = Convolution(convolution, None, None, arguments)
    else:
        found = _read_module(where, convolution, arguments)
    check_values(where, "weight", found.kernel)
    return found


def _read_module(where: str, layer, arguments: dict) -> Convolution:
    if not isinstance(layer, CONVOLUTIONS + TRANSPOSED):
        raise TypeError(
            f"{where}: a convolution module or its weight is needed, got {type(layer).__name__}. Pass the layer itself."
        )
    given = [name for name, default in DEFAULTS.items() if arguments[name] != default]
    if given:
        raise ValueError(
            f"{where}: {', '.join(given)} was given beside a {type(layer).__name__}, which has its own. Leave it out, "
            f"or pass the weight."
        )
    source = EffectiveKernel(layer)
    if nn.parameter.is_lazy(layer._parameters.get("weight")):
        raise ValueError(f"{where}: the {type(layer).__name__} has no weight yet. Run it on one batch first.")
    _check_forward(where, layer)
    return Convolution(source(), layer.bias, source, {name: getattr(layer, name) for name in DEFAULTS})


def _check_forward(where: str, layer: nn.Module) -> None:
    """Refuse a layer whose weight is not what acts: another forward, or the older hooks that replace the weight."""
    if hasattr(layer, "effective_weight"):
        return
    plain = [base for base in CONVOLUTIONS + TRANSPOSED if isinstance(layer, base)]
    own = all(type(layer).forward is not base.forward for base in plain)
    hooked = "weight" not in layer._parameters and not nn.utils.parametrize.is_parametrized(layer, "weight")
    if own or hooked:
        found = "a forward of its own" if own else "a weight that a hook replaces at each call"
        raise TypeError(
            f"{where}: {type(layer).__name__} has {found}, so its weight need not be the one that acts. Give it a "
            f"method effective_weight(), or use torch.nn.utils.parametrizations."
        )


def check_values(where: str, name: str, tensor: Tensor) -> None:
    """Raise, naming ``where``, unless the tensor has values, all of them finite floats."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise TypeError(f"{where}: the {name} must have floats, got {tensor.dtype}. Convert it first.")
    if tensor.is_meta:
        raise ValueError(
            f"{where}: the {name} is on the meta device, and its values are needed. Load them first, or use "
            f"Module.to_empty and initialise them."
        )
    if tensor.numel() == 0:
        raise ValueError(f"{where}: the {name} is empty, its shape is {tuple(tensor.shape)}. No axis may be 0.")
    if _known_not_finite(tensor):
        raise ValueError(f"{where}: the {name} has entries that are NaN or infinite. Replace them first.")


def _known_not_finite(tensor: Tensor) -> bool:
    try:
        return not bool(torch.isfinite(tensor).all())
    except RuntimeError:  # inside vmap and while tracing no value is known
        return False
