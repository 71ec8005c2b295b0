"""Which modules of a network are its residual blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import nn

from ..convert import Plan, plan
from ..errors import ConversionError
from ..modules import ContractiveResidual, SpectrallyBoundedResidual

T = TypeVar("T")


def blocks_of(model: nn.Module, applied: Plan | None) -> list[str]:
    """Paths of the blocks that a plan names, or of those that the network has, in its order."""
    if applied is not None:
        return [step.path for step in applied.steps if step.path]
    ours = [
        path for path, module in model.named_modules() if isinstance(module, ContractiveResidual | SpectrallyBoundedResidual)
    ]
    if ours:
        return [path for path in ours if path]
    try:
        return [step.path for step in plan(model).steps if step.path]
    except ConversionError:
        return []


def evenly(values: Sequence[T], most: int) -> list[T]:
    """At most so many of the values, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(index * (len(values) - 1) / (most - 1))] for index in range(most)]
