"""The graph that autograd recorded of one forward pass: which operation each parameter enters, and in what order.

A *slot* is one input of an operation that only parameters reach: a parameter itself, or a function of parameters such
as a normalised weight. Everything else that an operation reads is data, and depends on the samples.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

Edge = tuple  # (node, which of its outputs)
DATA = ("EmbeddingBackward0", "EmbeddingBagBackward0")  # they read the samples by indices, which have no gradient


@dataclass
class Slot:
    """Input number ``index`` of ``node``: the edge behind it, and the parameters that reach it."""

    node: object
    index: int
    edge: Edge
    leaves: dict[str, Edge]

    @property
    def is_parameter(self) -> bool:
        """Whether the parameter itself stands here, perhaps transposed."""
        below = self.edge[0]
        if below.name() == "TBackward0":
            below = below.next_functions[0][0]
        return hasattr(below, "variable")


@dataclass
class Graph:
    """Operations that carry data, from the output to the inputs; each with its slots and its edges to other data.

    ``names`` are those of all operations, also of the ones that no parameter reaches.
    """

    order: list
    names: set[str]
    slots: dict[object, list[Slot]] = field(default_factory=dict)
    data: dict[object, list[tuple[int, Edge]]] = field(default_factory=dict)

    def drop(self, node) -> None:
        """Forget an operation that is done, and with it what autograd saved for it."""
        self.slots.pop(node, None)
        self.data.pop(node, None)


def output_shapes(node) -> list[torch.Size]:
    return [torch.Size(m.shape) for m in node._input_metadata]


def read_graph(root, inputs: set[int], names: Mapping[int, str]) -> Graph:
    """Walk from ``root``; ``inputs`` are ids of the tensors that hold samples, ``names`` of the wanted parameters."""
    order = _topological(root)
    data, below = {}, {}
    for node in reversed(order):
        children = [(m, nr) for m, nr in node.next_functions if m is not None]
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            name = names.get(id(leaf))
            below[node] = {name: (node, 0)} if name is not None else {}
            data[node] = id(leaf) in inputs
        else:
            below[node] = {name: edge for m, _ in children for name, edge in below[m].items()}
            data[node] = node.name() in DATA or any(data[m] for m, _ in children)
    data[root] = True
    graph = Graph([node for node in order if data[node] and below[node]], {node.name() for node in order})
    for node in graph.order:
        slots, rest = [], []
        for index, (m, nr) in enumerate(node.next_functions):
            if m is None or not below[m]:
                continue
            if data[m]:
                rest.append((index, (m, nr)))
            else:
                slots.append(Slot(node, index, (m, nr), below[m]))
        graph.slots[node], graph.data[node] = slots, rest
    return graph


def _topological(root) -> list:
    """Every operation after all that read it."""
    waiting, seen, stack = {root: 0}, {root}, [root]
    while stack:
        for m, _ in stack.pop().next_functions:
            if m is None:
                continue
            waiting[m] = waiting.get(m, 0) + 1
            if m not in seen:
                seen.add(m)
                stack.append(m)
    order, ready = [], [root]
    while ready:
        node = ready.pop()
        order.append(node)
        for m, _ in node.next_functions:
            if m is not None:
                waiting[m] -= 1
                if waiting[m] == 0:
                    ready.append(m)
    return order


def call(node, gradients: list[Tensor | None]) -> list[Tensor | None]:
    """What one operation alone gives for each of its inputs, without running any below it."""
    with torch.no_grad():
        if hasattr(node, "needs_input_grad"):
            found = _call_function(node, gradients)
        else:
            found = node(*gradients)
        found = found if isinstance(found, tuple) else (found,)
        return [_fitted(value, edge) for value, edge in zip(found, node.next_functions)]


def _call_function(node, gradients: list[Tensor | None]) -> tuple:
    """A custom Function: missing gradients are zeros, and its edges leave out what is no tensor."""
    shapes = zip(gradients, node._input_metadata)
    filled = [g if g is not None else torch.zeros(m.shape, dtype=m.dtype, device=m.device) for g, m in shapes]
    found = node.apply(*filled)
    found = found if isinstance(found, tuple) else (found,)
    wanted = iter([value for value, needed in zip(found, node.needs_input_grad) if needed])
    return tuple(None if m is None else next(wanted) for m, _ in node.next_functions)


def _fitted(value: Tensor | None, edge: Edge) -> Tensor | None:
    """Summed to the shape of what it is the gradient of, as autograd's engine does between two operations."""
    if value is None or edge[0] is None:
        return value
    shape = output_shapes(edge[0])[edge[1]]
    return value if value.shape == shape else value.sum_to_size(shape)


def pull_to_parameters(edge: Edge, leaves: Mapping[str, Edge], rows: Tensor) -> dict[str, Tensor]:
    """DP^T applied to each row: from gradients (rows, *shape) at an edge to gradients (rows, *shape) of parameters."""
    targets = {name: leaf for name, leaf in leaves.items()}
    if len(targets) == 1 and next(iter(targets.values()))[0] is edge[0]:
        return {next(iter(targets)): rows}

    def pulled(gradient: Tensor, batched: bool):
        return torch.autograd.grad(
            [GradientEdge(*edge)],
            [GradientEdge(*leaf) for leaf in targets.values()],
            [gradient],
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )

    found = _batched_or_one_by_one(pulled, rows)
    return {name: value for name, value in zip(targets, found) if value is not None}


def _batched_or_one_by_one(pulled: Callable, rows: Tensor):
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")  # vmap by a loop, which is the fallback here
            return pulled(rows, True)
    except RuntimeError:  # a custom Function without a vmap rule
        each = [pulled(row, False) for row in rows]
        return [None if parts[0] is None else torch.stack(parts) for parts in zip(*each)]
