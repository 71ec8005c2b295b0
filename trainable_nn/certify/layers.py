r"""sigma_min(DF) from the layers, everywhere and on a ball: Proposition 4.6 and Theorem 4.7 on a network's own numbers.

sigma(DF) >= sigma(D f_1) prod_(l >= 2) (sigma(I_l) - \|\|J g_l\|\|), where sigma(D f_1)^2 = min over units i of
lambda_min(X diag(P'(w_i)^2) X^T + [bias] 1 1^T) for an entrywise P. The slopes P' have a lower bound everywhere (the
leak), and a larger one on a ball, where \|w_ij\| grows by at most its radius.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..errors import TrainableNNError
from ..theory import samples
from ..theory.pl import sigma_from_layers
from ..theory.rounding import down
from .certificate import Hypothesis
from .first_sigma import MOST_WORK, FirstSigma, slopes_at_least
from .held import with_held_weights
from .problem import Problem
from .regularity import first_layer, residual_structure
from .remedies import KEEPS, LEMMA_A8

FIRST = "a first layer whose weights move every sample"
SLOPE = "a slope of the first layer's P with a lower bound everywhere"
INDEPENDENT = "linearly independent samples"
BY_UNITS = "the first layer's units one by one"
THEOREM_47 = "paper A, Theorem 4.7, hypothesis 2"


@dataclass(frozen=True)
class Layers:
    """The first layer and the steps after it; ``rows`` say which hypotheses of Theorem 4.7 hold."""

    rows: tuple[Hypothesis, ...]
    transport: float  # lower bound of prod (sigma(I_l) - ||J g_l||) everywhere, 0 where one factor has none
    first: FirstSigma | None = None

    def sigma_at_least(self, radius: float) -> float:
        """A lower bound of sigma_min(DF) on the ball of this radius around the present weights; infinity: everywhere."""
        if self.first is None or self.transport <= 0.0:
            return 0.0
        return down(math.sqrt(self.first.squared_at_least(radius)) * self.transport, 3)


def layers_of(problem: Problem) -> Layers:
    """Read the network's structure; what cannot be read is a failing row, never an exception."""
    rows, steps = _steps(problem)
    transport = sigma_from_layers(1.0, steps) if steps is not None else 0.0
    first, more = _first(problem)
    return Layers(tuple(more + rows), transport, first)


def _steps(problem: Problem) -> tuple[list[Hypothesis], list[tuple[float, float]] | None]:
    try:
        found = residual_structure(problem.model, problem.inputs[:2])  # of shapes and weights alone
    except (TrainableNNError, ValueError, TypeError, NotImplementedError) as error:
        return [_row(KEEPS, LEMMA_A8, path_in(error, problem.model), False, remedy=sentence(error))], None
    rows = []
    for step in found:
        margin = step.sigma - step.rho
        remedy = (
            f"The main path's map has smallest singular value {step.sigma:.4g} over its outputs, and the branch's Jacobian can "
            f"reach {step.rho:.4g}. Use a skip with singular values 1 (identity, OrthogonalDownsample2d) and a branch of "
            f"proved norm below it (SpectrallyBoundedResidual, normalised weights, smooth activations of slope at most 1)."
        )
        rows.append(_row(KEEPS, LEMMA_A8, step.path, margin > 0, value=margin, bound=0.0, remedy=remedy))
    return rows, [(step.sigma, step.rho) for step in found]


def _first(problem: Problem) -> tuple[FirstSigma | None, list[Hypothesis]]:
    try:
        first = first_layer(problem.model)
        x = input_of(problem, first.path)
    except (TrainableNNError, ValueError, TypeError, NotImplementedError) as error:
        return None, [_row(FIRST, THEOREM_47, path_in(error, problem.model), False, remedy=sentence(error))]
    if x is None or not problem.model.get_parameter(f"{first.path}.weight".lstrip(".")).requires_grad:
        remedy = "Its weights must be trained, and it must see one vector a sample: flatten before it."
        return None, [_row(FIRST, THEOREM_47, first.path, False, remedy=remedy)]
    if _is_used_elsewhere(problem.model, first.path):
        remedy = "Another layer has the same tensor, and what it does may undo what the first does. Give it weights of its own."
        return None, [_row(FIRST, THEOREM_47, first.path, False, remedy=remedy)]
    independent = samples.independence(x, bias=bool(first.bias), roundoff=problem.data_roundoff)
    n, d = x.shape
    most = d + bool(first.bias)
    remedy = f"Use at most {most} samples, " if n > most else "Drop samples that combine others, "
    rows = [
        _row(FIRST, THEOREM_47, first.path, True, value=float(d), bound=float(n)),
        _row(
            INDEPENDENT, THEOREM_47, first.path, independent.holds, value=independent.value, bound=independent.noise,
            remedy=remedy + "or map the inputs to more dimensions by fixed features first.",
        ),
        _slope_row(first),
    ]  # fmt: skip
    if not independent.holds:
        return None, rows
    sigma = FirstSigma(first, x)
    if not sigma.is_by_units:
        rows.append(_units_row(sigma))
    return sigma, rows


def _is_used_elsewhere(model: nn.Module, path: str) -> bool:
    """Whether a parameter of this layer stands in the model under another name, too."""
    own = {id(p) for p in model.get_submodule(path).parameters(recurse=False)}
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in own]
    return len(names) > len(own)


def _units_row(sigma: FirstSigma) -> Hypothesis:
    remedy = (
        f"A Gram matrix of the samples for each of the {len(sigma.first.weight)} units takes {sigma.work:.2g} multiplications at "
        f"each radius, and at most {MOST_WORK:.2g} are spent. One Gram matrix with the least slope of each column stands for "
        f"all units: a lower bound still, and a smaller one. Fewer samples or a narrower first layer are seen unit by unit."
    )
    return Hypothesis(BY_UNITS, "THEORY 4b", sigma.first.path, False, sigma.work, MOST_WORK, remedy=remedy, grade="")


def _slope_row(first) -> Hypothesis:
    everywhere = float(np.min(slopes_at_least(first, math.inf, np.zeros((1, 1)))))
    remedy = (
        f"P is {first.kind}-normalised, so its slope falls to 0 as the weights grow, and descent can stall there (II.1.7 item "
        f"2). Use EntryNormLinear(leak > 0), whose slope is at least the leak; without it a ball may still close."
    )
    source = "THEORY 4a; paper A, Theorem 5.1 as corrected in THEORY 3"
    return _row(SLOPE, source, first.path, everywhere > 0, value=everywhere, bound=0.0, remedy=remedy)


def input_of(problem: Problem, path: str) -> np.ndarray | None:
    """What the layer at ``path`` sees, as (N, d); None where it runs more than once or on no matrix of samples."""
    calls = _inputs_of(problem, path, problem.inputs[:2])  # all samples only where they come as vectors, and once
    if len(calls) != 1 or calls[0].dim() != 2 or len(calls[0]) != len(problem.inputs[:2]):
        return None
    calls = _inputs_of(problem, path, problem.inputs, stop=True)
    return calls[0].numpy() if len(calls[0]) == len(problem.inputs) else None


class _Stop(Exception):
    """The layer was reached, and nothing after it is wanted."""


def _inputs_of(problem: Problem, path: str, inputs: torch.Tensor, *, stop: bool = False) -> list[torch.Tensor]:
    seen = []
    module: nn.Module = problem.model.get_submodule(path)

    def look(module, arguments) -> None:
        seen.append(arguments[0])
        if stop:
            raise _Stop

    handle = module.register_forward_pre_hook(look)
    buffers = {name: b.clone() for name, b in problem.model.named_buffers()}
    try:
        with torch.no_grad(), with_held_weights(problem.model), contextlib.suppress(_Stop):
            problem.model(inputs)
    finally:
        handle.remove()
        for name, b in problem.model.named_buffers():
            b.copy_(buffers[name])
    return seen


def _row(name: str, source: str, path: str, holds: bool, **rest) -> Hypothesis:
    return Hypothesis(name, source, path, bool(holds), grade="global", **rest)


def sentence(error: Exception) -> str:
    return " ".join(str(error).split())


def path_in(error: Exception, model: nn.Module) -> str:
    """The module that an error's message begins with, "" where it names none."""
    start = str(error).partition(":")[0].strip()
    return start if start and start in dict(model.named_modules()) else ""
