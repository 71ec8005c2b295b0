"""The network that a design of the recipe "provable" describes: modules and initial weights."""

import copy
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn

from .. import modules
from ..errors import ConversionError
from ..modules.contractive import rounded_down
from ..modules.lipschitz import output_shape
from .chain import Link
from .layers import Layer
from .provable import Design, Shape, branch_layers, goes, survives
from .recipes import ProvableRecipe

SMOOTH: dict[str, Callable[[], nn.Module]] = {
    "gelu": modules.GELU1,
    "silu": modules.SiLU1,
    "tanh": modules.Tanh,
    "softplus": modules.Softplus0,
    "smooth_relu": modules.SmoothReLU,
}
CONVOLUTIONS = {"spectral": modules.SpectralNormConv2d, "weight": modules.WeightNormConv2d}
LINEARS = {"spectral": modules.SpectralNormLinear, "weight": modules.WeightNormLinear}


def build(made: Design) -> nn.Sequential:
    """The network, in the original's dtype and on its device; blocks keep their paths where the original's are in order.

    Raises:
        ConversionError: a branch holds a layer that the recipe has no form for, or changes the image unlike its skip.
    """
    factory = {"dtype": made.dtype, "device": made.device}
    inputs, outputs = made.first
    affine = modules.EntryNormLinear(inputs, outputs, bias=made.recipe.bias, leak=made.recipe.leak, **factory)
    first = OrderedDict(flatten=nn.Flatten(), affine=affine, unflatten=nn.Unflatten(1, made.shapes[0].before))
    blocks = [(link.path, _block(link, shape, made)) for link, shape in zip(made.chain.links, made.shapes)]
    middle = {f"{name}_blocks" if name in ("first", "head") else name: part for name, part in _nested(blocks).items()}
    return nn.Sequential(OrderedDict(first=nn.Sequential(first), **middle, head=_head(made)))


def _nested(blocks: list[tuple[str, nn.Module]]) -> dict[str, nn.Module]:
    """Sequences in sequences along the paths; one flat sequence where the blocks of one parent do not stand together."""
    groups: dict[str, list[tuple[str, nn.Module]]] = {}
    last = None
    for path, block in blocks:
        head, _, rest = path.partition(".")
        if head in groups and (head != last or not rest):
            return {path.replace(".", "_") or "block": block for path, block in blocks}
        groups.setdefault(head, []).append((rest, block))
        last = head
    return {
        head or "block": members[0][1] if members[0][0] == "" else nn.Sequential(OrderedDict(_nested(members)))
        for head, members in groups.items()
    }


def _head(made: Design) -> modules.ContractiveResidual:
    shape, count = made.shapes[-1].after, made.chain.outputs
    factory = {"dtype": made.dtype, "device": made.device}
    inputs = shape[0] * shape[1] * shape[2]
    factory |= _normalisation(made.recipe)
    linear = _contraction(lambda gain: LINEARS[made.recipe.weights](inputs, count, made.recipe.bias, gain=gain, **factory), None)
    branch = nn.Sequential(OrderedDict(flatten=nn.Flatten(), linear=linear))
    readout = modules.OrthogonalReadout(shape, count, dtype=made.dtype, device=made.device)
    return modules.ContractiveResidual(branch, readout, strength=made.recipe.strength, input_shape=shape)


def _block(link: Link, shape: Shape, made: Design) -> nn.Module:
    skip = None
    if shape.before != shape.after:
        channels = shape.before[0], shape.after[0]
        skip = modules.OrthogonalDownsample2d(*channels, shape.stride, dtype=made.dtype, device=made.device)
    branch: OrderedDict[str, nn.Module] = OrderedDict()
    sizes = shape.before
    for layer in branch_layers(link):
        if layer.role == "identity" or goes(layer, made.recipe):
            continue
        new = _layer(layer, link, shape, sizes, made)
        name = layer.path.replace(".", "_") or "act"
        branch[name if name not in branch else f"{name}_{len(branch)}"] = new
        sizes = output_shape(new, sizes)
    if sizes != shape.after:
        raise ConversionError(
            f"{link.path}: its branch turns {shape.before} into {sizes}, and its skip into {shape.after}. Give its "
            f"convolutions the padding that makes them equal, for example kernel 3 with padding 1."
        )
    sequence = nn.Sequential(branch)
    if made.recipe.norm == "floored":
        return modules.SpectrallyBoundedResidual(sequence, skip, bound=made.recipe.strength)
    return modules.ContractiveResidual(sequence, skip, strength=made.recipe.strength, input_shape=shape.before)


def _layer(layer: Layer, link: Link, shape: Shape, sizes: tuple[int, ...], made: Design) -> nn.Module:
    where = f"{link.path}.{layer.path}"
    if layer.role == "convolution":
        return _convolution(layer, link, shape, sizes, made)
    if layer.role == "activation":
        return copy.deepcopy(_not_in_place(layer.module)) if made.recipe.activation == "keep" else SMOOTH[made.recipe.activation]()
    if layer.role == "norm":
        return _floored(layer.module, where)
    if layer.role == "mean":
        return copy.deepcopy(layer.module)
    raise ConversionError(
        f"{where}: {type(layer.module).__name__} ({layer.role}) has no provable form. Build the network without it, or "
        f"use recipe='paper'."
    )


def _not_in_place(activation: nn.Module) -> nn.Module:
    if not getattr(activation, "inplace", False):
        return activation
    plain = copy.deepcopy(activation)
    plain.inplace = False
    return plain


def _floored(norm: nn.Module, where: str) -> nn.Module:
    if type(norm) is not nn.BatchNorm2d:
        raise ConversionError(f"{where}: norm='floored' is for nn.BatchNorm2d, got {type(norm).__name__}. Use norm='none'.")
    return modules.FlooredBatchNorm2d.from_module(norm)


def _convolution(layer: Layer, link: Link, shape: Shape, sizes: tuple[int, ...], made: Design) -> nn.Module:
    old = layer.module
    if type(old) is not nn.Conv2d:
        raise ConversionError(f"{link.path}.{layer.path}: an nn.Conv2d was needed, got {type(old).__name__}.")
    if sizes[0] % old.groups:
        raise ConversionError(f"{link.path}.{layer.path}: {sizes[0]} channels in {old.groups} groups do not fit.")
    options = {
        "stride": old.stride, "padding": old.padding, "dilation": old.dilation, "groups": old.groups,
        "padding_mode": old.padding_mode, "bias": made.recipe.bias, "dtype": made.dtype, "device": made.device,
        **_normalisation(made.recipe),
    }  # fmt: skip
    kind = CONVOLUTIONS[made.recipe.weights]
    new = _contraction(lambda gain: kind(sizes[0], old.out_channels, old.kernel_size, gain=gain, **options), sizes)
    if survives(layer, link, shape):
        with torch.no_grad():
            new.weight.copy_(old.weight)
    return new


def _normalisation(recipe: ProvableRecipe) -> dict[str, float]:
    """Constants of the normalised layers in a branch."""
    return {"eps": recipe.eps} | ({"power": recipe.power} if recipe.weights == "spectral" else {})


def _contraction(make: Callable[[float], nn.Module], sizes: tuple[int, ...] | None) -> nn.Module:
    """The layer with the largest gain, at most 1, for which its operator norm is at most 1 for every weight."""
    supremum = make(1.0).operator_norm_supremum(sizes)
    return make(min(1.0, rounded_down(1.0 / supremum)))
