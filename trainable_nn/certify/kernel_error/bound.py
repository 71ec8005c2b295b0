r"""How far a computed tangent kernel K = J J^T is from the exact one: proved, for networks whose steps have rules.

Let J be the exact Jacobian of the float weights at the float inputs, and J' the computed one, \|\|J' - J\|\|_F <= d
(``walk``). The computed kernel is J' J'^T but for the rounding E of the products, so

    \|\|K' - K\|\| <= 2 \|\|J'\|\| d + d^2 + \|\|E\|\|,   sigma_min(J) >= (lambda_min(K') - \|\|E\|\|)^(1/2) - d.

E, whatever way ``linop.ntk`` takes: inner products of rows run over ``COLUMNS`` at most before a float64 sum goes on, so
they err by gamma_k |J'_i| |J'_j|, k the columns and the additions, at most gamma_k \|\|J'\|\|_F^2 together; all columns at once
where samples meet. Where a layer's
factors meet first, the chain is as long as both widths and twice the positions, and the sizes are those of the factors.

Assumes IEEE float64 with rounding to nearest, matrix products and convolutions by inner products in any order (no Strassen,
no Winograd, no FFT), as every CPU library of torch has them in float64, and elementary functions within 4 units in the
last place (``activations``).

Source: Higham (2002), Accuracy and Stability of Numerical Algorithms, chapter 3, for gamma_k; the walk is ours.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...linop import ntk
from ...linop.gram.contract import FEWEST
from ...linop.gram.inner import COLUMNS
from ...theory.rounding import down, up
from ..regularity.following import FollowingScale
from ..regularity.network import parameter_names
from .pieces import Pieces
from .states import UP, Part, gamma
from .walk import errors_of

ADDITIONS = 4 / FEWEST  # for each column, beside those of a layer's rows and taps
WHERE = "kernel_error_at_most"


@dataclass(frozen=True)
class JacobianError:
    r"""What rounding can have done to a Jacobian, and what it can do to the products of its rows.

    jacobian >= \|\|J' - J\|\|_F.  chain: the longest sum in a product of rows.  factors >= the rounding where factors meet.
    columns: of J.
    """

    jacobian: float
    chain: int
    factors: float
    columns: int

    def products(self, kernel: Tensor) -> float:
        r"""At least \|\|K' - J' J'^T\|\|_F for K' as ``linop.ntk`` computes it: gamma_k tr(J' J'^T) and what meets as factors."""
        long = gamma(self.chain)
        trace = (float(kernel.diagonal().abs().sum()) * UP + self.factors) / (1.0 - long)
        return (long * trace + self.factors) * UP


@dataclass(frozen=True)
class KernelError:
    r"""What rounding can have done to a kernel: proved.

    jacobian >= \|\|J' - J\|\|_F, J' the computed Jacobian and J the exact one; products >= \|\|K' - J' J'^T\|\|, K' the kernel that
    was given; kernel >= \|\|K' - K\|\|. All speak of spectral norms but the first, which is a Frobenius norm.
    """

    jacobian: float
    products: float
    kernel: float

    def smallest_at_least(self, smallest: float) -> float:
        """A lower bound of lambda_min(K) from one of lambda_min(K'): by the kernel's error, or by the Jacobian's."""
        sigma = math.sqrt(max(smallest - self.products, 0.0)) * (1 - 2.0**-50) - self.jacobian
        return down(max(smallest - self.kernel, max(sigma, 0.0) ** 2), 8)


def kernel_error_at_most(model: nn.Module, inputs: Tensor, kernel: Tensor | None = None) -> KernelError:
    r"""A proved bound of \|\|K' - K\|\|, K' = ``linop.ntk(model, inputs)`` and K = J J^T in exact arithmetic.

    K is that of the weights and inputs as they are stored. For a model in float64 on a CPU K' is the given kernel, or any that
    ``ntk`` may compute there. For one in float32 or elsewhere the kernel is computed so, too, and what the given one is away
    from it is added.

    Shape:
        kernel: (N C, N C), as ``ntk`` gives it with outputs="all"; computed where it is left out.
    Units:
        spectral norm of the kernel, to be given to ``linop.kernel_extremes(kernel, error=...)``.
    Cost:
        One forward and one backward pass with absolute values, a backward pass for each output of a sample, and a proved norm
        of each weight. For float32 also ``ntk`` in float64.
    Raises:
        UnboundedError: a step of the network has no rule, by its path.
        TypeError, ValueError: inputs, weights or kernel that nothing can be said of.
    """
    twin = _doubled(model)
    x = inputs.detach().to("cpu", torch.float64)
    error = jacobian_error_at_most(twin, x)
    held = ntk(twin, x) if kernel is None or twin is not model else kernel.detach().to("cpu", torch.float64)
    if kernel is not None and kernel.shape != held.shape:
        raise ValueError(
            f"{WHERE}: the kernel has shape {tuple(kernel.shape)}, and this network at these inputs has one of shape "
            f"{tuple(held.shape)}. Give what ntk(model, inputs) returns."
        )
    away = 0.0 if kernel is None else float(torch.linalg.vector_norm(kernel.detach().to(held) - held)) * UP
    return _of_kernel(error, held, away)


def jacobian_error_at_most(
    model: nn.Module,
    inputs: Tensor,
    *,
    names: Collection[str] | None = None,
    known: dict | None = None,
    most: float = math.inf,
) -> JacobianError:
    """The bound of J alone, for a model in float64 on the CPU; names: the parameters that J has columns for, all if None.

    known: norms that were proved before, for the same weights. most: of a value, that its rounding may be; a network that may
    have more is given up half way.

    Raises:
        As ``kernel_error_at_most``; UnboundedError also for a network that is given up.
    """
    pieces = Pieces(model, inputs, {} if known is None else known)
    scaled = any(isinstance(node.step, FollowingScale) for node in pieces.probe.nodes)  # rows are formed before they meet
    total = _Total(math.inf if pieces.meet or scaled else COLUMNS)
    for graph, samples in pieces:
        every = parameter_names(model, graph)
        wanted = {key: name for key, name in every.items() if names is None or name in names}
        if wanted:
            found = errors_of(graph, {i for i, _ in wanted}, samples, most)
            total.add([(wanted.get((i, part.name)), part) for i, part in found])
    columns = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and (names is None or name in names))
    return total.joined(columns)


class _Total:
    """Over all parameters and samples."""

    def __init__(self, most: float) -> None:
        """most: columns that are multiplied at once."""
        self.most = most
        self.squares = self.factors = 0.0
        self.longest, self.additions = 0, 0

    def add(self, found: list[tuple[str | None, Part]]) -> None:
        """One piece of the batch; a parameter that is used several times has the sum of its uses' rows."""
        uses: dict[str, list[Part]] = {}
        for name, part in found:
            if name is not None:
                uses.setdefault(name, []).append(part)
        parts = [part for group in uses.values() for part in group]
        self.longest = max(self.longest, *(int(min(part.columns, self.most)) for part in parts))
        self.additions = sum(part.additions + math.ceil(ADDITIONS * part.columns) for part in parts)
        for group in uses.values():
            adding = gamma(len(group) + 2) if len(group) > 1 else 0.0
            error = sum(part.error + adding * part.size for part in group)
            self.squares += float((error**2).sum()) * UP
            for part in group:
                self.factors += gamma(part.depth + self.additions + 64) * float((part.size**2).sum()) * UP

    def joined(self, columns: int) -> JacobianError:
        """All pieces together."""
        return JacobianError(up(math.sqrt(self.squares), 4) * UP, self.longest + self.additions + 64, self.factors, columns)


def _of_kernel(error: JacobianError, kernel: Tensor, away: float) -> KernelError:
    """The largest row sum of |K'| bounds its spectral norm."""
    products = error.products(kernel)
    squared = float(kernel.abs().sum(1).max()) * UP + products
    d = error.jacobian
    whole = (2 * math.sqrt(squared) * d + d * d + products) * UP + away
    return KernelError(d, products + away, up(whole, 2))


def _doubled(model: nn.Module) -> nn.Module:
    held = [value for value in [*model.parameters(), *model.buffers()] if value.is_floating_point()]
    if all(value.dtype == torch.float64 and value.device.type == "cpu" for value in held):
        return model
    return copy.deepcopy(model).to(device="cpu", dtype=torch.float64)
