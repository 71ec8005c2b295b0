"""How far a conversion moves the function that a model computes."""

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import ConversionError


def function_change(original: nn.Module, converted: nn.Module, sample_input: Tensor | tuple) -> float:
    """|F'(x) - F(x)| / |F(x)| over all output tensors, or |F'(x) - F(x)| where F(x) is 0, in evaluation mode.

    Both modules are changed to evaluation mode: give copies. Random generators stay as they are.

    Raises:
        ConversionError: the model is on the meta device, fails on the input, or gives values that are not finite.
    """
    sample = next((t for t in (*original.parameters(), *original.buffers()) if t.is_floating_point()), None)
    if sample is not None and sample.is_meta:
        raise ConversionError(
            "sample_input: a model on the meta device computes no values. Give it weights, or no sample."
        )
    inputs = sample_input if isinstance(sample_input, tuple) else (sample_input,)
    inputs = tree_map(lambda value: _moved(value, sample), inputs)
    devices = [sample.device] if sample is not None and sample.is_cuda else []
    with torch.random.fork_rng(devices), torch.no_grad():
        before, after = (_outputs(module.eval(), inputs) for module in (original, converted))
    if not all(torch.isfinite(value).all() for value in before):
        raise ConversionError("sample_input: the original model gives values that are not finite on it.")
    moved = sum(float(torch.sum((b - a) ** 2)) for b, a in zip(before, after)) ** 0.5
    size = sum(float(torch.sum(b**2)) for b in before) ** 0.5
    return moved / size if size else moved


def _moved(value: object, sample: Tensor | None) -> object:
    if not isinstance(value, Tensor):
        return value
    if value.is_meta:
        raise ConversionError("sample_input: a tensor on the meta device has no values. Give one with values.")
    value = value.detach().clone()
    if sample is None:
        return value
    return value.to(sample.device, sample.dtype if value.is_floating_point() else value.dtype)


def _outputs(module: nn.Module, inputs: tuple) -> list[Tensor]:
    try:
        result = module(*tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, inputs))
    except Exception as error:  # whatever the user's model raises
        raise ConversionError(
            f"sample_input: {type(module).__name__} fails on it ({type(error).__name__}: {error})."
        ) from error
    values = [leaf.double() for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not values:
        raise ConversionError(f"sample_input: {type(module).__name__} returns no floating-point tensor to compare.")
    return values
