"""Weights too large to be computed more than once: P(w) in float64, kept while one certificate is made.

A dense first layer of 200 million weights takes seconds and gigabytes each time that P(w) is computed, and a certificate
looks at it a dozen times. Inside ``weights_held`` it is computed once for each layer, so nobody may write to the weights
there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import EntryNormLinear, WeightNormLinear

MANY = 2**22  # entries of a weight; a smaller one is computed whenever it is asked for
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
    if held is not None and weight.numel() > MANY:
        held[module] = weight.detach()
    return weight.detach()


@contextmanager
def with_held_weights(model: nn.Module, *, moving: tuple[str, ...] = ()) -> Iterator[nn.Module]:
    """The model, whose large dense layers take P(w) as it is held; ``moving`` names weights that must not be.

    The same bits as their own forward, which multiplies by the same P(w). Elsewhere than in ``weights_held`` the model as it is.
    """
    large = [] if _held.get() is None else [m for path, m in model.named_modules() if _is_large(m, path, moving)]
    try:
        for module in large:
            module.forward = partial(_product, weight=acting_weight(module), bias=module.bias)
        yield model
    finally:
        for module in large:
            del module.forward


def _is_large(module: nn.Module, path: str, moving: tuple[str, ...]) -> bool:
    if type(module) not in (EntryNormLinear, WeightNormLinear) or "forward" in vars(module):
        return False
    return module.weight.numel() > MANY and f"{path}.weight".lstrip(".") not in moving


def _product(x: Tensor, *, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)
