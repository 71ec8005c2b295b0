"""Weights too large to be computed more than once: P(w) in float64, kept while one certificate is made.

A dense first layer of 200 million weights takes seconds and gigabytes each time that P(w) is computed, and a certificate
looks at it a dozen times. Inside ``weights_held`` it is computed once for each layer, so nobody may write to the weights
there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import (
    EntryNormLinear,
    SpectralNormConv1d,
    SpectralNormConv2d,
    SpectralNormConv3d,
    SpectrallyBoundedResidual,
    SpectralNormLinear,
    WeightNormLinear,
)

MANY = 2**22  # entries of a weight; a smaller one is computed whenever it is asked for
MANY_OF_SPECTRAL = 2**14  # a Schatten norm takes products of the weight with itself
LAYERS = (EntryNormLinear, WeightNormLinear)
SPECTRAL = (SpectralNormLinear, SpectralNormConv1d, SpectralNormConv2d, SpectralNormConv3d)
_held: ContextVar[dict[nn.Module, Tensor] | None] = ContextVar("held", default=None)


@contextmanager
def weights_held() -> Iterator[None]:
    """Keep each large P(w) that is asked for in here; they go at the end."""
    token = _held.set({})
    try:
        yield
    finally:
        _held.reset(token)


def acting_weight(module: nn.Module) -> Tensor:
    """P(w), or w where the layer normalises nothing, in the layer's own dtype."""
    held = _held.get()
    if held is not None and module in held:
        return held[module]
    weight = module.effective_weight() if hasattr(module, "effective_weight") else module.weight
    if held is not None and _is_large(module):
        held[module] = weight.detach()
    return weight.detach()


@contextmanager
def with_held_weights(model: nn.Module, *, moving: tuple[str, ...] = ()) -> Iterator[nn.Module]:
    """The model, whose large layers take P(w) as it is held; ``moving`` names weights that must not be.

    The same bits as their own forward, which multiplies by the same P(w). Elsewhere than in ``weights_held`` the model as it is.
    """
    layers = [] if _held.get() is None else model.named_modules()
    followed = {layer for block in model.modules() if _follows_weights(block) for layer in block.branch.modules()}
    large = [
        module
        for path, module in layers
        if _is_large(module) and "forward" not in vars(module) and f"{path}.weight".lstrip(".") not in moving
        and module not in followed
    ]  # fmt: skip
    try:
        for module in large:
            apply = F.linear if isinstance(module, nn.Linear) else module._conv_forward
            module.forward = partial(_applied, apply, weight=acting_weight(module), bias=module.bias)
        yield model
    finally:
        for module in large:
            del module.forward


def _follows_weights(module: nn.Module) -> bool:
    """Whether its forward reads its layers' weights, and refuses a layer whose own forward is replaced."""
    return isinstance(module, SpectrallyBoundedResidual) and "_frozen" not in vars(module)


def _is_large(module: nn.Module) -> bool:
    least = {kind: MANY for kind in LAYERS} | {kind: MANY_OF_SPECTRAL for kind in SPECTRAL}
    return type(module) in least and module.weight.numel() > least[type(module)]


def _applied(apply: Callable[..., Tensor], x: Tensor, *, weight: Tensor, bias: Tensor | None) -> Tensor:
    return apply(x, weight, bias)
