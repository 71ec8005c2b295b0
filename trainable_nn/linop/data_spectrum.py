r"""The least and the greatest eigenvalue of a kernel K = J J^T, on the side of the data, and what is proved of them.

A kernel that is held is decomposed. One that is not is reached by products: Lanczos with all its vectors kept orthogonal
and, when there is no more room, restarted from the Ritz vectors at both ends (a thick restart). The number of data is
small beside that of parameters, so many vectors fit, and the smallest value comes in a few hundred products where
implicit restarts with twenty vectors take thousands.

Proved, for a kernel that is held, in float64 with rounding to nearest:

* above: a Rayleigh quotient q = v^T K v / v^T v is at least the smallest and at most the largest eigenvalue. As
  computed, v^T K v errs by at most g \|v\|^T \|K\| \|v\| with g = 4 (n + 8) u.
* below: where Cholesky's algorithm ends on A = fl(K - t Id), then R^T R = A + E with \|\|E\|\| <= g tr A / (1 - g), so
  no eigenvalue of K is below t - g tr A / (1 - g) - u max A_ii. In the same way for t Id - K from above.

Source: Rump (2006), Verification of positive definiteness, BIT 46; Higham (2002), theorem 10.3; Wu and Simon (2000),
Thick-restart Lanczos, SIAM J. Matrix Anal. Appl. 22.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..tables import Table, numeral
from .gram import ntk
from .lanczos import Found, lanczos_extremes
from .parameter_jacobian import ParameterJacobian
from .without_autocast import without_autocast

WHERE = "kernel_extremes"
DENSE_UP_TO = 2048  # rows: the kernel by layers and its decomposition take less than a hundred products
U = 2.0**-53
CONSTANT = 4


@dataclass(frozen=True)
class KernelExtremes:
    r"""The ends of a kernel's spectrum: values found, how well, and what is proved.

    ``smallest`` and ``largest`` are Ritz values: in exact arithmetic never outside the spectrum, so the smallest is
    approached from above. ``residuals`` are \|\|K v - s v\|\| of their unit vectors, in the products' own arithmetic.
    Converged means that the value errs by at most tol of itself, as the residual and the gap to the next Ritz value
    tell; an estimate. ``smallest_at_least``, ``smallest_at_most``, ``largest_at_least`` and ``largest_at_most`` are
    proved of every symmetric matrix within ``error``, in spectral norm, of the one that was given, and nan where
    nothing is: where the kernel was not held. ``products`` counts K times one vector.
    """

    smallest: float
    largest: float
    residuals: tuple[float, float]
    converged: tuple[bool, bool]
    products: int
    method: str
    smallest_at_least: float
    smallest_at_most: float
    largest_at_least: float
    largest_at_most: float
    error: float

    @property
    def singular_values(self) -> tuple[float, float]:
        """sigma_min and sigma_max of J, the square roots of the values found."""
        return math.sqrt(max(self.smallest, 0.0)), math.sqrt(max(self.largest, 0.0))

    @property
    def condition_number(self) -> float:
        """largest / smallest of the values found; infinite unless the smallest is positive."""
        return self.largest / self.smallest if self.smallest > 0 else math.inf

    def table(self) -> Table:
        """Both ends: found, its residual, and between which numbers it is proved to lie, if that is known."""
        ends = (
            ("smallest", self.smallest, self.residuals[0], self.smallest_at_least, self.smallest_at_most),
            ("largest", self.largest, self.residuals[1], self.largest_at_least, self.largest_at_most),
        )
        rows = tuple((name, *(numeral(number, ".6g") for number in numbers)) for name, *numbers in ends)
        columns = ("eigenvalue", "found", "residual", "proved at least", "proved at most")
        return Table("Ends of the kernel's spectrum", columns, rows, caption=f"Method: {self.method}.")

    def __rich__(self):
        return self.table().to_rich()

    def _repr_html_(self) -> str:
        return self.table().to_html()


@without_autocast
def kernel_extremes(
    kernel,
    *,
    tol: float = 1e-6,
    most_products: int = 1000,
    basis: int = 400,
    dense_up_to: int = DENSE_UP_TO,
    error: float = 0.0,
    seed: int = 0,
) -> KernelExtremes:
    """The smallest and the largest eigenvalue of a kernel: lambda(DF) of the papers, and what bounds the step size.

    Shape:
        kernel: a symmetric matrix (n, n) as ``ntk`` gives it, or a ``ParameterJacobian`` (or any object with ``shape``
        (n, parameters), ``dtype`` and ``gram_mv``), whose kernel is formed by layers up to ``dense_up_to`` rows.
    Units:
        error: spectral norm by which the given matrix may miss the true kernel, as ``certify.kernel_error_at_most``
        proves it; the proved bounds allow for it.
    Cost:
        Held: O(n^3), with a few Cholesky factors for the bounds. Else at most ``most_products`` products and
        ``basis`` vectors of n float64 numbers.
    Raises:
        TypeError, ValueError: no kernel, empty, not symmetric, not finite, or an option out of range.
    Source:
        Paper A, Theorem 2.4; the methods: see the module.
    """
    _check_options(tol, most_products, basis, error)
    if isinstance(kernel, Tensor):
        return _of_matrix(_checked(kernel), error)
    if not callable(getattr(kernel, "gram_mv", None)) or not hasattr(kernel, "shape"):
        raise TypeError(f"{WHERE}: a matrix or a ParameterJacobian is needed, got {type(kernel).__name__}.")
    rows, columns = kernel.shape
    if rows > columns:
        return _by_counting(kernel, tol, most_products, basis, seed)
    if isinstance(kernel, ParameterJacobian) and rows <= dense_up_to:
        return _of_matrix(ntk(kernel.model, kernel.x), error)
    found = _products(kernel, tol, most_products, basis, seed)
    return _unproved(found, "lanczos")


def _products(kernel, tol: float, most_products: int, basis: int, seed: int) -> Found:
    device = getattr(kernel, "device", "cpu")

    def product(v: Tensor) -> Tensor:
        with torch.no_grad():
            found = kernel.gram_mv(v.to(kernel.dtype)).double()
        if not bool(torch.isfinite(found).all()):
            raise ValueError(f"{WHERE}: a product has entries that are NaN or infinite. Check weights and inputs.")
        return found

    return lanczos_extremes(product, kernel.shape[0], device, tol, most_products, basis, seed)


def _unproved(found: Found, method: str, **proved: float) -> KernelExtremes:
    bounds = dict.fromkeys(("smallest_at_least", "smallest_at_most", "largest_at_least", "largest_at_most"), math.nan)
    values, residuals, converged = found.values, found.residuals, found.converged
    return KernelExtremes(*values, residuals, converged, found.products, method, **{**bounds, **proved}, error=0.0)


def _by_counting(kernel, tol: float, most_products: int, basis: int, seed: int) -> KernelExtremes:
    """More outputs than parameters: K has a null space, whatever its entries."""
    found = _products(kernel, tol, most_products, basis, seed)
    exact = Found((0.0, found.values[1]), (0.0, found.residuals[1]), (True, found.converged[1]), found.products)
    return _unproved(exact, "counting", smallest_at_least=0.0, smallest_at_most=0.0)


def _of_matrix(kernel: Tensor, error: float) -> KernelExtremes:
    kernel = kernel.detach().to("cpu", torch.float64)
    values, vectors = torch.linalg.eigh(kernel)
    ends = [(float(values[i]), vectors[:, i]) for i in (0, -1)]
    residuals = tuple(float(torch.linalg.vector_norm(kernel @ v - s * v)) for s, v in ends)
    above, below = (_rayleigh(kernel, v) for _, v in ends)
    return KernelExtremes(
        ends[0][0],
        ends[1][0],
        residuals,
        (True, True),
        0,
        "dense",
        smallest_at_least=_down(least_eigenvalue_at_least(kernel, ends[0][0]) - error),
        smallest_at_most=_up(above[1] + error),
        largest_at_least=_down(below[0] - error),
        largest_at_most=_up(-least_eigenvalue_at_least(-kernel, -ends[1][0]) + error),
        error=error,
    )


def least_eigenvalue_at_least(kernel: Tensor, guess: float) -> float:
    """A proved lower bound of the smallest eigenvalue of a symmetric float64 matrix, near a guess where that is good.

    Cost:
        A Cholesky factor for each attempt; the attempts go down from the guess by powers of ten.
    """
    n = len(kernel)
    scale = max(float(kernel.diagonal().abs().max()), float(abs(guess)), 2.0**-900)
    step = 2 * CONSTANT * (n + 8) * U * n * scale  # about what rounding takes from an attempt
    while step < 4 * n * scale:
        found = _proved_at(kernel, guess - step)
        if found is not None:
            return found
        step *= 10
    radius = (kernel.abs().sum(1) - kernel.diagonal().abs()) * (1 + 2 * n * U)  # Gershgorin's circles
    return _down(float((kernel.diagonal() - radius).min()) - 4 * U * scale * n)


def _proved_at(kernel: Tensor, t: float) -> float | None:
    """What follows if Cholesky's algorithm ends on K - t Id."""
    shifted = kernel.clone()
    shifted.diagonal().sub_(t)
    diagonal = shifted.diagonal().clone()
    factor, info = torch.linalg.cholesky_ex(shifted)
    if int(info) != 0 or not bool(torch.isfinite(factor.diagonal()).all()):
        return None
    n = len(kernel)
    g = CONSTANT * (n + 8) * U
    trace = float(diagonal.sum()) * (1 + 2 * n * U)
    return _down(t - _up(g / (1 - g) * trace * (1 + 8 * U)) - 2 * U * float(diagonal.max()))


def _rayleigh(kernel: Tensor, v: Tensor) -> tuple[float, float]:
    """Bounds below and above of v^T K v / v^T v, for v as it is stored."""
    n = len(v)
    g = CONSTANT * (n + 8) * U
    value, size = float(v @ (kernel @ v)), float(v @ v)
    slack = g * float(v.abs() @ (kernel.abs() @ v.abs())) * (1 + g)
    ends = [(value + sign * slack) / (size * (1 + other * g)) for sign in (-1, 1) for other in (-1, 1)]
    return _down(min(ends), 4), _up(max(ends), 4)


def _up(x: float, times: int = 2) -> float:
    for _ in range(times):
        x = math.nextafter(x, math.inf)
    return x


def _down(x: float, times: int = 2) -> float:
    for _ in range(times):
        x = math.nextafter(x, -math.inf)
    return x


def noise_floor(kernel: Tensor, dtype: torch.dtype) -> float:
    r"""An estimate of \|\|E\|\|, E the rounding in a kernel whose network ran in ``dtype``: 16 eps \|\|K\|\|_F.

    Eigenvalues below it, and negative ones above its negative, say nothing. Not a bound: the rounding of a forward
    pass depends on the network; tests hold it against the same network in float64. ``certify.kernel_error_at_most``
    proves one, for networks whose steps it knows.
    """
    return 16 * torch.finfo(dtype).eps * float(torch.linalg.vector_norm(kernel.double()))


def _checked(kernel: Tensor) -> Tensor:
    if kernel.dim() != 2 or kernel.shape[0] != kernel.shape[1] or len(kernel) == 0:
        raise ValueError(f"{WHERE}: a kernel is a matrix (n, n) with n at least 1, got shape {tuple(kernel.shape)}.")
    if not kernel.is_floating_point():
        raise TypeError(f"{WHERE}: the kernel must have floats, got {kernel.dtype}. Convert it with .double().")
    if kernel.is_meta:
        raise ValueError(f"{WHERE}: the kernel is on the meta device, and its values are needed.")
    if not bool(torch.isfinite(kernel).all()):
        raise ValueError(f"{WHERE}: the kernel has entries that are NaN or infinite.")
    if not torch.equal(kernel, kernel.T):
        raise ValueError(
            f"{WHERE}: the kernel is not symmetric; entries differ by up to {float((kernel - kernel.T).abs().max()):.3g}. "
            f"Give (K + K.T) / 2, if that is what is meant."
        )
    return kernel


def _check_options(tol: float, most_products: int, basis: int, error: float) -> None:
    if not 0.0 < tol < 1.0:
        raise ValueError(f"{WHERE}: tol must be between 0 and 1, got {tol}. It is relative to the eigenvalue.")
    if most_products < 4 or basis < 16:
        raise ValueError(
            f"{WHERE}: most_products must be at least 4 and basis at least 16, got {most_products} and {basis}."
        )
    if not 0.0 <= error < math.inf:
        raise ValueError(f"{WHERE}: error must be a spectral norm, at least 0 and finite, got {error}.")
