"""One backward pass of all outputs together, operation by operation: at each parameter, its rows go to a receiver.

Only the gradients at the current cut through the network are kept, for every output, and an operation is forgotten as
soon as it is done. So no more than one layer's rows are ever there.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .features import Features, Rows
from .graph import Graph, Slot, call, output_shapes, pull_to_parameters
from .layout import Layout
from .rules import DATA_RULES, RULES
from .sampling import find_layout, keeps_samples_apart, probe_factors


class SamplesMeet(Exception):
    """The samples of the batch are not independent, so one pass cannot serve them all."""


@dataclass
class Use:
    """One place where parameters enter: the features of what stands there, and how these parameters make it up."""

    slot: Slot
    features: Features


class Sweep:
    """``receive(parameters, uses)`` is called once for each set of parameters that is used together."""

    def __init__(self, graph: Graph, count: int, receive: Callable, advance: Callable[[float], None] = lambda share: None) -> None:
        self.graph, self.count, self.receive, self.advance = graph, count, receive, advance
        self.groups = _groups_of(graph)
        self.waiting = {id(group): len(group.slots) for group in self.groups.values()}

    @torch.no_grad()
    def run(self, root, outputs: Tensor) -> None:
        """``outputs`` (K, *shape) are the gradients to start from, one for each output of the network."""
        self.probe = None
        if not keeps_samples_apart(self.graph, self.count):
            self.probe = probe_factors(self.count, outputs)
            scaled = Layout(self.count).scaled(outputs.sum(0), self.probe)
            outputs = torch.cat((outputs, scaled.unsqueeze(0)))
        pending: dict = {root: {0: [g.clone() for g in outputs]}}
        del outputs
        self.graph.order.reverse()
        total = len(self.graph.order)
        while self.graph.order:
            node = self.graph.order.pop()
            found = pending.pop(node, None)
            if found is not None:
                self._visit(node, found, pending)
            self.graph.drop(node)
            self.advance(1 - len(self.graph.order) / total)

    def _visit(self, node, gradients: dict[int, list[Tensor]], pending: dict) -> None:
        slots, data = self.graph.slots[node], self.graph.data[node]
        if slots:
            self._use_all(slots, gradients)
        for index, values in self._pulled(node, gradients, data).items():
            m, nr = node.next_functions[index]
            known = pending.setdefault(m, {})
            if nr not in known:
                known[nr] = values
                continue
            for k, value in enumerate(values):  # one by one: the cut is most of the memory
                if value is not None:
                    known[nr][k] = value if known[nr][k] is None else known[nr][k] + value
                    values[k] = None

    def _pulled(self, node, gradients, data) -> dict[int, list[Tensor]]:
        """For each edge to data, the gradients of all outputs; those that they come from are dropped on the way."""
        if not data:
            return {}
        indices = [index for index, _ in data]
        rule = DATA_RULES.get(node.name())
        if rule is not None and (indices != [rule[0]] or getattr(node, "_saved_training", False)):
            rule = None
        found: dict[int, list[Tensor]] = {index: [] for index in indices}
        count = len(output_shapes(node))
        for k in range(len(next(iter(gradients.values())))):
            one = [gradients[nr][k] if nr in gradients else None for nr in range(count)]
            for values in gradients.values():
                values[k] = None
            if rule is not None:
                found[indices[0]].append(rule[1](node, one[0]))
                continue
            values = call(node, one)
            for index in indices:
                found[index].append(values[index])
        return {index: values for index, values in found.items() if any(v is not None for v in values)}

    def _layouts(self, gradients) -> tuple[dict[int, Layout], dict[int, list[Tensor]]]:
        """Where the samples are in each output of the operation, and the gradients without the probe."""
        if self.probe is None:
            return {nr: Layout(self.count) for nr in gradients}, gradients
        layouts, kept = {}, {}
        for nr, values in gradients.items():
            kept[nr] = values[:-1]
            layout = find_layout(sum(values[1:-1], values[0]), values[-1], self.probe)
            if layout is None:
                raise SamplesMeet
            layouts[nr] = layout
        return layouts, kept

    def _use_all(self, slots: list[Slot], gradients) -> None:
        layouts, kept = self._layouts(gradients)
        for slot in slots:
            self._use(slot, kept, layouts)

    def _use(self, slot: Slot, gradients, layouts) -> None:
        rule = RULES.get(slot.node.name())
        features = None
        if rule is not None and set(gradients) == {0} and layouts[0].axis == 0:
            features = rule(slot, gradients[0], layouts[0])
        if features is None:
            features = self._by_single_samples(slot, gradients, layouts)
        group = self.groups[next(iter(slot.leaves))]
        group.uses.append(Use(slot, features))
        self.waiting[id(group)] -= 1
        if self.waiting[id(group)] == 0:
            self.receive(group)
            group.uses.clear()

    def _by_single_samples(self, slot: Slot, gradients, layouts) -> Rows:
        """The operation's own backward pass on the gradient of each sample and output alone."""
        count = len(output_shapes(slot.node))
        rows = []
        for sample in range(self.count):
            for k in range(len(next(iter(gradients.values())))):
                one = [layouts[nr].only(gradients[nr][k], sample) if nr in gradients else None for nr in range(count)]
                value = call(slot.node, one)[slot.index]
                if value is None:
                    metadata = slot.edge[0]._input_metadata[slot.edge[1]]
                    value = torch.zeros(metadata.shape, dtype=metadata.dtype, device=metadata.device)
                rows.append(value)
        values = torch.stack(rows)
        return Rows(values.reshape(self.count, -1, *values.shape[1:]))


class Group:
    """Parameters that enter the network together, and the slots where they do."""

    def __init__(self, slots: list[Slot]) -> None:
        self.slots, self.uses = slots, []
        self.names = list(dict.fromkeys(name for slot in slots for name in slot.leaves))

    @property
    def is_single(self) -> bool:
        """Whether one parameter stands in one place as it is, so that its rows need not be added up."""
        return len(self.slots) == 1 and len(self.names) == 1 and self.slots[0].is_parameter

    def weight_rows(self, samples: slice) -> dict[str, Tensor]:
        """(samples * K, *shape) for each parameter, summed over its uses."""
        total: dict[str, Tensor] = {}
        for use in self.uses:
            rows = use.features.weight_rows(samples)
            for name, value in pull_to_parameters(use.slot.edge, use.slot.leaves, rows).items():
                total[name] = total[name] + value if name in total else value
        return total


def _groups_of(graph: Graph) -> dict[str, Group]:
    """For each parameter its group: those that share a slot are together."""
    members: list[tuple[set[str], list[Slot]]] = []
    for slots in graph.slots.values():
        for slot in slots:
            names, joined, rest = set(slot.leaves), [slot], []
            for others, theirs in members:
                if others & names:
                    names |= others
                    joined = theirs + joined
                else:
                    rest.append((others, theirs))
            members = [*rest, (names, joined)]
    return {name: group for names, slots in members for group in [Group(slots)] for name in names}
