"""What a recipe puts in the place of a projection shortcut."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..modules.shortcut import PooledConv2d, PooledSequential
from ..modules.skip import OrthogonalDownsample2d
from ..tracing import chain_of
from .blocks import Anatomy, layers_of
from .layers import Layer, is_sequence


class Refused(Exception):
    """A block that a recipe would rewrite and cannot; the text says why."""


@dataclass(frozen=True)
class Change:
    """One module to replace: its path, what it becomes in a word, and the function from the old one to the new one."""

    path: str
    kind: str
    make: Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Projection:
    """The layers of a shortcut with one convolution or linear layer among them; identities are left out."""

    layers: tuple[Layer, ...]
    core: Layer

    def __str__(self) -> str:
        core = self.core.module
        if isinstance(core, nn.Linear):
            return f"projection {core.in_features}->{core.out_features}"
        return f"projection {core.in_channels}->{core.out_channels}, stride {_short(self.strides())}"

    def strides(self) -> tuple[int, ...]:
        """Stride of the whole shortcut, along each axis of the image."""
        total = self.core.module.stride
        for layer in self.layers:
            if layer.role == "mean":
                step = layer.module.stride
                total = tuple(a * b for a, b in zip(total, (step,) * len(total) if isinstance(step, int) else step))
        return total


def _short(stride: tuple[int, ...]) -> str:
    return str(stride[0]) if len(set(stride)) == 1 else str(stride)


def projection_of(block: nn.Module, anatomy: Anatomy) -> Projection | None:
    """The projection in a block's shortcut; None where the shortcut is the identity, or pooling without weights.

    Raises:
        Refused: two convolutions stand in the shortcut.
    """
    layers = tuple(layer for layer in layers_of(block, anatomy.skip) if layer.role != "identity")
    cores = [layer for layer in layers if layer.role == "convolution"]
    if len(cores) > 1:
        raise Refused(f"its shortcut holds {len(cores)} convolutions, and a projection has one")
    return Projection(layers, cores[0]) if cores else None


def pooled_change(projection: Projection, anatomy: Anatomy, block: nn.Module, norms_go: bool) -> Change:
    """The change that adds the pooled path to a projection: at the convolution itself if it is the only layer.

    Raises:
        Refused: not two-dimensional, fewer channels out than in, another grid than a 1x1 convolution's, or
            several layers that are not in one module.
    """
    core, conv = projection.core, projection.core.module
    if type(conv) is not nn.Conv2d:
        raise Refused(f"the pooled shortcut is for nn.Conv2d, and {core.path} is a {type(conv).__name__}")
    try:
        PooledConv2d.from_conv(conv)
    except ValueError as error:
        raise Refused(f"{core.path} has no pooled form: {error}") from error
    layers = [layer for layer in projection.layers if not (norms_go and layer.role == "norm")]
    if len(layers) == 1:
        return Change(core.path, "PooledConv2d", PooledConv2d.from_conv)
    for layer in layers:
        if layer.role == "mean" and not _covers_once(layer.module):
            raise Refused(f"{layer.path} pools windows that overlap or leave gaps")
    path, names = _only_call(block, anatomy)
    options = {"in_channels": conv.in_channels, "out_channels": conv.out_channels, "stride": projection.strides()}
    return Change(path, "PooledSequential", lambda old: _as_pooled(old, names, options))


def _covers_once(pool: nn.AvgPool2d) -> bool:
    size, step, padding = (
        (v, v) if isinstance(v, int) else tuple(v) for v in (pool.kernel_size, pool.stride, pool.padding)
    )
    return size == step and padding == (0, 0) and pool.divisor_override is None


def _only_call(block: nn.Module, anatomy: Anatomy) -> tuple[str, list[str]]:
    """The one module of a shortcut of several layers, and its children in the order in which it applies them."""
    if len(anatomy.skip) != 1:
        raise Refused("its shortcut calls several modules; put them into one nn.Sequential")
    path = anatomy.skip[0].path
    module = block.get_submodule(path)
    names = list(module._modules) if is_sequence(module) else chain_of(module)
    if names is None or sorted(names) != sorted(module._modules) or any(module._modules[n] is None for n in names):
        raise Refused(f"{path} does more than apply its layers one after the other")
    return path, names


def _as_pooled(old: nn.Module, names: list[str], options: dict) -> PooledSequential:
    pooled = PooledSequential(**options)
    for name in names:
        pooled.add_module(name, old._modules[name])
    return carry_over(old, pooled)


def orthogonal_change(projection: Projection, anatomy: Anatomy) -> Change:
    """The change that puts the orthogonal skip in the place of the whole shortcut.

    Raises:
        Refused: not two-dimensional, strides that differ, or a shortcut that is not one module.
    """
    core, conv = projection.core, projection.core.module
    if type(conv) is not nn.Conv2d:
        raise Refused(f"the orthogonal skip is for nn.Conv2d, and {core.path} is a {type(conv).__name__}")
    if len(anatomy.skip) != 1:
        raise Refused("its shortcut calls several modules; put them into one nn.Sequential")
    strides = projection.strides()
    if len(set(strides)) != 1:
        raise Refused(f"the orthogonal skip has one stride for both axes, and {core.path} has {strides}")
    shape, weight = (conv.in_channels, conv.out_channels, strides[0]), conv.weight

    def make(old: nn.Module) -> nn.Module:
        with torch.no_grad():
            return carry_over(old, OrthogonalDownsample2d(*shape, device=weight.device, dtype=weight.dtype))

    return Change(anatomy.skip[0].path, "OrthogonalDownsample2d", make)


def carry_over(old: nn.Module, new: nn.Module) -> nn.Module:
    """Give the new module the old one's hooks and mode; the handles that users hold stay valid."""
    for name in vars(new):
        if "hook" in name and name in vars(old):
            vars(new)[name] = vars(old)[name]
    new.training = old.training
    return new
