"""The exact neural tangent kernel of a network at given samples."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .contract import contract, gram_of_rows
from .coupled import coupled_gram
from .network import Network, exact_products, layer_of
from .rows import Block, Sums
from .samples import Samples, read_samples
from .sweep import Group, SamplesMeet, Sweep

WHERE = "ntk"
OUTPUTS = ("all", "sum", "trace")
WORKSPACE = 2**28  # bytes for rows and products, where no budget is given
LEAST_WORKSPACE = 2**24


def ntk(
    model: nn.Module,
    inputs,
    *,
    outputs: str = "all",
    by_layer: bool = False,
    budget: int | None = None,
    progress: bool = False,
) -> Tensor | dict[str, Tensor]:
    r"""K = J J^T, for J the Jacobian of the network's outputs at the samples in all parameters that require gradients.

    Exact: no sampling, no approximation by blocks. Every output takes one backward pass for all samples together, and
    each layer's part is computed where the pass meets it, by the cheapest of three formulas. A parameter that is used
    several times counts once, with its summed gradient; normalised and parametrised weights count by their free
    parameters. Where samples meet, as in batch normalisation in training mode, every row has a backward pass of its
    own. The model is used as it is, in its mode and dtype, and nothing is left on it.

    Shape:
        inputs: (N, ...) tensor; or a Dataset, an unshuffled DataLoader, or a list of batches, of which the first entry
        (the input, before the target) counts. The model gives (N, ...), C numbers for each sample.
        outputs="all" -> (N C, N C) float64, row i C + c for output c of sample i; "sum" -> (N, N), the kernel of the
        sum of the outputs; "trace" -> (N, N), the sum over c of the kernels of each output.
        by_layer=True -> a dict from the path of a module to the part of its own parameters; the parts sum to K.
    Cost:
        One forward and C backward passes (N C where samples meet), and at most N^2 C^2 / 2 products of rows. ``budget``
        bytes, beside model and result, are kept by taking samples in blocks, whose pairs repeat the passes.
    Raises:
        TypeError, ValueError: no parameter requires gradients, they are neither float32 nor float64, dropout is active,
        the output is no tensor (N, ...), or anything is NaN or infinite.
    Source:
        Paper A, Theorem 2.4, lambda(DF) = smallest eigenvalue of K; paper B, equation (3.1), whose G^(h) are the
        entries of ``by_layer=True``. Jacot, Gabriel and Hongler (2018), arXiv:1806.07572.
    """
    if outputs not in OUTPUTS:
        raise ValueError(f"{WHERE}: outputs must be one of {', '.join(OUTPUTS)}, got {outputs!r}.")
    network = Network(model)
    samples = read_samples(inputs, network.device)
    result: dict[str, Tensor] = {}
    blocks = _Blocks(network, samples, outputs, by_layer, budget)
    for left, right, parts in blocks:
        for layer, part in parts.items():
            if layer not in result:
                result[layer] = torch.zeros(blocks.rows, blocks.rows, dtype=torch.float64, device=network.device)
            result[layer][left, right] = part
            if left != right:
                result[layer][right, left] = part.T
    for layer, matrix in result.items():
        if not bool(torch.isfinite(matrix).all()):
            raise ValueError(f"{WHERE}: the kernel {layer} has entries that are NaN or infinite. Scale the weights down.")
    return result if by_layer else result[""]


class _Blocks:
    """Iterates over (rows, columns, parts by layer) that make up the upper half of K."""

    def __init__(self, network: Network, samples: Samples, outputs: str, by_layer: bool, budget: int | None) -> None:
        self.network, self.samples, self.outputs, self.by_layer, self.budget = network, samples, outputs, by_layer, budget
        self.rows = 0

    def __iter__(self) -> Iterator[tuple[slice, slice, dict[str, Tensor]]]:
        with exact_products():
            whole = slice(0, self.samples.count)
            yield from self._pair(whole, None)

    def _pair(self, left: slice, right: slice | None) -> Iterator[tuple[slice, slice, dict[str, Tensor]]]:
        x = self.samples.take(left)
        y, leaf = self.network.forward(x)
        n = len(x)
        outputs = _start(y, self.outputs)
        classes = 1 if self.outputs != "all" else len(outputs)
        self.rows = self.samples.count * classes
        blocks = [Block(slice(0, n), slice(0, n))]
        graph, root = self.network.graph(y, leaf), y.grad_fn
        del y
        sums = [Sums(block, classes, self.by_layer, x.device) for block in blocks]
        receive = _receiver(sums, self.outputs == "trace", WORKSPACE, len(outputs))
        try:
            Sweep(graph, n, receive).run(root, outputs)
        except SamplesMeet:
            yield slice(0, self.rows), slice(0, self.rows), coupled_gram(self.network, x, self.outputs, self.by_layer)
            return
        for part in sums:
            layers = dict.fromkeys(part.layers) if self.by_layer else {"": None}
            rows, columns = (slice(s.start * classes, s.stop * classes) for s in (part.block.left, part.block.right))
            yield rows, columns, {layer: part.result(layer) for layer in layers}


def _start(y: Tensor, outputs: str) -> Tensor:
    """The gradients to start from: (C, *y.shape), a one for each output; (1, *y.shape) of ones for their sum."""
    if outputs == "sum":
        return torch.ones_like(y).detach().unsqueeze(0)
    count = y[0].numel()
    unit = torch.eye(count, dtype=y.dtype, device=y.device)
    return unit.unsqueeze(1).expand(count, len(y), count).reshape(count, *y.shape)


def _receiver(sums: list[Sums], trace: bool, workspace: int, outputs: int):
    """What a group of parameters does to the sums: by factors where it can, else by the rows of each parameter."""

    def receive(group: Group) -> None:
        for part in sums:
            use = group.uses[0]
            if group.is_single and hasattr(use.features, "a"):
                contract(use.features, part.block, part.adder(layer_of(group.names[0])), trace, workspace)
                continue
            for name in group.names if part.by_layer else [None]:
                _by_rows(group, name, part, trace, workspace, outputs)

    return receive


def _by_rows(group: Group, name: str | None, part: Sums, trace: bool, workspace: int, outputs: int) -> None:
    """Rows of one parameter of the group, or of all of them."""
    size = sum(leaf.variable.numel() * leaf.variable.element_size() for leaf in _leaves(group).values())

    def rows_of(samples: slice) -> list[Tensor]:
        count = samples.stop - samples.start
        found = group.weight_rows(samples)
        return [rows.reshape(count, outputs, -1) for key, rows in found.items() if name is None or key == name]

    add = part.adder("" if name is None else layer_of(name))
    gram_of_rows(rows_of, part.block, add, trace, size * outputs, workspace)


def _leaves(group: Group) -> dict:
    return {name: edge[0] for slot in group.slots for name, edge in slot.leaves.items()}
