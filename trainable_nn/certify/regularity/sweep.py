r"""Two sweeps over the graph: forward for values and tangents, backward for what follows each step.

Every number is a supremum over the ball, taken as the least of two: a product of the steps' own suprema, and the
value measured at the centre plus the most that it can drift. For Jacobians T of a stretch of the network,

    T(theta) - T0 = J (T' (theta) - T0') + (J - J0) T0',

so drift = J drift' + \|J - J0\| \|T0'\|, and as the radius shrinks the bound tends to the norm of the product itself, not
to the product of norms. A parameter that is used more than once moves all its uses together: their speeds add up, and
only then do the parameters share the radius.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...theory.composition import times
from .graph import Graph, Node
from .norms import frobenius_at_most, norms_at_most
from .states import Backward, Ball, Effect, Local, State, Tangents

MOST_JACOBIAN = 2**26  # numbers in the kept forward Jacobians of one step, and in the backward ones of all
MOST_FORWARD_WORK = 2e10  # multiplications of the forward Jacobians' norms; beyond it norms are multiplied


@dataclass(frozen=True)
class Column:
    """One parameter tensor at one of its uses: which step uses it, and its hold on that step."""

    use: int
    step: int
    effect: Effect


class Sweep:
    """States of all steps on the ball, columns of all parameters, and the backward bounds.

    names: (step, name of a parameter there) -> the parameter; what has one value is one tensor.
    """

    def __init__(self, graph: Graph, ball: Ball, names: Mapping[tuple[int, str], str]) -> None:
        self.graph, self.ball, self.known, self.names = graph, ball, ball.memo, names
        self.uses = {i: u for u, i in enumerate(i for i, n in enumerate(graph.nodes) if n.step.parameters)}
        self.keeps_jacobians = self._affordable()
        self.sizes = np.array([graph.nodes[i].value.numel() // ball.samples for i in self.uses])
        self.states: list[State] = []
        self.locals: list[list[Local]] = []
        self.columns: list[Column] = []
        self.parameters: dict[str, int] = {}  # in the order of their first use
        self.parameter_of: list[int] = []  # of each column
        self.own: dict[int, list[int]] = {}
        self._readers = np.zeros(len(graph.nodes), dtype=int)
        for node in graph.nodes:
            for i in node.inputs:
                self._readers[i] += 1
        for index, node in enumerate(graph.nodes):
            self._forward(index, node)
        self._backward()

    @property
    def needs_values(self) -> bool:
        """Whether another radius asks for the values at the centre themselves, and not for what was measured of them."""
        return self.keeps_jacobians or self.known["backward"] is not None

    def tangents(self, index: int) -> Tangents:
        """sup norms of d(output of a step) / d(each column's parameter)."""
        return self._tangents(self.states[index].tau)

    def output_tangents(self) -> Tangents:
        """Those of the network's output, from the forward or the backward Jacobians, whichever are smaller."""
        tau = self.states[-1].tau.copy()
        for index, use in self.uses.items():
            tau[:, use] = np.minimum(tau[:, use], self.after[index].norm)
        return self._tangents(tau)

    def _tangents(self, tau: np.ndarray) -> Tangents:
        if not self.columns:
            return Tangents(np.zeros((self.ball.samples, 0)), np.zeros(0))
        each = np.stack([times(tau[:, c.use], c.effect.D) for c in self.columns], axis=1)
        joint = [float(times(tau[:, c.use].max(), c.effect.whole)) for c in self.columns]
        return Tangents(each, np.minimum(joint, _root_of_squares(each)))

    def _by_parameter(self, at: Tangents) -> Tangents:
        """One column for each parameter, the sum over its uses."""
        if len(self.parameters) == len(self.columns):
            return at
        each, whole = np.zeros((len(self.parameters), self.ball.samples)), np.zeros(len(self.parameters))
        np.add.at(each, self.parameter_of, at.each.T)
        np.add.at(whole, self.parameter_of, at.whole)
        return Tangents(each.T, whole)

    def _forward(self, index: int, node: Node) -> None:
        ball, step = self.ball.at(index), node.step
        inputs = [self.states[i] for i in node.inputs]
        if not inputs:
            none = np.zeros((ball.samples, len(self.uses)))
            zero = np.zeros(ball.samples)
            start = State(node.value, zero, zero, zero, 0.0, none, none, none, {}, index)
            start.size = ball.norms(start)
            self.states.append(start)
            self.locals.append([])
            return
        local = step.local(ball, inputs)
        tau = sum(times(here.J[:, None], x.tau) for here, x in zip(local, inputs))
        if step.parameters:
            self.own[index] = []
            for effect in step.effects(ball, inputs[0]):
                self.own[index].append(len(self.columns))
                self.columns.append(Column(self.uses[index], index, effect))
                self.parameter_of.append(self.parameters.setdefault(self.names[index, effect.name], len(self.parameters)))
            tau[:, self.uses[index]] += 1.0
        jacobians, centre, drift = self._measured(index, node, inputs, local, tau)
        tau = np.minimum(tau, centre + drift)
        self.states.append(self._state(index, inputs, local, tau, drift, centre, jacobians))
        self.locals.append(local)
        for i in node.inputs:
            self._readers[i] -= 1
            if self._readers[i] == 0:
                self.states[i].jacobians = None

    def _state(self, index, inputs, local, tau, drift, centre, jacobians) -> State:
        ball, node = self.ball.at(index), self.graph.nodes[index]
        error = sum(times(here.J, x.error) for here, x in zip(local, inputs)) + node.step.error(ball, inputs)
        reach = self._by_parameter(self._tangents(tau))
        now = ball.measured("norms", lambda: frobenius_at_most(ball.rows(node.value)))
        most = node.step.size(ball, inputs, local)
        delta = np.minimum(times(ball.radius, _root_of_squares(reach.each.T)) + error, now + most)
        whole = float(times(ball.radius, np.sqrt(np.square(reach.whole).sum())) + np.sqrt(np.square(error).sum()))
        size = np.minimum(now + delta, most)
        whole = min(whole, float(np.sqrt(np.square(delta).sum())))
        return State(node.value, error, delta, size, whole, tau, drift, centre, jacobians, index)

    def _measured(self, index: int, node: Node, inputs: list[State], local: list[Local], tau: np.ndarray):
        """The forward Jacobians now, their norms, and how far they drift; infinite drift where they aren't kept."""
        if not self.keeps_jacobians:
            return {}, np.zeros_like(tau), np.full_like(tau, np.inf)
        drift = np.zeros_like(tau)
        for here, x in zip(local, inputs):
            growth = here.drift[:, None] + here.rounding * np.sqrt(self.sizes)[None, :]
            drift = drift + times(here.J[:, None], x.drift) + times(growth, x.tau_centre)
        if ("forward", index) in self.known:
            return {}, self.known["forward", index], drift
        kept: dict[int, Tensor] = {}
        for position, (here, x) in enumerate(zip(local, inputs)):
            for use, tangents in (x.jacobians or {}).items() if here.J.any() else ():
                pushed = node.step.push(tangents, x.centre, position)
                kept[use] = pushed if use not in kept else kept[use] + pushed
        centre = np.zeros_like(tau)
        for use, pushed in kept.items():
            columns = pushed.reshape(len(pushed), self.ball.samples, -1).transpose(0, 1)
            last = not self._readers[index]  # the output's own come from the backward sweep
            centre[:, use] = math.inf if last else norms_at_most(columns, rtol=3e-2)
        if index in self.uses:
            use = self.uses[index]
            kept[use] = self._unit(node.value)
            centre[:, use] = 1.0
        self.known["forward", index] = centre
        return kept, centre, drift

    def _unit(self, value: Tensor) -> Tensor:
        """The identity of each sample: column j moves entry j of every sample."""
        entries = value.numel() // self.ball.samples
        unit = torch.eye(entries, dtype=value.dtype)[:, None].expand(entries, self.ball.samples, entries)
        return unit.reshape(entries, *value.shape)

    def _affordable(self) -> bool:
        sizes = [node.value.numel() // self.ball.samples for node in self.graph.nodes]
        held, work = 0, 0.0
        for index, size in enumerate(sizes):
            before = [sizes[i] for i in self.uses if i <= index]
            held = max(held, self.ball.samples * size * sum(before))
            work += sum(self.ball.samples * size * b * (size + 7 * min(size, b)) for b in before)
        return held <= MOST_JACOBIAN and work <= MOST_FORWARD_WORK

    def _backward(self) -> None:
        nodes, ball = self.graph.nodes, self.ball
        outputs = nodes[-1].value.numel() // ball.samples
        if "backward" not in self.known:
            self.known["backward"] = self._pulled(outputs)
        measured = self.known["backward"]
        norm = [np.zeros(ball.samples) for _ in nodes]
        drift = [np.zeros(ball.samples) for _ in nodes]
        norm[-1] = np.ones(ball.samples)
        self.after: list[Backward] = [None] * len(nodes)  # type: ignore[list-item]
        for index in range(len(nodes) - 1, 0, -1):
            columns = None
            now = norm[index]
            if measured is not None:
                now, column_norms = measured[index]
                norm[index] = np.minimum(norm[index], now + drift[index])
                columns = np.minimum(column_norms + drift[index][:, None], norm[index][:, None])
            self.after[index] = Backward(norm[index], columns)
            for here, i in zip(self.locals[index], nodes[index].inputs):
                norm[i] = norm[i] + times(here.J, norm[index])
                if measured is not None:
                    moved = times(here.drift + here.rounding * np.sqrt(outputs), now)
                    drift[i] = drift[i] + times(here.J, drift[index]) + moved

    def _pulled(self, outputs: int):
        """(norms, norms of columns) of d(network's output) / d(each step's output) now; None where it is too large."""
        nodes, ball = self.graph.nodes, self.ball
        held = outputs * sum(node.value.numel() for node in nodes)
        if held > MOST_JACOBIAN:
            return None
        values = []
        with torch.enable_grad():
            for node in nodes:
                inputs = [values[i] for i in node.inputs]
                values.append(node.step.forward(*inputs) if inputs else node.value.detach().requires_grad_())
            flat = ball.rows(values[-1])
            rows = [
                torch.autograd.grad(flat[:, k].sum(), values, retain_graph=True, allow_unused=True)
                for k in range(outputs)
            ]
        found = []
        for index, value in enumerate(values):
            stacked = [torch.zeros_like(value) if row[index] is None else row[index] for row in rows]
            matrices = torch.stack([ball.rows(row) for row in stacked], dim=1)  # (samples, outputs, entries)
            by_column = matrices.square().sum(1).sqrt().numpy() * (1 + (outputs + 8) * 2.0**-53)
            found.append((norms_at_most(matrices), by_column))
        return found


def _root_of_squares(values: np.ndarray) -> np.ndarray:
    """Over the first axis."""
    return np.sqrt(np.square(values).sum(axis=0))
