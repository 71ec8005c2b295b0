"""Regularity of a whole network at given inputs, on a ball around its present parameters."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ...theory.composition import SAFETY, norm_at_most, perron_at_most
from ...theory.regularity import Regularity
from ...theory.rounding import up
from .graph import Graph, Rule
from .rules import RULES
from .states import Ball
from .sweep import Sweep

MOST_NUMBERS = 2**27  # of float64 kept at once for one piece of the batch
KEPT = 4  # numbers kept for each activation: value, slope, curvature, and one on the way


@dataclass(frozen=True)
class LayerRegularity:
    """One traced step: where it stands, its constants, and on which set and from which theorem they hold."""

    path: str
    kind: str
    regularity: Regularity
    domain: str
    source: str
    derivation: str


@dataclass(frozen=True)
class NetworkRegularity:
    """Proved constants of theta -> F(theta), all outputs on all inputs, for ||theta - theta_now|| <= radius.

    jacobian >= sup ||DF||.  jacobian_lipschitz >= Lip(DF).  value >= sup ||F||_F.
    paths: the trainable parameter tensors.  c[k] >= sup ||dF/dtheta_k||, and Q[k, l] >= sup of the norm of the block
    (k, l) of D2F: for displacements of norms v_k, ||DF v|| <= c . v and ||D2F[v, v]|| <= v^T Q v.
    """

    jacobian: float
    jacobian_lipschitz: float
    value: float
    layers: tuple[LayerRegularity, ...]
    paths: tuple[str, ...]
    c: np.ndarray
    Q: np.ndarray
    radius: float


def network_regularity(
    model: nn.Module,
    inputs: Tensor,
    *,
    radius: float,
    centre_jacobian: float | None = None,
    rules: Mapping[type, Rule] | None = None,
) -> NetworkRegularity:
    r"""Bounds of a network's derivatives in its parameters, on the ball of this radius around the present ones.

    They hold for the network in exact arithmetic with the values that its parameters have, in its present mode; frozen
    parameters and buffers do not move. As radius -> 0 they tend to constants built from the exact activations, slopes
    and Jacobians at the centre; with radius = inf they hold everywhere, and are infinite where nothing bounds them.

    Shape:
        inputs: (batch, \*); the batch is one point of the theory.
    Units:
        Euclidean norms of the flattened parameters and outputs. centre_jacobian: a proved upper bound of \|\|DF\|\| now,
        for example the root of the tangent kernel's largest eigenvalue; jacobian is then at most this
        + radius * jacobian_lipschitz.
    Cost:
        One forward and one backward pass for each output of a sample, in float64 on the CPU; for narrow networks also
        the Jacobians between all pairs of steps, sample by sample.
    Raises:
        UnboundedError: a step has no rule, by its path.
        ValueError: no inputs, values that are not finite, or a negative radius.
    Source:
        THEORY_PAPERS II.2.7, sharpened at the centre as its Lnum (II.3.9) is.
    """
    return PreparedNetwork(model, inputs, rules=rules).on_ball(radius, centre_jacobian=centre_jacobian)


class PreparedNetwork:
    """``network_regularity`` for several radii: what is measured at the centre is measured once.

    The model and the inputs must not change in between. Large batches are taken in pieces, whose bounds are joined by
    the root of the sum of their squares; where a step mixes the samples the batch stays whole. A network so wide that no
    Jacobian of a stretch of it is kept gives up its values after the first radius: what further radii ask was measured.
    """

    def __init__(
        self, model: nn.Module, inputs: Tensor, *, rules: Mapping[type, Rule] | None = None, known: dict | None = None
    ) -> None:
        self.model, self.inputs, self.rules = model, inputs, RULES if rules is None else rules
        self._known: dict = {} if known is None else known  # steps of layers and norms of their weights
        probe = graph_of(model, inputs[: min(2, len(inputs))], self.rules, self._known)
        check_inputs(model, inputs)
        for node in probe.nodes:
            node.step.check()
        self.mixes_samples = any(node.step.mixes_samples for node in probe.nodes)
        numbers = KEPT * sum(node.value.numel() for node in probe.nodes) / min(2, len(inputs))
        piece = len(inputs) if self.mixes_samples else max(1, min(len(inputs), int(MOST_NUMBERS / numbers)))
        self.pieces = inputs.split(piece)
        self._measured: list[dict] = [{} for _ in self.pieces]
        self._graphs: list[Graph | None] = [None] * len(self.pieces)

    def on_ball(
        self, radius: float, *, centre_jacobian: float | None = None, watch: Callable[[int, int], None] | None = None
    ) -> NetworkRegularity:
        """The bounds on the ball of this radius; see ``network_regularity``. watch: told the pieces done, of how many."""
        if not radius >= 0:
            raise ValueError(
                f"network_regularity: the radius must be a number of at least 0 or infinity, got {radius}. Give one."
            )
        if centre_jacobian is not None and not centre_jacobian >= 0:
            raise ValueError(
                f"network_regularity: centre_jacobian must be an upper bound of a norm, got {centre_jacobian}. Leave it out."
            )
        found = []
        for index in range(len(self.pieces)):
            found.append(self._piece(index, float(radius)))
            if watch is not None:
                watch(index + 1, len(self.pieces))
        first = found[0]
        c = _joined([piece.c for piece in found])
        Q = _joined([piece.Q for piece in found])
        lipschitz, jacobian = perron_at_most(Q), norm_at_most(c)
        if centre_jacobian is not None:
            jacobian = min(jacobian, up(centre_jacobian + (up(radius * lipschitz) if radius and lipschitz else 0.0)))
        value = norm_at_most(np.array([piece.value for piece in found]))
        layers = tuple(map(_joined_rows, zip(*(piece.layers for piece in found))))
        return NetworkRegularity(jacobian, lipschitz, value, layers, first.paths, c, Q, float(radius))

    def _piece(self, index: int, radius: float) -> NetworkRegularity:
        graph = self._graphs[index] or read_graph(self.model, self.pieces[index], self.rules, self._known)
        ball = Ball(radius, 1 if self.mixes_samples else len(self.pieces[index]), self._measured[index])
        sweep = Sweep(graph, ball, parameter_names(self.model, graph))
        order = list(sweep.parameters)
        group = np.zeros((len(order), len(sweep.columns)))
        group[sweep.parameter_of, np.arange(len(sweep.columns))] = 1.0
        c, Q = _grouped(group, sweep)
        value = norm_at_most(sweep.states[-1].size)
        found = NetworkRegularity(0.0, 0.0, value, _rows(graph, sweep), tuple(order), c, Q, radius)
        if sweep.needs_values:
            self._graphs[index] = graph if len(self.pieces) == 1 else None
        elif self._graphs[index] is None and self.rules is RULES:
            self._graphs[index] = graph.without_values()
        return found


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """The root of the sum of squares, entry by entry."""
    if len(parts) == 1:
        return parts[0]
    largest = np.maximum.reduce(parts)
    scale = np.where((largest > 0) & np.isfinite(largest), largest, 1.0)
    return np.where(np.isfinite(largest), scale * np.sqrt(sum(np.square(p / scale) for p in parts)) * SAFETY, largest)


def _joined_rows(rows: tuple[LayerRegularity, ...]) -> LayerRegularity:
    """One step's constants for all pieces: roots of sums of squares where they grow with the batch, else the largest."""
    if len(rows) == 1:
        return rows[0]
    held = [row.regularity for row in rows]
    joint = {name: norm_at_most(np.array([getattr(h, name) for h in held])) for name in ("value", "D", "c")}
    most = {name: max(getattr(h, name) for h in held) for name in ("J", "a", "b")}
    return replace(rows[0], regularity=Regularity(**joint, **most, J_lower=min(h.J_lower for h in held)))


def graph_of(model: nn.Module, inputs: Tensor, rules: Mapping[type, Rule], known: dict | None = None) -> Graph:
    """The model's steps at these inputs; ``known`` keeps norms of its weights from one reading to the next.

    Raises:
        As ``network_regularity``.
    """
    check_inputs(model, inputs)
    return read_graph(model, inputs, rules, known)


def read_graph(model: nn.Module, inputs: Tensor, rules: Mapping[type, Rule], known: dict | None = None) -> Graph:
    """``graph_of`` for a model and inputs that were checked."""
    graph = Graph(inputs.detach().to("cpu", torch.float64), rules, known)
    graph.keep(graph.read(model, "", 0))
    return graph


def check_inputs(model: nn.Module, inputs: Tensor) -> None:
    """Refuse inputs and parameters that are not finite real floats.

    Raises:
        TypeError: the inputs or a parameter hold no real floats.
        ValueError: no inputs, or values that are missing or not finite.
    """
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        found = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
        raise TypeError(f"network_regularity: the inputs must be a tensor of real floats, got {found}. Convert them.")
    if inputs.dim() < 2 or inputs.numel() == 0 or inputs.is_meta or not torch.isfinite(inputs).all():
        raise ValueError(
            f"network_regularity: the inputs, shape {tuple(inputs.shape)}, must be a batch (batch, ...) of at least one "
            f"sample, with finite values. Give such a batch."
        )
    for name, parameter in model.named_parameters():
        if is_lazy(parameter) or parameter.is_meta or not torch.isfinite(parameter).all():
            raise ValueError(f"{name}: the parameter has no values yet, or they are NaN or infinite. Load finite values.")
        if not parameter.is_floating_point():
            raise TypeError(f"{name}: the parameter has dtype {parameter.dtype}, and real floats are needed. Convert it.")


def parameter_names(model: nn.Module, graph: Graph) -> dict[tuple[int, str], str]:
    """Each use's parameter, by the first of its names; a tensor that stands twice is one parameter."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first.setdefault(id(parameter), name)
    every = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    return {(i, name): every[name] for i, node in enumerate(graph.nodes) for name in node.step.parameters}


def _grouped(group: np.ndarray, sweep: Sweep) -> tuple[np.ndarray, np.ndarray]:
    """c and Q of the parameters, from those of their uses."""
    count = len(sweep.columns)
    Q = np.zeros((count, count))
    for index, node in enumerate(sweep.graph.nodes):
        if node.inputs:
            source = node.inputs[0]
            at = sweep.tangents(source)
            part = node.step.curvature(sweep.ball.at(index), sweep.states[source], at, sweep.own.get(index, []), sweep.after[index])
            Q = Q if part is None else Q + part
    c = sweep.output_tangents().whole
    infinite = ~np.isfinite(Q)
    spread = group @ np.where(infinite, 0.0, Q) @ group.T
    spread[(group @ infinite @ group.T) > 0] = math.inf
    joined = np.array([c[row > 0].sum() for row in group])
    return joined * SAFETY, spread * SAFETY


def _rows(graph: Graph, sweep: Sweep) -> tuple[LayerRegularity, ...]:
    rows, radius = [], sweep.ball.radius
    where = "everywhere in the parameters" if math.isinf(radius) else f"parameters within {radius:.6g} of now"
    for index, node in enumerate(graph.nodes[1:], start=1):
        x, local = sweep.states[node.inputs[0]], sweep.locals[index]
        b, c = node.step.constants(sweep.ball.at(index), x)
        D = norm_at_most(np.array([sweep.columns[k].effect.whole for k in sweep.own.get(index, [])]))
        J = max(float(here.J.max()) for here in local)
        regularity = Regularity(
            value=norm_at_most(sweep.states[index].size),
            J=J * SAFETY, D=D, a=max(here.a for here in local) * SAFETY, b=b * SAFETY, c=c * SAFETY,
            J_lower=min(here.J_lower for here in local) if len(local) == 1 else 0.0,
        )  # fmt: skip
        size = norm_at_most(x.size)
        domain = f"{where}; the input within {norm_at_most(x.delta):.6g} of its value now, norm at most {size:.6g}"
        rows.append(LayerRegularity(node.step.path, node.step.kind, regularity, domain, node.step.source, node.step.derivation))
    return tuple(rows)
