"""A model of plain torch layers that computes what a model with our layers computes."""

import copy

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..errors import ConversionError
from .plain import RULES

OURS = __name__.partition(".")[0] + "."


@torch.no_grad()
def fold(model: nn.Module) -> nn.Module:
    """An independent copy of the model made of plain torch layers only, with the same outputs.

    Normalised layers become torch's with their effective weight, a pooled convolution and the orthogonal skip
    one ``nn.Conv2d`` each, blocks a ``torch.fx.GraphModule`` of their layers, our activations a layer or a graph.
    For serving, ``torch.export`` and ONNX: nothing of this package is needed to load or run the result. Modes,
    dtypes, devices, hooks and requires_grad are kept, modules that are shared stay shared; the free weights of
    normalised layers, the scale of a bounded block and ``conversion_report`` are not kept, so train before.

    Cost:
        One copy of the model. A pooled convolution of stride s has a kernel of 2 s - 1 afterwards.
    Raises:
        ConversionError: a subclass of one of our layers, whose own code has no plain form, with its path.
    """
    if not isinstance(model, nn.Module):
        raise ConversionError(f"fold: the model must be a torch.nn.Module, got {type(model).__name__}.")
    try:
        folded = _folded(copy.deepcopy(model), "", {})
    except (RuntimeError, TypeError) as error:
        raise ConversionError(f"fold: {type(model).__name__} cannot be copied or folded ({error}).") from error
    for path, module in folded.named_modules():
        vars(module).pop("conversion_report", None)
        if any(base.__module__.startswith(OURS) for base in type(module).__mro__):
            raise ConversionError(
                f"{path or 'fold'}: {type(module).__name__} has code of its own above our layer, and no plain form is "
                "known. Replace it by the layer itself before folding."
            )
    return folded


def _folded(module: nn.Module, path: str, done: dict[int, tuple[nn.Module, nn.Module]]) -> nn.Module:
    """The plain form of a module that we may change, its children first; a shared module is folded once."""
    if id(module) not in done:
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = _folded(child, f"{path}.{name}".lstrip("."), done)
        _bake_parametrizations(module)
        rule = RULES.get(type(module))
        done[id(module)] = (module, rule(module) if rule else module)
    return done[id(module)][1]


def _bake_parametrizations(module: nn.Module) -> None:
    """Leave the value that acts in the place of a tensor that one of our parametrizations computes."""
    if not parametrize.is_parametrized(module):
        return
    for name, steps in list(module.parametrizations.items()):
        if any(type(step).__module__.startswith(OURS) for step in steps):
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
