r"""The extreme singular values of DF at the present weights, with the rounding that float64 can have added.

\lambda_min(DF DF^T) over all parameters is at least that over some of them, since further columns only add. So where
the whole Gram matrix is too dear, the last parameters alone give a lower bound: for a network that ends in a linear
layer this is the Gram matrix of its features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..linop import ntk
from ..linop.data_spectrum import least_eigenvalue_at_least
from ..theory.rounding import ROUNDOFF, down, up
from ..theory.samples import SVD_CONSTANT
from .entries import KINKS, Entries, entries_of
from .held import with_held_weights
from .problem import Problem
from .seen import Seen, backward_work, samples_meet, see

BUDGET = 2**30  # bytes of the matrices that may exist at once
WORK_PER_BYTE = 300  # multiplications allowed for each byte of the budget: some 20 seconds on one core
WORK_OF_NTK = 8  # times as much: the layerwise kernel needs far fewer products than M^2 p
KERNEL_SHARE = 4
MATRICES = 5  # of the kernel's size that its eigenvalues and their proofs hold at once
CHUNK_BYTES = 2**26
DENSE_ENTRIES = 2**24  # of a Jacobian; a larger one is not formed where the kernel has a rule
MOST_SVD = 2e10  # rows^2 columns up to which a small singular value is looked for again, by the values themselves
Watch = Callable[[str, int, int], None]  # what is done, how much of it, of how much


@dataclass(frozen=True)
class Extremes:
    """Bounds of sigma_min and sigma_max of DF at one point, over the output side.

    ``largest`` is None where only some of the parameters were taken: then it bounds nothing. ``source`` says which.
    ``entries`` says what both rest on, None where no matrix was computed.
    """

    smallest: float
    largest: float | None
    source: str
    parameters: int
    entries: Entries | None = None


def jacobian_extremes(
    problem: Problem, budget: int, watch: Watch, known: dict | None = None, kinked: bool = False
) -> Extremes:
    """Bounds of the extreme singular values of DF(theta_0), all parameters where the budget allows, else the last ones.

    known: keeps the norms of weights that the rounding of DF asks for. kinked: nothing is proved of that rounding.

    Cost:
        At most ``budget`` bytes and WORK_PER_BYTE * budget multiplications, those of the backward passes included; and
        the passes of ``kernel_error``.
    """
    layers = see(problem.model, problem.inputs)
    entries = lambda names: Entries(None, KINKS) if kinked else _entries(problem, names, watch, known)
    outputs, parameters = problem.outputs.numel(), problem.parameters
    total = sum(p.numel() for p in parameters.values())
    if total < outputs:
        return Extremes(0.0, None, f"{total} parameters cannot move {outputs} outputs", total)
    chosen = _affordable(problem, layers, budget)
    work = _kernel_work(problem, layers)
    if len(chosen) < len(parameters) and 8 * MATRICES * outputs**2 <= budget and work <= WORK_OF_NTK * WORK_PER_BYTE * budget:
        gram = _kernel(problem, list(parameters), budget, watch)
        if gram is not None:
            found = extremes_of_gram(gram, total, entries(list(parameters)))
            return Extremes(*found[:2], "exact tangent kernel of all parameters", total, found[2])
    count = sum(parameters[name].numel() for name in chosen)
    if count < outputs:
        found = f"the last {count} parameters" if count else "no parameters"
        return Extremes(0.0, None, f"no Jacobian of {outputs} outputs fits the budget, only {found}", count)
    smallest, largest, rests_on, refused = _extremes(problem, chosen, count, budget, work, watch, entries)
    if refused:
        return Extremes(0.0, None, f"Jacobian, which torch.func does not give ({refused})", count)
    if len(chosen) == len(parameters):
        return Extremes(smallest, largest, "exact Gram matrix of all parameters", count, rests_on)
    named = ", ".join(chosen[-3:]) + (", ..." if len(chosen) > 3 else "")
    return Extremes(smallest, None, f"Gram matrix of the last {count} of {total} parameters ({named})", count, rests_on)


def _extremes(
    problem: Problem,
    names: list[str],
    count: int,
    budget: int,
    work: float,
    watch: Watch,
    entries: Callable[[list[str]], Entries],
) -> tuple[float, float, Entries | None, str]:
    """From a dense Jacobian where it is small, else from the kernel; with the reason where neither can be had."""
    if problem.outputs.numel() * count > DENSE_ENTRIES and work <= WORK_PER_BYTE * budget:
        gram = _kernel(problem, names, budget, watch)
        if gram is not None:
            return *extremes_of_gram(gram, count, entries(names)), ""
    try:
        jacobian = dense_jacobian(problem, names, watch)
    except Exception as error:  # noqa: BLE001, torch.func refuses some forwards, in many ways
        return 0.0, math.inf, None, " ".join(str(error).split())[:200]
    return *_extremes_of(jacobian, entries(names)), ""


def _entries(problem: Problem, names: list[str], watch: Watch, known: dict | None) -> Entries:
    watch("rounding of the Jacobian", 0, 1)
    return entries_of(problem, names, known)


def _affordable(problem: Problem, layers: Sequence[Seen], budget: int) -> list[str]:
    """All parameters, or as many of the last ones as the budget allows: bytes of the Jacobian, its rows and their products."""
    outputs, samples, parameters = problem.outputs.numel(), len(problem.inputs), problem.parameters
    chosen, count = [], 0
    for name in reversed(parameters):
        count += parameters[name].numel()
        work = outputs * outputs * count + outputs * samples * backward_work(layers, [*chosen, name])
        if 8 * outputs * (count + 2 * outputs) > budget or work > WORK_PER_BYTE * budget:
            break
        chosen.append(name)
    return chosen[::-1]


def _kernel_work(problem: Problem, layers: Sequence[Seen]) -> float:
    """Multiplications of the layerwise kernel: its products, and a pass for each output; for each row where samples meet."""
    outputs, samples = problem.outputs.numel(), len(problem.inputs)
    passes = outputs if samples_meet(layers) else outputs / samples
    count = sum(p.numel() for p in problem.parameters.values())
    return float(outputs) ** 2 * count + passes * samples * backward_work(layers, problem.parameters)


def _kernel(problem: Problem, names: list[str], budget: int, watch: Watch) -> Tensor | None:
    """DF DF^T over these parameters, layer by layer; None where a layer has no rule there."""
    watch("tangent kernel", 0, 1)
    others = [p for name, p in problem.parameters.items() if name not in names]
    try:
        for p in others:
            p.requires_grad_(False)
        return ntk(problem.model, problem.inputs, budget=KERNEL_SHARE * budget)  # it holds activations, too
    except (TypeError, ValueError, NotImplementedError, RuntimeError):
        return None
    finally:
        for p in others:
            p.requires_grad_(True)


def dense_jacobian(problem: Problem, names: list[str], watch: Watch) -> Tensor:
    """d outputs / d parameters as a matrix (outputs, parameters), in float64; rows in chunks of bounded memory."""
    parameters = problem.parameters
    others = {name: p.detach() for name, p in parameters.items() if name not in names}
    chosen = {name: parameters[name].detach() for name in names}

    def network(values: dict[str, Tensor]) -> Tensor:
        return problem.outputs_at({**others, **values}).flatten()

    with with_held_weights(problem.model, moving=tuple(names)):
        outputs, pull = torch.func.vjp(network, chosen)
    rows, width = outputs.numel(), sum(p.numel() for p in chosen.values())
    step = max(1, CHUNK_BYTES // (8 * max(width, problem.inputs.numel())))
    matrix = torch.empty(rows, width, dtype=torch.float64)
    for start in range(0, rows, step):
        watch("Jacobian", start, rows)
        stop = min(start + step, rows)
        basis = torch.zeros(stop - start, rows, dtype=torch.float64)
        basis[torch.arange(stop - start), torch.arange(start, stop)] = 1.0
        (gradients,) = torch.func.vmap(pull)(basis)
        matrix[start:stop] = torch.cat([gradients[name].reshape(stop - start, -1) for name in names], 1).detach()
    watch("Jacobian", rows, rows)
    return matrix


def extremes_of(jacobian: Tensor) -> tuple[float, float]:
    r"""A lower bound of sigma_min(J) over the output side and an upper bound of sigma_max(J), for J in float64.

    From the Gram matrix J J^T: its computed entries err by at most n u \|J\|\|J\|^T, so its eigenvalues by at most
    n u \|\|J\|\|_F^2; those of the computed matrix are proved by Cholesky factors (``linop.data_spectrum``). Where that hides the
    smallest, from the singular values themselves, which LAPACK finds to 10 max(m, n) u \|\|J\|\|_F. The entries of J are taken to carry as much of their own (II.4.1
    item 7); what is proved of them counts in certificates.
    """
    return _extremes_of(jacobian, Entries())[:2]


def _extremes_of(jacobian: Tensor, entries: Entries) -> tuple[float, float, Entries]:
    """The same with what is known of the entries' rounding, and on what of it both rest."""
    rows, columns = jacobian.shape
    frobenius = float(torch.linalg.vector_norm(jacobian)) * (1 + 1e-12)
    if rows > columns:
        entries = entries.chosen(0.0, frobenius).of_jacobian(rows, columns, frobenius)
        return 0.0, up(frobenius + entries.taken, 4), entries
    gram = jacobian @ jacobian.T
    smallest, largest = _roots(*_eigenvalues(gram), columns * ROUNDOFF * float(gram.trace()) * (1 + 1e-9))
    if smallest < 1e-6 * largest and rows * rows * columns <= MOST_SVD:  # half of the digits are gone in the Gram matrix
        singular = np.linalg.svd(jacobian.numpy(), compute_uv=False)
        smallest = max(smallest, float(singular[-1]) - SVD_CONSTANT * columns * ROUNDOFF * frobenius)
    entries = entries.chosen(smallest, largest).of_jacobian(rows, columns, frobenius)
    return down(max(smallest - entries.taken, 0.0), 4), up(largest + entries.taken, 4), entries


def extremes_of_gram(gram: Tensor, columns: int, entries: Entries) -> tuple[float, float, Entries]:
    """As ``_extremes_of`` from J J^T as ``linop.ntk`` computes it, for J with so many columns."""
    ends = _eigenvalues(gram)
    entries = entries.chosen(*_roots(*ends, Entries().products(gram, columns)), gram).of_kernel()
    smallest, largest = _roots(*ends, entries.products(gram, columns))
    return down(max(smallest - entries.taken, 0.0), 4), up(largest + entries.taken, 4), entries


def _eigenvalues(gram: Tensor) -> tuple[float, float]:
    """Proved bounds of the least eigenvalue from below and of the greatest from above, of the matrix as it is stored."""
    if not torch.equal(gram, gram.T):  # a product of two operands may round its halves apart; each is a good one
        gram = gram.tril() + gram.tril(-1).T
    values = torch.linalg.eigvalsh(gram)  # where to look; nothing rests on it
    return least_eigenvalue_at_least(gram, float(values[0])), -least_eigenvalue_at_least(-gram, -float(values[-1]))


def _roots(least: float, most: float, products: float) -> tuple[float, float]:
    """Roots of the extreme eigenvalues of J J^T, less and more the rounding of its products."""
    least, most = least - products, most + products
    return down(math.sqrt(max(least, 0.0)), 4), up(math.sqrt(max(most, 0.0)), 4)
