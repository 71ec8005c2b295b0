r"""The outputs along rays of any length from the present weights: by Taylor models, or by DF g and a ball, with their rounding."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import CertificateError, UnboundedError
from .entries import NO_ROUNDING
from .kernel_error.outputs import HOPELESS, REFUSALS
from .kernel_error.states import UP, U
from .layers import sentence
from .loss_along import ROUNDING, Model, least, loss_at_most
from .problem import Problem, loss_between, proved
from .ray import Ray
from .regularity import PreparedNetwork
from .slope_along import proved_slope

WHERE = "certified descent"
PAYS = 0.01
CHEAP = 2**22  # products of two numbers on the way to the Jacobians, which are found at once


class Along:
    """way: "ray" or "ball". reason: why rounding is assumed, "" where it is proved. The loss now is enclosed."""

    way: str

    def __init__(self, problem: Problem, reason: str) -> None:
        self.problem, self.reason = problem, reason or (NO_ROUNDING if problem.cost.rounding is None else "")
        self.loss_at_least, self.loss_now_at_most = problem.loss_at_least, problem.initial_loss

    def model(self, length: float) -> Model:
        """At theta - u length g."""
        raise NotImplementedError

    def best(self, length: float) -> tuple[float, float]:
        """The u with the least bound of the loss on this ray, and that bound."""
        return least(self.problem, self.model(length))


def along_of(problem: Problem, gradient: dict[str, Tensor], length: float) -> Along:
    """By Taylor models, first at this length, where all layers have rules.

    Raises:
        CertificateError: some layer has neither a Taylor rule nor bounds of its derivatives.
    """
    try:
        ray = Ray(problem.model, problem.inputs, problem.known)
    except UnboundedError:
        return AlongBall(proved(problem, WHERE), gradient)
    return AlongRay(problem, gradient, ray, length)


class AlongRay(Along):
    """Taylor models.

    Their rounding is proved. Where a layer has no rule, or where it is hopeless at the present weights as well, it is assumed. The
    network's Jacobians, which a wide one takes long to find, wait until the remainder takes ``PAYS`` of the fall that is found without.
    """

    way = "ray"

    def __init__(self, problem: Problem, gradient: dict[str, Tensor], ray: Ray, length: float) -> None:
        self.problem, self.gradient, self.ray = problem, gradient, ray
        self._assumes, self._sharp, reason = False, ray.jacobians.products <= CHEAP, ""
        try:
            first = self._model(length)
            if not first.slack <= HOPELESS * ray.largest:
                problem = proved(problem, WHERE)
                reason = "" if problem.refused is None else sentence(problem.refused)
        except REFUSALS as refused:
            reason = sentence(refused)
        if reason:
            self.problem = problem = proved(problem, WHERE)
            self._assumes = True
            first = self._model(length)
        super().__init__(problem, reason)
        self._first: tuple[float, Model] | None = (length, first)
        if problem.outputs_error is None and not reason:
            ends = loss_between(WHERE, problem.cost, first.coefficients[0], problem.targets, first.slack)
            self.loss_at_least, self.loss_now_at_most = ends

    def model(self, length: float) -> Model:
        first, self._first = self._first, None
        return first[1] if first is not None and first[0] == length else self._model(length)

    def best(self, length: float) -> tuple[float, float]:
        model = self.model(length)
        u, bound = least(self.problem, model)
        if self._sharp or not self.ray.jacobians.sources:
            return u, bound
        still = loss_at_most(self.problem, replace(model, remainder=0.0, entries=None), u)
        if bound - still <= PAYS * (self.loss_at_least - bound):
            return u, bound
        self._sharp = True
        return least(self.problem, self._model(length))

    def _model(self, length: float) -> Model:
        found = self.ray.followed({name: -length * g for name, g in self.gradient.items()}, self._sharp)
        outputs = found.models[-1]
        slack = self._assumed(outputs.size) if self._assumes else self.ray.rounding(found)
        coefficients = (outputs.c0, outputs.c1, outputs.c2)[: self.ray.order]
        return Model(coefficients, float(outputs.r.norm()) * UP, self.ray.order, slack, outputs.r)

    def _assumed(self, size: Tensor) -> float:
        return (self.problem.outputs_error or 0.0) + ROUNDING * float(size.norm())


class AlongBall(Along):
    """DF g, and the second derivative on the ball that a ray reaches.

    The weights that float64 stores are within d of the ray, parameter by parameter. With v the norms of the moves, DF d and the
    second derivative's share of it, v^T Q d + d^T Q d / 2, are beside the rounding of DF g.
    """

    way = "ball"

    def __init__(self, problem: Problem, gradient: dict[str, Tensor]) -> None:
        reason = "" if problem.refused is None else sentence(problem.refused)
        try:
            self.slope, self.off = proved_slope(problem, gradient)
        except REFUSALS as refused:
            moved = {name: problem.parameters[name].detach() for name in gradient}
            _, self.slope = torch.func.jvp(problem.outputs_at, (moved,), (gradient,))
            self.off, reason = 0.0, reason or sentence(refused)
        super().__init__(problem, reason)
        self._assumes = bool(reason)
        self.norms = {name: float(g.norm()) * UP for name, g in gradient.items()}
        self.weights = {name: float(problem.parameters[name].detach().norm()) * UP for name in gradient}
        try:
            self.prepared = PreparedNetwork(problem.model, problem.inputs, known=problem.known)
        except UnboundedError as error:
            raise CertificateError(f"{WHERE}: no step is proved for this network. {error}") from error

    def model(self, length: float) -> Model:
        moves = {name: length * norm for name, norm in self.norms.items()}
        stored = {name: (4.0 * self.weights[name] + 8.0 * move) * U for name, move in moves.items()}
        whole = math.sqrt(sum((moves[name] + stored[name]) ** 2 for name in moves)) * UP
        found = self.prepared.on_ball(whole)
        v, d = (torch.tensor([n[path] for path in found.paths], dtype=torch.float64) for n in (moves, stored))
        Q = torch.from_numpy(found.Q)
        bent = float(v @ Q @ v) / 2
        if not math.isfinite(bent) and not math.isfinite(self.prepared.on_ball(0.0).jacobian_lipschitz):
            raise CertificateError(
                f"{WHERE}: no step is proved for this network, since the slope of one of its layers jumps. Use "
                "smooth activations (SmoothReLU, Softplus0, GELU1, Tanh) in place of ReLU and max pooling."
            )
        size = float(self.problem.outputs.norm() + length * self.slope.norm())
        slack = (self.problem.outputs_error or 0.0) + length * self.off
        if self._assumes:
            slack += ROUNDING * size
        else:
            turned = found.jacobian * float(d.norm()) + float(v @ Q @ d + d @ Q @ v) / 2 + float(d @ Q @ d) / 2
            slack = (slack + turned + 8 * U * size) * UP
        return Model((self.problem.outputs, -length * self.slope), bent * UP, 2, slack)
