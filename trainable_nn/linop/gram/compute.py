"""The exact neural tangent kernel of a network at given samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .contract import contract, gram_of_rows
from .coupled import coupled_gram
from .features import Factors
from .network import Network, bytes_per_sample, exact_products, layer_of
from .rows import Sums
from .samples import Samples, read_samples
from .schedule import Run, batch_size, runs, workspace_of
from .sweep import Group, SamplesMeet, Sweep
from .watch import watched

WHERE = "ntk"
OUTPUTS = ("all", "sum", "trace")
SMALL = 16  # samples that are taken together without asking whether they fit, where no budget is given


@dataclass(frozen=True)
class KernelBlock:
    """Part of a kernel: its rows and columns, and for each layer ("" for all together) the values."""

    run: int
    rows: slice
    columns: slice
    values: dict[str, Tensor]


def ntk(
    model: nn.Module,
    inputs,
    *,
    outputs: str = "all",
    by_layer: bool = False,
    budget: int | None = None,
    out: Tensor | None = None,
    progress: bool = False,
) -> Tensor | dict[str, Tensor]:
    r"""K = J J^T, for J the Jacobian of the network's outputs at the samples in all parameters that require gradients.

    Exact: no sampling, no approximation by blocks. Every output takes one backward pass for all samples together, and
    each layer's part is computed where the pass meets it, by the cheapest of three formulas. A parameter that is used
    several times counts once, with its summed gradient; normalised and parametrised weights count by their free
    parameters. Where samples meet, as in batch normalisation in training mode, every row has a backward pass of its
    own, and all samples are one batch. The model is used as it is, in its mode and dtype, and nothing is left on it.
    Where torch.distributed is initialised, its processes share the rows, and each has the result.

    Shape:
        inputs: (N, ...) tensor; or a Dataset, an unshuffled DataLoader, or a list of batches, of which the first entry
        (the input, before the target) counts, and of which only a budget's worth is in memory. The model gives
        (N, ...), C numbers for each sample.
        outputs="all" -> (N C, N C) float64, row i C + c for output c of sample i; "sum" -> (N, N), the kernel of the
        sum of the outputs; "trace" -> (N, N), the sum over c of the kernels of each output.
        by_layer=True -> a dict from the path of a module to the part of its own parameters; the parts sum to K.
        out: where to put the result, float64, for one that is mapped from a file (``torch.from_file``).
    Cost:
        One forward and C backward passes (N C where samples meet), and at most N^2 C^2 / 2 products of rows. ``budget``
        bytes (4 GiB if None) beside model and result are kept by taking samples in parts, of which each pair then has
        passes of its own.
    Raises:
        TypeError, ValueError: no parameter requires gradients, they are neither float32 nor float64, dropout is active,
        the output is no tensor (N, ...), the budget doesn't hold two samples, or anything is NaN or infinite.
    Source:
        Paper A, Theorem 2.4, lambda(DF) = smallest eigenvalue of K; paper B, equation (3.1), whose G^(h) are the
        entries of ``by_layer=True``. Jacot, Gabriel and Hongler (2018), arXiv:1806.07572.
    """
    blocks = _Blocks(model, inputs, outputs, by_layer, budget)
    if out is not None and by_layer:
        raise ValueError(f"{WHERE}: out takes one matrix, and by_layer=True gives several. Leave one of them out.")
    result: dict[str, Tensor] = {} if out is None else {"": out}
    with watched(progress) as advance:
        for block in blocks.iterate(0, advance):
            _put(result, block, blocks)
    if blocks.ranks > 1:
        _add_up(result, blocks)
    if not by_layer:
        return result[""]
    layers = dict.fromkeys(map(layer_of, blocks.network.parameters))
    return {layer: result[layer] for layer in layers if layer in result}


def ntk_blocks(
    model: nn.Module, inputs, *, outputs: str = "all", budget: int | None = None, start: int = 0
) -> Iterator[KernelBlock]:
    """The kernel of ``ntk`` in blocks of its upper half, for one that is too large to hold.

    Blocks of one run of the network come together, in the same order each time; ``start=block.run + 1`` goes on after
    a run that was done. In several processes each has its own blocks.
    """
    yield from _Blocks(model, inputs, outputs, False, budget).iterate(start, lambda done, of: None)


class _Blocks:
    def __init__(self, model: nn.Module, inputs, outputs: str, by_layer: bool, budget: int | None) -> None:
        if outputs not in OUTPUTS:
            raise ValueError(f"{WHERE}: outputs must be one of {', '.join(OUTPUTS)}, got {outputs!r}.")
        if budget is not None and budget < 1:
            raise ValueError(f"{WHERE}: budget must be a number of bytes above 0, got {budget}.")
        self.network, self.outputs, self.by_layer, self.budget = Network(model), outputs, by_layer, budget
        self.samples: Samples = read_samples(inputs, self.network.device)
        self.classes, self.samples_meet = 0, False
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    @property
    def rows(self) -> int:
        return self.samples.count * self.classes

    def iterate(self, start: int, advance: Callable[[int, int], None]) -> Iterator[KernelBlock]:
        mine = runs(self.samples.count, self._batch_size(), self.ranks)[self.rank]
        with exact_products():
            for index in range(start, len(mine)):
                parts = [self.samples.take(which) for which in mine[index].samples]
                x = torch.cat(parts) if len(parts) > 1 else parts[0]
                try:
                    found = self._of_run(index, mine[index], x, lambda s, i=index: advance(i + s, len(mine)))
                except SamplesMeet:
                    yield self.whole()
                    return
                yield from found

    def _batch_size(self) -> int:
        if self.samples.count == 1 or (self.budget is None and self.samples.count <= SMALL):
            return self.samples.count
        few = self.samples.take(slice(0, min(2, self.samples.count)))
        size, classes = bytes_per_sample(self.network, few, 1 if self.outputs == "sum" else 0)
        layers = len({layer_of(name) for name in self.network.parameters}) if self.by_layer else 1
        return batch_size(self.budget, size, classes if self.outputs == "all" else 1, layers)

    def _of_run(self, index: int, run: Run, x: Tensor, advance: Callable[[float], None]) -> list[KernelBlock]:
        y, leaf = self.network.forward(x)
        gradients = _start(y, self.outputs)
        self.classes = len(gradients) if self.outputs == "all" else 1
        graph, root = self.network.graph(y, leaf), y.grad_fn
        del y
        sums = [Sums(block, self.classes, self.by_layer, x.device) for block in run.blocks]
        receive = _receiver(sums, self.outputs == "trace", workspace_of(self.budget), len(gradients))
        Sweep(graph, len(x), receive, advance).run(root, gradients)
        return [self._block(index, run, part) for part in sums]

    def _block(self, index: int, run: Run, part: Sums) -> KernelBlock:
        rows, columns = (run.whole(side) for side in (part.block.left, part.block.right))
        scaled = (slice(side.start * self.classes, side.stop * self.classes) for side in (rows, columns))
        layers = list(part.layers) if self.by_layer else [""]
        values = {layer: _finite(layer, part.result(layer)) for layer in layers}
        return KernelBlock(index, *scaled, values)

    def whole(self) -> KernelBlock:
        """All samples as the one batch that they must be, in every process."""
        x = self.samples.take(slice(0, self.samples.count))
        values = coupled_gram(self.network, x, self.outputs, self.by_layer, workspace_of(self.budget))
        size = len(next(iter(values.values())))
        self.classes, self.samples_meet = size // len(x), True
        return KernelBlock(0, slice(0, size), slice(0, size), {k: _finite(k, v) for k, v in values.items()})


def _put(result: dict[str, Tensor], block: KernelBlock, blocks: _Blocks) -> None:
    for layer, part in block.values.items():
        matrix = _matrix(result, layer, blocks)
        matrix[block.rows, block.columns] = part
        if block.rows != block.columns:
            matrix[block.columns, block.rows] = part.T


def _matrix(result: dict[str, Tensor], layer: str, blocks: _Blocks) -> Tensor:
    if layer not in result:
        options = {"dtype": torch.float64, "device": blocks.network.device}
        result[layer] = torch.zeros(blocks.rows, blocks.rows, **options)
    matrix = result[layer]
    if matrix.shape != (blocks.rows, blocks.rows) or matrix.dtype is not torch.float64:
        raise ValueError(
            f"{WHERE}: out must be float64 of shape {(blocks.rows, blocks.rows)}, got {matrix.dtype} of shape "
            f"{tuple(matrix.shape)}."
        )
    return matrix


def _add_up(result: dict[str, Tensor], blocks: _Blocks) -> None:
    """Each process has filled its own rows; one without any knows neither the layers, nor C, nor that samples meet."""
    known: list = [None] * blocks.ranks
    dist.all_gather_object(known, (list(result), blocks.classes, blocks.samples_meet))
    if any(meet for _, _, meet in known):  # then every process that saw it has the whole
        if not blocks.samples_meet:
            _put(result, blocks.whole(), blocks)
        return
    blocks.classes = max(classes for _, classes, _ in known)
    for layer in max((names for names, _, _ in known), key=len):
        dist.all_reduce(_matrix(result, layer, blocks))


def _finite(layer: str, matrix: Tensor) -> Tensor:
    if not bool(torch.isfinite(matrix).all()):
        part = f"the part of {layer}" if layer else "the kernel"
        raise ValueError(f"{WHERE}: {part} has entries that are NaN or infinite. Check for overflow, or use float64.")
    return matrix


def _start(y: Tensor, outputs: str) -> Tensor:
    """The gradients to start from: (C, *y.shape), a one for each output; (1, *y.shape) of ones for their sum."""
    if outputs == "sum":
        return torch.ones_like(y).detach().unsqueeze(0)
    count = y[0].numel()
    unit = torch.eye(count, dtype=y.dtype, device=y.device)
    return unit.unsqueeze(1).expand(count, len(y), count).reshape(count, *y.shape)


def _receiver(sums: list[Sums], trace: bool, workspace: int, outputs: int) -> Callable[[Group], None]:
    """What a group of parameters adds to the sums: by factors where it can, else by the rows of each parameter."""

    def receive(group: Group) -> None:
        for part in sums:
            features = group.uses[0].features
            if group.is_single and isinstance(features, Factors):
                contract(features, part.block, part.adder(layer_of(group.names[0])), trace, workspace)
                continue
            for layer in dict.fromkeys(map(layer_of, group.names)) if part.by_layer else [None]:
                _by_rows(group, layer, part, trace, workspace, outputs)

    return receive


def _by_rows(group: Group, layer: str | None, part: Sums, trace: bool, workspace: int, outputs: int) -> None:
    """Rows of one layer's parameters in the group, or of all of them."""
    leaves = {name: edge[0].variable for slot in group.slots for name, edge in slot.leaves.items()}
    size = sum(p.numel() * p.element_size() for p in leaves.values())

    def rows_of(samples: slice) -> list[Tensor]:
        count = samples.stop - samples.start
        found = group.weight_rows(samples).items()
        return [rows.reshape(count, outputs, -1) for name, rows in found if layer is None or layer_of(name) == layer]

    gram_of_rows(rows_of, part.block, part.adder(layer or ""), trace, size * outputs, workspace)
