"""A block put together anew in pre-activation form, from its own layers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..modules.preactivation import PreActivationBlock
from .blocks import Anatomy, Call, layers_of
from .layers import PASSIVE, Layer, why_unknown
from .skips import Refused, carry_over


@dataclass(frozen=True)
class Parts:
    """Names of the layers of the new block: those that stay, those that are new and those that go."""

    before: tuple[str, ...]
    branch: tuple[str, ...]
    shortcut: tuple[str, ...]
    shortcut_reads_input: bool
    activations: tuple[tuple[str, Call], ...]
    removed: tuple[str, ...] = ()
    norm: str = ""
    template: str = ""
    channels: int = 0


def moved_parts(block: nn.Module, anatomy: Anatomy, reads_input: bool, norms_stay: bool) -> Parts:
    """The parts of a post-activation block moved to pre-activation.

    The branch loses its last norm and, unless ``norms_stay``, the shortcut its own; a new norm of the same
    kind stands in front, followed by the activation that stood behind the addition.

    Raises:
        Refused: the branch is no chain of known layers, has no norm, or does not begin with a convolution.
    """
    layers = _checked_layers(block, anatomy)
    after = layers_of(block, anatomy.after)
    if [layer.role for layer in after if layer.role != "identity"] != ["activation"]:
        raise Refused("something beside one activation follows its addition")
    gone = _norms_that_go(layers, [] if norms_stay else layers_of(block, anatomy.skip))
    template, channels = _template(layers), _input_channels(layers)
    names = _Names(block)
    norm = names.free("norm")
    return Parts(
        before=(norm, *names.of(anatomy.after)),
        branch=tuple(name for name in names.of(anatomy.branch) if name not in gone),
        shortcut=tuple(name for name in names.of(anatomy.skip) if name not in gone),
        shortcut_reads_input=reads_input,
        activations=tuple(names.activations.items()),
        removed=tuple(sorted(gone)),
        norm=norm,
        template=template.path,
        channels=channels,
    )


def same_parts(block: nn.Module, anatomy: Anatomy) -> Parts:
    """The parts of a pre-activation block whose shortcut moves to the raw input; nothing else changes.

    Raises:
        Refused: the branch is no chain of known layers, or its first layer overwrites the input.
    """
    first = next((layer for layer in _checked_layers(block, anatomy) if layer.role != "identity"), None)
    if first and getattr(first.module, "inplace", False):
        raise Refused(f"{first.path} works in place on the block's input, which the skip is to read; use inplace=False")
    names = _Names(block)
    before, branch, skip = names.of(anatomy.before), names.of(anatomy.branch), names.of(anatomy.skip)
    return Parts(before, branch, skip, True, tuple(names.activations.items()))


class _Names:
    """Gives each step of a path the name of its layer, and free names to activations that had no module."""

    def __init__(self, block: nn.Module) -> None:
        self.taken = set(dir(block)) | set(block._modules) | set(dir(PreActivationBlock))
        self.activations: dict[str, Call] = {}

    def free(self, wish: str) -> str:
        name, count = wish, 0
        while name in self.taken:
            count += 1
            name = f"{wish}_{count}"
        self.taken.add(name)
        return name

    def of(self, calls: Sequence[Call]) -> tuple[str, ...]:
        return tuple(call.path or self._activation(call) for call in calls)

    def _activation(self, call: Call) -> str:
        for name, known in self.activations.items():
            if known == call:
                return name
        name = self.free("act")
        self.activations[name] = call
        return name


def _checked_layers(block: nn.Module, anatomy: Anatomy) -> list[Layer]:
    if anatomy.branch is None:
        raise Refused(anatomy.obstacle)
    layers = layers_of(block, anatomy.before + anatomy.branch)
    for layer in layers:
        if layer.role == "unknown":
            raise Refused(why_unknown(layer))
    return layers


def _norms_that_go(branch: list[Layer], skip: list[Layer]) -> set[str]:
    """Paths of the last norm of a branch and of every norm of its shortcut."""
    last = _last_norm(branch)
    if last and [layer.path for layer in branch].count(last.path) > 1:
        raise Refused(f"{last.path} is applied more than once, and the recipe drops one use of it only")
    return {layer.path for layer in skip if layer.role == "norm"} | ({last.path} if last else set())


def _last_norm(layers: list[Layer]) -> Layer | None:
    """The norm at the end of a branch, behind its last convolution."""
    for layer in reversed(layers):
        if layer.role in ("norm", "convolution"):
            return layer if layer.role == "norm" else None
        if layer.role not in PASSIVE:
            raise Refused("its branch ends in an activation, in front of the addition")
    return None


def _template(layers: list[Layer]) -> Layer:
    norms = [layer for layer in layers if layer.role in ("norm", "norm and activation")]
    if not norms:
        raise Refused("its branch has no norm whose kind the new one in front could take")
    return norms[-1]


def _input_channels(layers: list[Layer]) -> int:
    first = next((layer for layer in layers if layer.role not in PASSIVE), None)
    if first is None or first.role != "convolution":
        raise Refused("its branch does not begin with a convolution")
    return getattr(first.module, "in_channels", None) or first.module.in_features


def fresh_norm(template: nn.Module, channels: int, device: torch.device | str | None = None) -> nn.Module:
    """A new norm of the same kind in torch.nn, constants, dtype, device, mode and requires_grad over ``channels`` channels.

    Raises:
        Refused: the kind cannot have that many channels.
    """
    names = [
        name
        for name in ("eps", "momentum", "affine", "track_running_stats", "process_group")
        if hasattr(template, name)
    ]
    options = {name: getattr(template, name) for name in names}
    sample = template.weight if template.weight is not None else getattr(template, "running_mean", None)
    if sample is not None:
        options |= {"device": device or sample.device, "dtype": sample.dtype}
    counts = (template.num_groups, channels) if hasattr(template, "num_groups") else (channels,)
    kind = next(
        base for base in type(template).__mro__ if base.__module__.startswith("torch.nn.")
    )  # a zoo's subclass adds an activation
    try:
        norm = kind(*counts, **options)
    except ValueError as error:
        raise Refused(f"a {kind.__name__} over {channels} channels is impossible: {error}") from error
    if template.weight is not None and template.bias is None:
        norm.register_parameter("bias", None)
    for name, parameter in norm.named_parameters():
        parameter.requires_grad_(getattr(template, name).requires_grad)
    return norm.train(template.training)


def assemble(old: nn.Module, parts: Parts) -> PreActivationBlock:
    """The new block, from the old one's layers and the few new ones; the old one is not touched."""
    layers = {name: layer for name, layer in old._modules.items() if layer is not None and name not in parts.removed}
    if parts.norm:
        layers[parts.norm] = fresh_norm(old.get_submodule(parts.template), parts.channels)
    for name, call in parts.activations:
        layers[name] = call.activation(**dict(call.options)).train(old.training)
    roles = {"before": parts.before, "branch": parts.branch, "shortcut": parts.shortcut}
    return carry_over(old, PreActivationBlock(layers, **roles, shortcut_reads_input=parts.shortcut_reads_input))
