r"""The network along one ray in its parameters: theta + u d for u in [0, 1], as a Taylor model of its outputs.

A step of gradient descent moves on such a ray, so what the loss does on it is all that a step size depends on. Entry
by entry and with coefficients as they are up to u^2 this is far sharper than a Lipschitz constant of DF on a ball. What each
step adds to the remainder is bounded here; how it goes on from there is ``remainder``'s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn

from ...errors import UnboundedError
from ..kernel_error.states import U
from ..regularity.affine import Affine
from ..regularity.elementwise import Elementwise
from ..regularity.graph import Node
from ..regularity.network import graph_of
from ..regularity.rules import RULES
from ..regularity.steps import FixedLinear, Input, Step, Sum
from .followed import Followed
from .jerks import largest_jerk
from .linear import apply_weight
from .remainder import Jacobians, Remainders
from .rounding import outputs_rounding
from .seconds import second_of
from .taylor import Taylor, composed, composed_to_second, constant, product
from .weight_rounding import norm
from .weights import order_of, weight_along


class Ray:
    """The steps of a model at some inputs, ready to be followed along rays from its present parameters.

    Raises:
        UnboundedError: a step has no Taylor rule; the message names it.
    """

    def __init__(self, model: nn.Module, inputs: Tensor, known: dict | None = None) -> None:
        """known: norms of the present weights, from one reading to the next."""
        self.model = model
        first: dict[int, str] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            first.setdefault(id(p), name)
        self.first = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
        self.nodes = graph_of(model, inputs, RULES, known).nodes
        self.order = min(_order(node.step) for node in self.nodes)

    def along(self, direction: Mapping[str, Tensor]) -> Taylor:
        """The outputs at theta + u d, u in [0, 1].

        Shape:
            direction: a tensor for each parameter that moves, by its name in ``named_parameters``.
        Cost:
            About a dozen forward passes, and before the first ray the ``Jacobians`` of a network that is not too large.
        """
        return self.followed(direction).models[-1]

    def followed(self, direction: Mapping[str, Tensor], sharp: bool = True) -> Followed:
        """All steps' models along this ray; sharp: whether the ``Jacobians`` carry remainders, which takes finding them once."""
        with torch.no_grad():
            found = Followed(direction)
            remainders = Remainders(self.jacobians, sharp)
            for index, node in enumerate(self.nodes):
                inputs = [found.models[i] for i in node.inputs]
                model = self._step(index, node, inputs, found)
                found.models.append(replace(model, c0=node.value, r=remainders.add(node, model.r)))
            return found

    def rounding(self, found: Followed) -> float:
        """At least how far the exact outputs are from what their model holds, in the Euclidean norm; see ``rounding``.

        Raises:
            UnboundedError: a step has no rule, by its path.
        """
        with torch.no_grad():
            return outputs_rounding(self.nodes, found)

    @cached_property
    def largest(self) -> float:
        """The largest norm of a step's value."""
        return max(norm(node.value) for node in self.nodes)

    @cached_property
    def jacobians(self) -> Jacobians:
        return Jacobians(self.nodes)

    def _step(self, index: int, node: Node, inputs: list[Taylor], found: Followed) -> Taylor:
        """The model, with r what the step adds to the linear image of its inputs' remainders."""
        step, value = node.step, node.value
        if isinstance(step, Input):
            return constant(value)
        if isinstance(step, Sum):
            terms = [x if s == 1.0 else x.scaled(s) for s, x in zip(step.scales, inputs)]
            total = terms[0] if len(terms) == 1 else terms[0].plus(terms[1])
            return replace(total, r=torch.zeros_like(value))
        if isinstance(step, Elementwise):
            return self._elementwise(step, value, self.nodes[node.inputs[0]].value, inputs[0])
        if isinstance(step, Affine):
            return self._affine(index, step, inputs[0], found)
        return inputs[0].image(step.function)

    def _elementwise(self, step: Elementwise, value: Tensor, centre: Tensor, x: Taylor) -> Taylor:
        """centre: x.c0, the very tensor, so that the derivatives are found once."""
        (first, second), formula = step._derivatives(centre), second_of(step)
        if formula is not None:
            second = formula.formula(centre)
        if self.order == 3:
            return composed(x, value, first, second, largest_jerk(step, centre, x.reach), step.phi.slope)
        near = torch.full_like(second, math.inf)
        if step.phi.jerk < math.inf:
            near = second.abs() + (formula.units * U if formula else 0.0) + step.phi.jerk * x.reach
        return composed_to_second(x, value, first, near.clamp_max(step.phi.curvature), step.phi.slope)

    def _affine(self, index: int, step: Affine, x: Taylor, found: Followed) -> Taylor:
        free = torch.from_numpy(step.free)
        moved = self._moved(step, "weight", step.trains_weight, found.direction, free)
        if moved is None:
            y = x.image(step.linear)
        else:
            weight = weight_along(step, self.model.get_submodule(step.path), free, moved, self.order)
            found.weights[index] = (weight, free, moved)
            y = product(weight, x, lambda w, t: apply_weight(step, w.reshape(step.weight.shape), t), self.order)
        if step.bias is None:
            return y
        shift = self._moved(step, "bias", step.trains_bias, found.direction, step.bias)
        if shift is not None:
            found.shifts[index] = shift
        shape = (-1, *(1,) * (step.weight.dim() - 2)) if not step.is_dense else (-1,)
        c1 = y.c1 if shift is None else y.c1 + shift.reshape(shape)
        return Taylor(y.c0 + step.bias.reshape(shape), c1, y.c2, y.r)

    def _moved(
        self, step: Affine, which: str, trains: bool, direction: Mapping[str, Tensor], like: Tensor
    ) -> Tensor | None:
        name = f"{step.path}.{which}".lstrip(".")
        d = direction.get(self.first[name]) if trains else None
        return None if d is None else d.detach().to("cpu", torch.float64).reshape(like.shape)


def _order(step: Step) -> int:
    """3, or 2 where a third derivative has no bound.

    Raises:
        UnboundedError: the step has no rule.
    """
    if isinstance(step, Input | Sum | FixedLinear):
        return 3
    if isinstance(step, Elementwise) and step.phi.curvature < math.inf:
        return 3 if step.phi.jerk < math.inf else 2
    if isinstance(step, Affine) and order_of(step.options):
        return order_of(step.options)
    raise UnboundedError(f"{step.path}: {step.kind} has no Taylor rule; smooth activations and affine layers have.")
