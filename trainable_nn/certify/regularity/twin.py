"""A layer's twin in float64: the same layer, its numbers widened, the original left alone."""

import copy

import torch
from torch import Tensor, nn


def doubled(module: nn.Module, *, without: str | None = None) -> nn.Module:
    """The same layer with its parameters and buffers in float64 on the CPU, one of them left out on demand."""
    twin = copy.copy(module)
    for kind in ("_parameters", "_buffers"):
        held = {
            name: value.detach().to("cpu", torch.float64) if value is not None and value.is_floating_point() else value
            for name, value in getattr(module, kind).items()
            if name != without
        }
        twin.__dict__[kind] = held
    return twin


def matrix_of(weight: Tensor) -> Tensor:
    """(rows, columns)."""
    return weight.detach().flatten(1)
