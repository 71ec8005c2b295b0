r"""DF g and how far its computed value is from the exact one: rows of the Jacobian, each by a backward pass, times g.

``kernel_error`` bounds \|\|J' - J\|\|_F for rows by backward passes, whatever the layers. With s = J' g as inner products of n numbers,
\|\|s - DF g\|\| <= (\|\|J' - J\|\|_F + gamma_n \|\|J'\|\|_F) \|\|g\|\|. It takes a pass for each output of the batch, so few may have it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import UnboundedError
from .kernel_error import jacobian_error_at_most
from .kernel_error.outputs import HOPELESS
from .kernel_error.states import LOST, UP, gamma
from .problem import Problem

MOST_OUTPUTS = 64  # of the batch


def proved_slope(problem: Problem, gradient: dict[str, Tensor]) -> tuple[Tensor, float]:
    """DF g, and how far it may be off.

    Cost:
        Two backward passes for each output of the batch.
    Raises:
        UnboundedError: there are more than ``MOST_OUTPUTS``; or a step has no rule, or too many digits of DF g may be lost.
    """
    count = problem.outputs.numel()
    if count > MOST_OUTPUTS:
        raise UnboundedError(
            f"nothing bounds the rounding of DF g, which the way by a ball takes, for more than {MOST_OUTPUTS} outputs of the batch."
        )
    names = list(gradient)
    off = jacobian_error_at_most(problem.model, problem.inputs, names=names, known=problem.known).jacobian
    moved = {name: problem.parameters[name].detach().clone().requires_grad_() for name in names}
    with torch.enable_grad():
        outputs = problem.outputs_at(moved).flatten()
        rows = [torch.autograd.grad(z, list(moved.values()), retain_graph=True, allow_unused=True) for z in outputs]
    pairs = [[(r, gradient[name]) for name, r in zip(names, row) if r is not None] for row in rows]
    slope = torch.stack([sum(((r * g).sum() for r, g in row), outputs.new_zeros(())) for row in pairs])
    size = math.sqrt(sum(float(r.square().sum()) for row in pairs for r, _ in row)) * UP
    length = math.sqrt(sum(float(g.square().sum()) for g in gradient.values())) * UP
    numbers = sum(g.numel() for g in gradient.values()) + len(names)
    error = (off + gamma(numbers + 2) * size) * length * UP + LOST
    if not error <= HOPELESS * size * length:
        raise UnboundedError(
            f"rounding of DF g is bounded by no less than {error:.2g}, where DF and g have {size:.2g} and {length:.2g}, since norms of "
            f"layers multiply on the way. Normalised layers in contractive blocks keep it small."
        )
    return slope.reshape(problem.outputs.shape), error
