"""A model of plain torch layers that computes what a model with our layers computes."""

import copy

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..errors import ConversionError
from ..modules import SpectrallyBoundedResidual
from .plain import RULES

PACKAGE = __name__.partition(".")[0]
OURS = (f"{PACKAGE}.modules.", f"{PACKAGE}.parametrizations")  # a network of the demo is the user's, as any other


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
    _check_plain(folded)
    return folded


def _check_plain(folded: nn.Module) -> None:
    """Take the reports off, and raise ConversionError where a type of ours is left."""
    for path, module in folded.named_modules():
        vars(module).pop("conversion_report", None)
        if any(base.__module__.startswith(OURS) for base in type(module).__mro__):
            if parametrize.is_parametrized(module):
                raise ConversionError(
                    f"{path or 'fold'}: {type(module).__name__} has an active parametrization above our layer. Call "
                    "torch.nn.utils.parametrize.remove_parametrizations before folding."
                )
            raise ConversionError(
                f"{path or 'fold'}: {type(module).__name__} has code of its own above our layer, and no plain form is "
                "known. Replace it by the layer itself before folding."
            )


def _folded(module: nn.Module, path: str, done: dict[int, tuple[nn.Module, nn.Module]]) -> nn.Module:
    """The plain form of a module that we may change, its children first; a shared module is folded once."""
    if id(module) not in done:
        if isinstance(module, SpectrallyBoundedResidual):
            module.freeze()  # its scale is read from the layers, which are folded next
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = _folded(child, f"{path}.{name}".lstrip("."), done)
        if type(module) in RULES and "weight" not in module._parameters and hasattr(module, "weight"):
            raise ConversionError(
                f"{path or 'fold'}: a hook computes the weight of {type(module).__name__}. Remove it before folding, for "
                "example with torch.nn.utils.remove_weight_norm."
            )
        rule = _baked if _has_our_parametrization(module) else RULES.get(type(module), lambda kept: kept)
        done[id(module)] = (module, rule(module))
    return done[id(module)][1]


def _has_our_parametrization(module: nn.Module) -> bool:
    if not parametrize.is_parametrized(module):
        return False
    return any(type(step).__module__.startswith(OURS) for steps in module.parametrizations.values() for step in steps)


def _baked(module: nn.Module) -> nn.Module:
    """A module of the class before parametrisation, whose tensors are the values that act.

    ``torch.nn.utils.parametrize.remove_parametrizations`` would delete the property from the class, which a copy
    shares with its original.
    """
    kind = parametrize.type_before_parametrizations(module)
    plain = kind.__new__(kind)
    plain.__dict__.update(vars(module))
    plain._parameters = dict(module._parameters)
    plain._modules = {name: child for name, child in module._modules.items() if name != "parametrizations"}
    for name, steps in module.parametrizations.items():
        trained = any(parameter.requires_grad for parameter in steps.parameters())
        plain._parameters[name] = nn.Parameter(getattr(module, name).detach().clone(), requires_grad=trained)
    return plain
