"""A normalised layer from a plain one: the free weight is set so that the effective weight is the old weight."""

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from ..errors import ConversionError
from ..functional import FLOATS

_CONV_ARGUMENTS = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)
ARGUMENTS = {
    nn.Linear: ("in_features", "out_features"),
    nn.Conv1d: _CONV_ARGUMENTS,
    nn.Conv2d: _CONV_ARGUMENTS,
    nn.Conv3d: _CONV_ARGUMENTS,
}


def layer_from_module(cls: type, plain: nn.Module, *, nearest: bool, options: dict) -> nn.Module:
    """What ``cls.from_module`` does; see there."""
    where = f"{cls.__name__}.from_module"
    _check_plain(where, plain, cls.plain_type)
    arguments = {name: getattr(plain, name) for name in ARGUMENTS[cls.plain_type]}
    new = cls(**arguments, **options, bias=plain.bias is not None, device="meta", dtype=plain.weight.dtype)
    weight = cls._inverse(plain.weight, nearest=nearest, where=where, **new._inverse_options())
    new.weight = nn.Parameter(weight, requires_grad=plain.weight.requires_grad)
    if plain.bias is not None:
        new.bias = nn.Parameter(plain.bias.detach().clone(), requires_grad=plain.bias.requires_grad)
    new.train(plain.training)
    if not nearest:
        _check_equal(where, new, plain.weight)
    return new


def _check_plain(where: str, plain: nn.Module, wanted: type) -> None:
    """Refuse what is not exactly torch's layer, since its forward or its weight would be lost."""
    found = type(plain)
    name = wanted.__name__
    methods = ("forward", "_conv_forward") if hasattr(wanted, "_conv_forward") else ("forward",)
    if not isinstance(plain, wanted):
        problem = f"a plain torch.nn.{name} is needed"
    elif any(getattr(found, m) is not getattr(wanted, m) or m in vars(plain) for m in methods):
        problem = f"it has a forward of its own, which would be lost; a plain torch.nn.{name} is needed"
    elif is_parametrized(plain) or "weight" not in plain._parameters:
        problem = "its weight is computed from other parameters; remove the parametrisation first"
    elif is_lazy(plain.weight):
        problem = "its shape is not known yet; run one forward pass first"
    elif plain.weight.dtype not in FLOATS:
        problem = f"its weight has dtype {plain.weight.dtype}, and only real floats can be normalised"
    else:
        return
    raise ConversionError(f"{where}: got a {found.__module__}.{found.__qualname__}; {problem}.")


@torch.no_grad()
def _check_equal(where: str, new: nn.Module, wanted: torch.Tensor) -> None:
    """The dtype must be able to hold the free weight: float16 ends at 65504, and below 6e-8."""
    if wanted.numel() == 0:
        return
    difference = (new.effective_weight().double() - wanted.double()).abs().max()
    columns = wanted[0].numel()
    roundoff = torch.finfo(wanted.dtype).eps
    allowed = (16 * roundoff + new.constants().rounding_allowance(columns, 2.0**-24)) * wanted.abs().max().double()
    if not bool(difference <= allowed):
        raise ConversionError(
            f"{where}: {wanted.dtype} cannot hold the free weight for eps={new.eps:g}: the effective weight would be "
            f"off by {float(difference):.3g}. Use eps nearer to 1, or convert the layer in float32."
        )
