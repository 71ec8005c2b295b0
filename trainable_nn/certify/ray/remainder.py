r"""How remainders travel through the network: by the actual Jacobians at the centre of the ray, beside absolute values.

Every step splits its remainder in A rho, with A its Jacobian at the centre and rho the remainder of its input, and what
it adds, of which only a bound e is known, entry by entry. Unrolled, rho at a step is the sum over earlier steps s of
J_s e_s with J_s the product of the Jacobians from s to here, sample by sample, so

    \|rho\| <= sum_s \|J_s\| e_s,

where the signs of skips and branches cancel within J_s; the product of the \|A\| in its place grows with the depth. The
smaller of the two is taken. What is added before entrywise maps and sums goes through them without loss, so it
becomes a term of the sum only where a step mixes entries or is read twice ("a source"). J_s does not depend on the
ray's length.

Rounding: A is the matrix of the floats that are used, and how far it is from the exact Jacobian is ``rounding``'s. A computed J_s
is off by at most gamma_k of the product of the \|A\|, k the roundings on the way, so twice that of what this product carries from the
same sources is added. Bounds are sums and products of numbers that are not negative, so each step's err relatively, by less than ``UP``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..kernel_error.states import UP, U, gamma
from ..regularity.affine import Affine
from ..regularity.elementwise import Elementwise
from ..regularity.graph import Node
from ..regularity.steps import FixedLinear, Input, Sum
from .linear import absolute, keeps_samples

MOST_NUMBERS = 2**23  # of float64 in all Jacobians; a larger network has absolute values alone
MOST_PRODUCTS = 2**27  # of two numbers, on the way to them


class Jacobians:
    r"""\|J_s\| from all sources to each step whose input's size matters: those before an activation, and the output.

    Shape:
        kept[i]: (entries of all sources so far, samples, entries of step i), of one sample each.
    Cost:
        A forward pass of as many tangents as the sources have entries, once.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = nodes
        self.sources = [_is_source(nodes, i) for i in range(len(nodes))]
        self.margin = 2.0 * gamma(sum(_roundings(node) for node in nodes))
        numbers, self.products = _size(nodes, self.sources)
        if not 0 < numbers <= MOST_NUMBERS or self.products > MOST_PRODUCTS or not _keep_samples(nodes):
            self.sources = []

    @cached_property
    def kept(self) -> dict[int, Tensor]:
        with torch.no_grad():
            return self._pushed_through() if self.sources else {}

    def _pushed_through(self) -> dict[int, Tensor]:
        """J_s at each step, the sources in a row; what no later step reads is dropped."""
        nodes, tangents, kept = self.nodes, {}, {}
        last = {j: i for i, node in enumerate(nodes) for j in node.inputs}
        for i, node in enumerate(nodes):
            here = self._pushed(node, tangents)
            for j in set(node.inputs):
                if last[j] == i:
                    del tangents[j]
            if _is_read(nodes, i) and len(here):
                kept[i] = here.abs().flatten(2)
            if self.sources[i]:
                later = here.new_zeros(self._before(i) - len(here), *node.value.shape)
                here = torch.cat([here, later, _units(node.value)])
            tangents[i] = here
        return kept

    def _pushed(self, node: Node, tangents: dict[int, Tensor]) -> Tensor:
        total = node.value.new_zeros(0, *node.value.shape)
        for position, j in enumerate(node.inputs):
            if len(tangents[j]):
                one = isinstance(node.step, Sum) and node.step.scales[position] == 1.0
                pushed = tangents[j] if one else node.step.push(tangents[j], self.nodes[j].value, position)
                total = _sum(total, pushed)
        return total

    def _before(self, i: int) -> int:
        """The entries of all sources before step i."""
        return sum(n.value[0].numel() for n, is_source in zip(self.nodes[:i], self.sources) if is_source)


class Remainders:
    """The bounds along one ray, step after step.

    For each step: its bound, what the absolute values carry to it from all sources, and what is no source yet.
    """

    def __init__(self, jacobians: Jacobians, sharp: bool = True) -> None:
        """sharp: whether the Jacobians are used, where there are any."""
        self.jacobians, self.sharp = jacobians, sharp and bool(jacobians.sources)
        self.bounds: list[Tensor] = []
        self._carried: list[Tensor] = []
        self._own: list[Tensor] = []
        self._added: list[Tensor] = []  # e_s, (entries, samples)

    def add(self, node: Node, added: Tensor) -> Tensor:
        """The bound of the next step's remainder, which adds at most ``added``."""
        index = len(self.bounds)
        added = added * UP
        bound = (added + self._through(node, self.bounds)) * UP
        if self.sharp:
            carried = (added + self._through(node, self._carried)) * UP
            own = added
            if isinstance(node.step, Sum | Elementwise):
                own = (own + self._through(node, self._own)) * UP
            bound = self._sharper(index, bound, carried, own)
            if self.jacobians.sources[index]:
                self._added.append(own.flatten(1).T)
                own = torch.zeros_like(own)
            self._carried.append(carried)
            self._own.append(own)
        self.bounds.append(bound)
        return bound

    def _through(self, node: Node, bounds: list[Tensor]) -> Tensor | float:
        r"""\|A\| applied to bounds of the inputs."""
        nodes = self.jacobians.nodes
        return sum(absolute(node.step, bounds[j], k, nodes[j].value) for k, j in enumerate(node.inputs))

    def _sharper(self, index: int, bound: Tensor, carried: Tensor, own: Tensor) -> Tensor:
        kept = self.jacobians.kept.get(index)
        if kept is None:
            return bound
        sources = torch.cat(self._added)[: len(kept)]
        summed = torch.bmm(sources.T.unsqueeze(1), kept.transpose(0, 1)).reshape(bound.shape)
        return torch.fmin(bound, (summed + own + self.jacobians.margin * carried) * UP)


def _sum(a: Tensor, b: Tensor) -> Tensor:
    """Of tangents for the first sources and for more of them."""
    if len(a) > len(b):
        a, b = b, a
    if len(a) == 0:
        return b
    return b + a if len(a) == len(b) else torch.cat([b[: len(a)] + a, b[len(a) :]])


def _roundings(node: Node) -> float:
    """Of one entry of a Jacobian at this step: its inner product's, by what the step states of its sums, and a sum of two paths."""
    step = node.step
    if isinstance(step, Affine):
        return step.free.shape[1] + 8.0
    return (2.0 * step.rounding / (U * step.norm) if isinstance(step, FixedLinear) and step.norm > 0 else 0.0) + 8.0


def _units(value: Tensor) -> Tensor:
    """The unit vectors of one sample, the same for all."""
    entries = value[0].numel()
    return torch.eye(entries, dtype=value.dtype)[:, None].expand(-1, len(value), -1).reshape(entries, *value.shape)


def _is_source(nodes: Sequence[Node], index: int) -> bool:
    readers = [node.step for node in nodes for j in node.inputs if j == index]
    step = nodes[index].step
    adds = not isinstance(step, Input | FixedLinear) and not (isinstance(step, Affine) and not step.parameters)
    return adds and (len(readers) > 1 or any(not isinstance(reader, Sum | Elementwise) for reader in readers))


def _is_read(nodes: Sequence[Node], index: int) -> bool:
    """Whether the size of this step's remainder enters beside its linear image."""
    return index == len(nodes) - 1 or any(isinstance(n.step, Elementwise) and index in n.inputs for n in nodes)


def _size(nodes: Sequence[Node], sources: Sequence[bool]) -> tuple[int, int]:
    """Numbers in all Jacobians, and products of two numbers on the way to them."""
    entries, numbers, products = 0, 0, 0
    for node, is_source in zip(nodes, sources):
        value = node.value
        numbers += entries * value.numel()
        products += entries * value.numel() * (node.step.free.shape[1] if isinstance(node.step, Affine) else 1)
        entries += value.numel() // max(len(value), 1) if is_source and value.dim() > 0 else 0
    return numbers, products


def _keep_samples(nodes: Sequence[Node]) -> bool:
    samples = len(nodes[0].value)
    if any(n.step.mixes_samples or n.value.dim() == 0 or len(n.value) != samples for n in nodes):
        return False
    return all(keeps_samples(n.step, nodes[n.inputs[0]].value) for n in nodes if isinstance(n.step, FixedLinear))
