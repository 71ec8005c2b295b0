"""The kernel of a network whose samples meet: one backward pass for every row of the Jacobian."""

from __future__ import annotations

import torch
from torch import Tensor

from .network import Network, layer_of


def coupled_gram(network: Network, x: Tensor, outputs: str, by_layer: bool) -> dict[str, Tensor]:
    y = network.forward(x)[0]
    count, classes = len(x), y[0].numel()
    names, parameters = list(network.parameters), list(network.parameters.values())
    rows = []
    units = _units(y, outputs)
    for unit in units:
        found = torch.autograd.grad(y, parameters, unit, retain_graph=True, allow_unused=True)
        rows.append(found)
    result: dict[str, Tensor] = {}
    for i, name in enumerate(names):
        each = [row[i] for row in rows]
        if all(r is None for r in each):
            continue
        matrix = torch.stack([torch.zeros_like(parameters[i]) if r is None else r for r in each]).flatten(1).double()
        gram = matrix @ matrix.T
        if outputs == "trace":
            gram = gram.reshape(count, classes, count, classes).diagonal(dim1=1, dim2=3).sum(-1)
        layer = layer_of(name) if by_layer else ""
        result[layer] = result[layer] + gram if layer in result else gram
    return result


def _units(y: Tensor, outputs: str):
    flat = torch.zeros(y.numel(), dtype=y.dtype, device=y.device)
    count, classes = len(y), y[0].numel()
    for i in range(count if outputs == "sum" else count * classes):
        unit = flat.clone()
        if outputs == "sum":
            unit.reshape(count, classes)[i] = 1
        else:
            unit[i] = 1
        yield unit.reshape(y.shape)
