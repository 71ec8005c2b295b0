"""Through the network and back: the error of each value, of each gradient, and of the rows of each parameter."""

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from ...errors import UnboundedError
from ..regularity.affine import Affine
from ..regularity.elementwise import Elementwise
from ..regularity.following import FollowingScale
from ..regularity.graph import Graph
from ..regularity.normalisation import BatchNormalisation, FixedNormalisation
from ..regularity.sample_norms import SampleNormalisation
from ..regularity.steps import FixedLinear, Kinked, Sum
from .affine import AffineRounding
from .following import FollowingRounding
from .normalisation import FixedNormalisationRounding
from .pooling import MaxPoolRounding
from .rules import ElementwiseRounding, FixedLinearRounding, KinkedRounding, Rounding, SumRounding, rule_of
from .states import LOST, UP, Gradients, Part, U, Value
from .statistics import BatchNormalisationRounding, SampleNormalisationRounding

RULES: dict[type | str, Rounding] = {
    **{f"MaxPool{axes}d": MaxPoolRounding() for axes in (1, 2, 3)},
    Affine: AffineRounding(),
    Sum: SumRounding(),
    FixedLinear: FixedLinearRounding(),
    Elementwise: ElementwiseRounding(),
    Kinked: KinkedRounding(),
    FixedNormalisation: FixedNormalisationRounding(),
    SampleNormalisation: SampleNormalisationRounding(),
    BatchNormalisation: BatchNormalisationRounding(),
    FollowingScale: FollowingRounding(),
}


def check(graph: Graph) -> None:
    """Whether every step has a rule.

    Raises:
        UnboundedError: one has none, by its path.
    """
    for node in graph.nodes[1:]:
        rule_of(node.step, RULES)


def errors_of(graph: Graph, uses: Iterable[int], samples: int, most: float = math.inf) -> list[tuple[int, Part]]:
    """For each of these steps the parts of its parameters, with the step's place; samples: 1 where steps mix them.

    Cost:
        One forward and one backward pass with absolute values, and a backward pass for each output of a sample.
    Raises:
        UnboundedError: the error of a value may be more than ``most`` of it; found before the way back.
    """
    uses = sorted(uses)
    values = values_of(graph, samples)
    if math.isfinite(most):
        _check_growth(graph, values, most)
    sizes = _sizes(graph, uses[0], samples)
    return [(i, part) for i, y in _backward(graph, values, sizes) if i in uses for part in _parts(graph, values, i, y)]


def values_of(graph: Graph, samples: int, radius: float = 0.0, rules: dict[type | str, Rounding] | None = None) -> list[Value]:
    """Each step's value with its error; of all weights within the radius of the present ones."""
    rules = RULES if rules is None else rules
    values = [Value(graph.nodes[0].value, np.zeros(samples))]
    for node in graph.nodes[1:]:
        inputs, rule = [values[i] for i in node.inputs], rule_of(node.step, rules)
        found = (rule.forward(node.step, inputs),) if radius == 0.0 else rule.on_ball(node.step, inputs, radius)
        values.append(Value(node.value, *found))
    return values


def _check_growth(graph: Graph, values: list[Value], most: float) -> None:
    for node, value in zip(graph.nodes, values):
        share = float((value.error / (value.norm + LOST)).max())
        if not share <= most:
            raise UnboundedError(
                f"{node.step.path or 'the model'}: rounding is bounded by no less than {share:.2g} of the values here, since norms of "
                f"layers multiply on the way. Normalised layers in contractive blocks keep it small."
            )


def _sizes(graph: Graph, start: int, samples: int) -> dict[int, Tensor]:
    """The gradients' sizes at each step from this one on that the output is computed from."""
    nodes, values, places = graph.nodes, [], []
    with torch.enable_grad():
        for index, node in enumerate(nodes):
            if index < start:
                values.append(node.value.detach())
                continue
            inputs = [values[i] for i in node.inputs]
            moves = any(v.requires_grad for v in inputs)
            values.append(node.step.forward(*inputs) if moves else node.value.detach().requires_grad_())
            places.append(index)
        wanted = [values[i] for i in places]
        flat = values[-1].reshape(samples, -1)
        squares = [torch.zeros_like(v) for v in wanted]
        outputs = flat.shape[1]
        for k in range(outputs):
            last = k == outputs - 1
            found = torch.autograd.grad(flat[:, k].sum(), wanted, retain_graph=not last, allow_unused=True)
            for square, gradient in zip(squares, found):
                if gradient is not None:
                    square.addcmul_(gradient, gradient)
    return {i: square.sqrt_().mul_(UP).add_(LOST).detach() for i, square in zip(places, squares)}


def _backward(graph: Graph, values: list[Value], sizes: dict[int, Tensor]):
    """(place, its gradients), from the output back to the first step of ``sizes``."""
    nodes, count = graph.nodes, len(values[0].error)
    error = {i: np.zeros(count) for i in sizes}
    passed = {i: np.zeros(count) for i in sizes}  # sizes of what is added up where a value is read more than once
    loose: dict[int, Tensor] = {}
    readers = dict.fromkeys(sizes, 0)
    for node in nodes:
        for i in node.inputs:
            readers[i] = readers.get(i, 0) + 1
    for index in sorted(sizes, reverse=True):
        error[index] = error[index] + (readers[index] + 2) * U * passed[index] * UP
        y = Gradients(sizes.pop(index), error[index], loose.pop(index, None))
        yield index, y.fastened()
        node = nodes[index]
        if not any(i in error for i in node.inputs):
            continue
        rule, inputs = rule_of(node.step, RULES), [values[i] for i in node.inputs]
        if isinstance(node.step, Kinked):
            (place,) = node.inputs
            found = rule.loose(node.step, inputs[0], y)
            if found is not None:
                loose[place] = loose[place] + found if place in loose else found
        else:
            y = y.fastened()
        for position, (i, found) in enumerate(zip(node.inputs, rule.backward(node.step, inputs, y))):
            if i in error:
                error[i] = error[i] + found
            if i in error and readers[i] > 1:
                passed[i] = passed[i] + rule.slope(node.step, position) * y.norm


def _parts(graph: Graph, values: list[Value], index: int, y: Gradients) -> list[Part]:
    node = graph.nodes[index]
    return rule_of(node.step, RULES).parts(node.step, values[node.inputs[0]], y)
