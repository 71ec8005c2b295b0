"""The kernel of a network whose samples meet: one backward pass for every row of the Jacobian."""

from __future__ import annotations

import torch
from torch import Tensor

from .network import Network, layer_of


def coupled_gram(network: Network, x: Tensor, outputs: str, by_layer: bool, workspace: int) -> dict[str, Tensor]:
    """As ``ntk``, of all samples as one batch; for each layer, or for "".

    Cost:
        N C backward passes (N for "sum"), and again for each pair of parts if a workspace doesn't hold all rows.
    """
    y = network.forward(x)[0]
    count, outputs_each = len(y), y[0].numel()
    rows = count if outputs == "sum" else count * outputs_each
    size = sum(p.numel() * p.element_size() for p in network.parameters.values())
    part = max(1, int(workspace / (2 * size)))
    layers = dict.fromkeys(map(layer_of, network.parameters)) if by_layer else [""]
    result = {layer: torch.zeros(rows, rows, dtype=torch.float64, device=x.device) for layer in layers}
    for i in range(0, rows, part):
        first = _rows(network, y, outputs, slice(i, min(i + part, rows)))
        for j in range(i, rows, part):
            second = first if i == j else _rows(network, y, outputs, slice(j, min(j + part, rows)))
            for name, a in first.items():
                block = a.double() @ second[name].double().T
                result[layer_of(name) if by_layer else ""][i : i + part, j : j + part] += block
    for layer, matrix in result.items():
        matrix = matrix.triu() + matrix.triu(1).T
        if outputs == "trace":
            matrix = matrix.reshape(count, outputs_each, count, outputs_each).diagonal(dim1=1, dim2=3).sum(-1)
        result[layer] = matrix
    return result


def _rows(network: Network, y: Tensor, outputs: str, which: slice) -> dict[str, Tensor]:
    """Rows of the Jacobian, for each parameter (rows, numel)."""
    parameters = list(network.parameters.values())
    each = []
    for row in range(which.start, which.stop):
        unit = torch.zeros(y.numel(), dtype=y.dtype, device=y.device)
        width = y[0].numel() if outputs == "sum" else 1
        unit[row * width : (row + 1) * width] = 1
        each.append(torch.autograd.grad(y, parameters, unit.reshape(y.shape), retain_graph=True, allow_unused=True))
    found = {}
    for index, (name, p) in enumerate(network.parameters.items()):
        values = [torch.zeros_like(p) if row[index] is None else row[index] for row in each]
        found[name] = torch.stack(values).flatten(1)
    return found
