r"""The form that Theorem 4.7 asks for: a first affine layer, then steps I Z + g(theta, Z) one after the other.

The graph is cut at each step that every path goes through. Between two cuts stands one step or a sum of paths. Of a sum,
the fixed linear path with the largest least singular value is I, all else is g; of a single step, I is the step if it is
linear without parameters, else g is.

Source: paper A, Theorem 4.7 and Lemma A.8.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from ...errors import UnboundedError
from ...theory.composition import times
from ...theory.parameterisations import EntryNormConstants, WeightNormConstants
from ...theory.rounding import down, up
from .affine import Affine
from .graph import Graph, Rule
from .network import graph_of
from .rules import RULES
from .steps import FixedLinear, Sum


@dataclass(frozen=True)
class ResidualLayer:
    """One layer after the first, f(theta, Z) = I Z + g(theta, Z).

    skip: what I is, "identity", the type of a fixed linear map, or "none".  sigma: a proved lower bound of the smallest
    singular value of I, over its outputs.  rho: a proved upper bound of ||J g|| for every theta and Z; may be infinite.
    """

    path: str
    skip: str
    sigma: float
    rho: float


@dataclass(frozen=True)
class FirstLayer:
    """The first layer with parameters: P's kind ("identity", "entry", "weight" or "schatten") and constants."""

    path: str
    kind: str
    weight: Tensor
    bias: bool
    eps: float | None = None
    gain: float | None = None
    leak: float = 0.0


def residual_structure(
    model: nn.Module, inputs: Tensor, *, rules: Mapping[type, Rule] | None = None
) -> tuple[ResidualLayer, ...]:
    """The layers after the first one with parameters, in order.

    Raises:
        UnboundedError: a step has no rule, or not all paths go through the first layer.
    """
    graph = graph_of(model, inputs, RULES if rules is None else rules)
    cuts = _cuts(graph)
    start = _first_of(graph, cuts)
    found = []
    for before, after in pairwise(cuts):
        if before >= start:
            found.append(_layer(graph, before, after))
    return tuple(found)


def first_layer(model: nn.Module) -> FirstLayer:
    """The first module with parameters of its own, which must be affine.

    Raises:
        UnboundedError: there is none, or it is of another type.
    """
    for path, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            break
    else:
        raise UnboundedError("first_layer: the model has no parameters. Give a network with a first affine layer.")
    if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        raise UnboundedError(
            f"{path or 'the model'}: the first layer with parameters is {type(module).__name__}, and Theorem 4.7 needs an "
            f"affine one. Put an EntryNormLinear first."
        )
    if not hasattr(module, "constants"):
        return FirstLayer(path, "identity", module.weight, module.bias is not None)
    constants = module.constants()
    kinds = {EntryNormConstants: "entry", WeightNormConstants: "weight"}
    kind = kinds.get(type(constants), "schatten")
    leak = float(getattr(constants, "leak", 0.0))
    return FirstLayer(path, kind, module.weight, module.bias is not None, constants.eps, constants.gain, leak)


def _cuts(graph: Graph) -> list[int]:
    """Places that every path from the input to the output goes through."""
    reach, cuts = 0, []
    edges: dict[int, int] = {}
    for index, node in enumerate(graph.nodes):
        for i in node.inputs:
            edges[i] = max(edges.get(i, 0), index)
    for index in range(len(graph.nodes)):
        if reach <= index:
            cuts.append(index)
        reach = max(reach, edges.get(index, 0))
    return cuts


def _first_of(graph: Graph, cuts: list[int]) -> int:
    for index, node in enumerate(graph.nodes):
        if isinstance(node.step, Affine):
            if index not in cuts:
                raise UnboundedError(
                    f"{node.step.path}: not all of the network's paths go through its first layer, so Theorem 4.7 doesn't "
                    f"apply. Put one affine layer before the first block."
                )
            return index
    raise UnboundedError("residual_structure: the model has no affine layer. Give a network with a first affine layer.")


@dataclass(frozen=True)
class _Term:
    """scale times the path that ends at a place."""

    scale: float
    place: int


def _layer(graph: Graph, before: int, after: int) -> ResidualLayer:
    terms = _terms(graph, before, _Term(1.0, after))
    fixed = [(_fixed(graph, before, term), term) for term in terms]
    (sigma, skip), chosen = max(((f or (-1.0, "none"), t) for f, t in fixed), key=lambda pair: pair[0][0])
    rest = [term for term in terms if skip == "none" or term is not chosen]
    rho = sum((_everywhere(graph, before, term) for term in rest), 0.0)
    return ResidualLayer(_path(graph, before, after), skip, max(sigma, 0.0), up(rho, 2 * len(rest)) if rho else 0.0)


def _terms(graph: Graph, before: int, term: _Term) -> list[_Term]:
    """A sum's paths, sums within sums taken apart."""
    node = graph.nodes[term.place]
    if term.place == before or not isinstance(node.step, Sum):
        return [term]
    return [
        found
        for scale, i in zip(node.step.scales, node.inputs)
        for found in _terms(graph, before, _Term(term.scale * scale, i))
    ]


def _fixed(graph: Graph, before: int, term: _Term) -> tuple[float, str] | None:
    """(sigma, its name) of a path of fixed linear maps; None for any other."""
    sigma, place, name = abs(term.scale), term.place, "identity"
    while place != before:
        node = graph.nodes[place]
        if isinstance(node.step, FixedLinear):
            sigma = sigma * node.step.lower
        elif isinstance(node.step, Sum) and len(node.inputs) == 1:
            sigma = sigma * abs(node.step.scales[0])
        elif isinstance(node.step, Affine) and not node.step.parameters:
            sigma = sigma * node.step.least(0.0)
        else:
            return None
        sigma = down(sigma) if sigma != 1.0 else sigma
        if not getattr(node.step, "moves_only", False) and name == "identity":
            name = node.step.kind
        place = node.inputs[0]
    return sigma, name


def _everywhere(graph: Graph, before: int, term: _Term) -> float:
    """sup ||J|| over all parameters and inputs, by products and sums along the paths."""
    known = {before: 1.0}
    for place in range(before + 1, term.place + 1):
        node = graph.nodes[place]
        if any(i not in known for i in node.inputs):
            continue
        if isinstance(node.step, Sum):
            norm = sum(float(times(abs(s), known[i])) for s, i in zip(node.step.scales, node.inputs))
        else:
            start = node.inputs[-1] if node.step.covers_block else node.inputs[0]
            norm = float(times(node.step.everywhere(), known[start]))
        known[place] = up(norm, 4) if 0 < norm < math.inf else norm
    return float(times(abs(term.scale), known[term.place]))


def _path(graph: Graph, before: int, after: int) -> str:
    """What the paths of the steps in between have in common."""
    paths = [graph.nodes[i].step.path.split(".") for i in range(before + 1, after + 1)]
    if len(paths) == 1:
        return ".".join(paths[0])
    common = []
    for parts in zip(*paths):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
