"""The recipe "provable": the sizes of the new network, block for block, and its plan, before a weight is built."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import ConversionError
from .blocks import layers_of
from .chain import Chain, Link
from .layers import Layer
from .plan import Plan, Step
from .recipes import ProvableRecipe


@dataclass(frozen=True)
class Shape:
    """Sizes of a block in the new network: the image before and after it."""

    before: tuple[int, int, int]
    after: tuple[int, int, int]
    stride: int


@dataclass(frozen=True)
class Design:
    """Everything that is decided before a weight is built."""

    recipe: ProvableRecipe
    chain: Chain
    shapes: tuple[Shape, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def first(self) -> tuple[int, int]:
        """Inputs and outputs of the first layer."""
        return math.prod(self.recipe.input_shape), math.prod(self.shapes[0].before)


def shape_of(recipe: ProvableRecipe, sample_input: object) -> tuple[int, ...]:
    """The shape of one sample, from the recipe or the sample.

    Raises:
        ConversionError: neither says it.
    """
    if recipe.input_shape is not None:
        return recipe.input_shape
    sample = sample_input[0] if isinstance(sample_input, tuple) and sample_input else sample_input
    if not isinstance(sample, Tensor) or sample.dim() != 4:
        found = tuple(sample.shape) if isinstance(sample, Tensor) else type(sample).__name__
        raise ConversionError(
            f"recipe 'provable': the first layer is dense over the flattened image, so its shape is needed: give "
            f"sample_input=(N, C, H, W), or convert.provable(input_shape=(C, H, W)); got {found}."
        )
    return tuple(sample.shape[1:])


def design(model: nn.Module, chain: Chain, recipe: ProvableRecipe) -> Design:
    """Choose all sizes: each block keeps its channels and its stride, and no block has more outputs than inputs.

    Raises:
        ConversionError: a block that widens without halving the image, strides that differ between the axes, more
            classes than features, or a first layer above the recipe's ``most_bytes``.
    """
    like = next(p for p in model.parameters() if p.is_floating_point())
    strides = [_stride(link) for link in chain.links]
    total = math.prod(strides)
    height, width = (math.ceil(size / total) * total for size in chain.links[0].before[1:])
    channels = max(chain.links[0].before[0], math.ceil(chain.links[0].after[0] / strides[0] ** 2))
    shapes = []
    for link, stride in zip(chain.links, strides):
        before = (channels, height, width)
        channels, height, width = link.after[0], height // stride, width // stride
        if channels > before[0] * stride**2:
            raise ConversionError(
                f"{link.path}: {before[0]} channels become {channels} at stride {stride}, and the dimension may not grow "
                f"behind the first layer (Theorem 4.7). Use at most {before[0] * stride**2} channels here."
            )
        shapes.append(Shape(before, (channels, height, width), stride))
    made = Design(recipe, chain, tuple(shapes), like.dtype, like.device)
    _check_sizes(made)
    return made


def _stride(link: Link) -> int:
    found = link.found
    if found.anatomy.branch is None:
        raise ConversionError(f"{link.path}: its branch cannot be rebuilt, because {found.anatomy.obstacle}.")
    total = (1, 1)
    for layer in branch_layers(link):
        step = getattr(layer.module, "stride", 1) if layer.role in ("convolution", "mean") else 1
        total = tuple(a * b for a, b in zip(total, (step, step) if isinstance(step, int) else step))
    if total[0] != total[1]:
        raise ConversionError(f"{link.path}: its strides {total} differ, and the orthogonal skip has one for both axes.")
    return total[0]


def branch_layers(link: Link) -> list[Layer]:
    return layers_of(link.found.block, link.found.anatomy.before + link.found.anatomy.branch)


def _check_sizes(made: Design) -> None:
    inputs, outputs = made.first
    size = inputs * outputs * made.dtype.itemsize
    if size > made.recipe.most_bytes:
        raise ConversionError(
            f"recipe 'provable': the first layer would be {inputs} -> {outputs}, {_bytes(size)} of weights alone, above "
            f"most_bytes={made.recipe.most_bytes}. Use a narrower network, a stem with a larger stride or smaller images, "
            f"or raise convert.provable(most_bytes=...)."
        )
    features = math.prod(made.shapes[-1].after)
    if made.chain.outputs > features:
        raise ConversionError(f"recipe 'provable': {made.chain.outputs} outputs from {features} features; it may not grow.")


def _bytes(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.4g} {unit}"
        size /= 1024
    raise AssertionError


def plan_of(model: nn.Module, made: Design) -> Plan:
    """The plan: the stem, each block, the head; and what the first layer costs."""
    inputs, outputs = made.first
    recipe = made.recipe
    stem, head = _keys_outside(model, made.chain)
    steps = [
        Step(
            "", f"{type(model).__name__}: stem", f"EntryNormLinear {inputs} -> {outputs}, leak {recipe.leak:g}",
            f"rank X = N <= {inputs} needs a dense first layer (Theorem 4.7, hypothesis 2); seen as an image "
            f"{'x'.join(map(str, made.shapes[0].before))}", dropped=stem,
        )
    ]  # fmt: skip
    for link, shape in zip(made.chain.links, made.shapes):
        steps.append(_block_step(link, shape, made))
    last, count = made.shapes[-1].after, made.chain.outputs
    steps.append(
        Step(
            "", f"{type(model).__name__}: head", f"OrthogonalReadout {'x'.join(map(str, last))} -> {count} + "
            f"{recipe.strength:g} * bounded branch",
            "the last layer's Jacobian needs singular values above 0 as well (hypothesis 1)", dropped=head,
        )
    )  # fmt: skip
    return Plan(recipe, type(model).__name__, tuple(steps), notes=_notes(made))


def _block_step(link: Link, shape: Shape, made: Design) -> Step:
    skip = "identity" if shape.before == shape.after else f"OrthogonalDownsample2d, stride {shape.stride}"
    dropped = sorted({type(layer.module).__name__ for layer in branch_layers(link) if goes(layer, made.recipe)})
    why = "branch of norm below 1 everywhere, skip with all singular values 1 (hypothesis 1)"
    if dropped:
        why += f"; without {', '.join(dropped)}"
    kept = tuple(f"{link.path}.{layer.path}.weight" for layer in branch_layers(link) if survives(layer, link, shape))
    prefix = f"{link.path}." if link.path else ""
    dropped_keys = tuple(key for name in link.found.block.state_dict() if (key := f"{prefix}{name}") not in kept)
    before = f"{type(link.found.block).__name__} {link.before[0]} -> {link.after[0]}"
    kind = "SpectrallyBoundedResidual" if made.recipe.norm == "floored" else "ContractiveResidual"
    return Step(link.path, before, f"{kind}, skip {skip}", why, kept, dropped=dropped_keys)


def _keys_outside(model: nn.Module, chain: Chain) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The keys of the model before its first block, and the other ones that stand in no block."""
    paths = tuple(f"{link.path}." for link in chain.links)
    stem, head, seen = [], [], False
    for key in model.state_dict():
        inside = key.startswith(paths) or not chain.links[0].path
        seen = seen or inside
        if not inside:
            (head if seen else stem).append(key)
    return tuple(stem), tuple(head)


def goes(layer: Layer, recipe: ProvableRecipe) -> bool:
    return layer.role == "dropout" or (layer.role.startswith("norm") and recipe.norm == "none")


def survives(layer: Layer, link: Link, shape: Shape) -> bool:
    """Whether a layer's weight has the same shape in the new block, whose first convolution may read more channels."""
    if layer.role != "convolution":
        return False
    first = next(other for other in branch_layers(link) if other.role == "convolution")
    return layer.path != first.path or shape.before[0] == link.before[0]


def _notes(made: Design) -> tuple[str, ...]:
    inputs, outputs = made.first
    size = inputs * outputs * made.dtype.itemsize
    memory = f"{inputs} x {outputs} = {inputs * outputs:,} weights, {_bytes(size)}"
    notes = [
        f"First layer: {memory}, and as much again for the gradient and for each buffer of the optimiser.",
        "The network computes another function: train it before use. Kept weights give their direction only.",
        f"Certificates need linearly independent samples, so at most {inputs} of them.",
    ]
    if made.recipe.leak == 0.0:
        notes.append("leak = 0: the global grade is out of reach, because the first layer's slope has no lower bound.")
    if made.recipe.activation == "keep":
        notes.append("activation='keep': with an activation that is not smooth, such as ReLU, the grade is at most measured.")
    if made.recipe.norm == "floored":
        notes.append("norm='floored': batch statistics couple the samples; the grade is at most measured.")
    return tuple(notes)


def with_shape(recipe: ProvableRecipe, sample_input: object) -> ProvableRecipe:
    """The recipe with the shape of one sample filled in, so that a checkpoint can convert again without a sample."""
    return replace(recipe, input_shape=shape_of(recipe, sample_input))
