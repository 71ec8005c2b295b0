r"""The largest and the smallest singular value of a linear map, from its products.

``golub_kahan`` runs on the smaller side, so that V fills the side on which A's smallest singular value is taken: then
min s = min \|A v\| / \|v\| over the span of V approaches that value from above, and never the zeros of the larger side.

Convolutions are known entry by entry, so their smallest value need not be approached from outside: ``closed_form`` has it,
or Golub-Kahan runs on the pseudo-inverse of ``block_inverse``, whose largest singular value it is the inverse of.
"""

import math
from dataclasses import dataclass

import torch

from .block_inverse import pseudo_inverse
from .closed_form import closed_form, zero_by_counting
from .golub_kahan import lanczos
from .inverse_iteration import smallest_of
from .products import Products, products_of
from .rough_start import rough_top
from .toeplitz import ToeplitzConv
from .without_autocast import without_autocast

DENSE_UP_TO = 2048  # of the smaller side: five seconds on one core, and right where Golub-Kahan is not
CONVOLUTION_DENSE_UP_TO = 512  # of the smaller side of a convolution: above it the blocks' inverse is faster
DENSE_ENTRIES = 2**23  # of the dense matrix: 64 MiB
ENDS = ("both", "largest", "smallest")
ROUGH = 0.1  # of a largest value that only says where rounding begins


@dataclass(frozen=True)
class Extremes:
    r"""Estimates of the least and the greatest singular value; never bounds: use ``matrix_norm_at_most`` for those.

    ``smallest`` is the least of the min(outputs, inputs) singular values, so of A A^T where ``side`` is "outputs" (a
    wide matrix) and of A^T A where it is "inputs". A residual r is max(\|A v - s u\|, \|A^T u - s v\|) for unit u, v, as
    measured at the end: some singular value lies within r of s. Converged means that r, and an eps of A's dtype times
    the largest for the rounding of its products, are at most tol * s together; a value at the level of rounding is so
    never called converged. That s is the extreme one, and not a neighbour, is what a random start makes all but certain.
    What was not asked for is nan, and not converged. ``residuals`` are of the smallest and of the largest. ``method``
    is how the smallest was found, if it was asked for: "dense", LAPACK's of the matrix; "golub-kahan"; and for
    convolutions "kernel" and "fourier", the closed forms, whose residuals are those of a block, "block inverse", and
    "counting", for a zero that the shape alone shows. ``products`` counts single vectors that A, A^T or the inverse was
    applied to, without those that made up a dense matrix by blocks.
    """

    smallest: float
    largest: float
    residuals: tuple[float, float]
    smallest_converged: bool
    largest_converged: bool
    products: int
    method: str
    side: str

    @property
    def converged(self) -> tuple[bool, bool]:
        return self.smallest_converged, self.largest_converged


@without_autocast
def extreme_singular_values(
    op,
    *,
    tol: float = 1e-6,
    which: str = "both",
    most_products: int = 1000,
    dense_up_to: int | None = None,
    seed: int = 0,
) -> Extremes:
    """The smallest and the largest singular value of a linear map, with residuals.

    The largest of a large map is Golub-Kahan-Lanczos's. The smallest is LAPACK's while the smaller side is at most
    ``dense_up_to`` (None: 512 for a ``ToeplitzConv``, else 2048). Above, that of a real ``ToeplitzConv`` comes from a
    closed form or a block factorisation, whatever its padding; of any other map it is what Golub-Kahan
    reached, from above, and seldom converged. Products run in the map's own dtype, all else in float64 (complex128).

    Shape:
        op: a matrix as a tensor, or any object with ``shape`` (outputs, inputs) and ``mv``, ``rmv`` on torch vectors,
        or ``matvec``, ``rmatvec`` on numpy's.
    Cost:
        At most ``most_products`` products, and 64 float64 vectors of each side (24 for the largest alone); dense,
        the matrix by its own method or by products of its smaller side, then O(m n min(m, n)). The smallest of a
        convolution on h x w outputs of c channels: about 5 h (c w)^3 flops and 8 h (c w)^2 bytes; past 1.25 GiB
        it is left to Golub-Kahan. 64 channels at 32 x 32 take 1.8 GiB in all.
    Raises:
        TypeError: op has no such products, or its dtype is no float.
        ValueError: op is empty, tol is outside (0, 1), an option is unknown, or products are NaN or infinite.
    """
    _check_options(tol, which, most_products)
    products = products_of("extreme_singular_values", op)
    least = CONVOLUTION_DENSE_UP_TO if _has_blocks(op) else DENSE_UP_TO
    if which != "largest" and _fits(products, least if dense_up_to is None else dense_up_to):
        found = _dense(products)
        if _has_blocks(op) and zero_by_counting(op.geometry):
            found["smallest"] = (0.0, 0.0)
        return _extremes(found, products, tol, which, "dense")
    if which != "largest" and _has_blocks(op):
        found = _of_convolution(op, products, tol, which, most_products, seed)
        if found is not None:
            return found
        if dense_up_to is None and _fits(products, DENSE_UP_TO):
            return _extremes(_dense(products), products, tol, which, "dense")
    if which == "largest" and _has_blocks(op):
        found = _largest_of_convolution(op, products, tol, most_products, seed)
    else:
        found = lanczos(products, tol, which, most_products, seed)
    return _extremes(found, products, tol, which, "golub-kahan")


def _largest_of_convolution(op: ToeplitzConv, products: Products, tol: float, most_products: int, seed: int) -> dict:
    products.rescale()
    start = rough_top(op, products, tol, most_products // 2 - 4, seed)
    return lanczos(products, tol, "largest", most_products, seed, start)


def _fits(products: Products, dense_up_to: int) -> bool:
    return min(products.shape) <= dense_up_to and math.prod(products.shape) <= DENSE_ENTRIES


def _has_blocks(op) -> bool:
    return isinstance(op, ToeplitzConv) and not op.dtype.is_complex


def _of_convolution(
    op: ToeplitzConv, products: Products, tol: float, which: str, most_products: int, seed: int
) -> Extremes | None:
    """By a closed form, else the largest by Golub-Kahan and the smallest by the blocks' inverse, if that has it."""
    products.rescale()
    kernel = products.scaled(op.weight.detach().to(products.options["dtype"])).cpu()
    ends = closed_form(op.geometry, kernel)
    if ends is not None:
        found = {"smallest": ends.smallest, "largest": ends.largest}
        return _extremes(found, products, tol, which, ends.method)
    counted = zero_by_counting(op.geometry)
    inverse = None if counted else pseudo_inverse(op.geometry, kernel)
    if inverse is None and not counted:
        return None
    largest = _largest_of_convolution(op, products, tol if which == "both" else ROUGH, most_products, seed)["largest"]
    if counted:
        return _extremes({"smallest": (0.0, 0.0), "largest": largest}, products, tol, which, "counting")
    smallest = smallest_of(op, inverse, products, tol, largest[0], seed)
    if smallest is None:
        return None
    return _extremes({"smallest": smallest, "largest": largest}, products, tol, which, "block inverse")


def _extremes(found: dict, products: Products, tol: float, which: str, method: str) -> Extremes:
    floor = products.eps * found["largest"][0]  # what the products' arithmetic can't resolve
    nothing = (math.nan, math.nan)
    ends = [found[end] if which in ("both", end) else nothing for end in ("smallest", "largest")]
    shown = [r + floor <= tol * value or value == 0 == r for value, r in ends]
    smallest, largest = (products.unscaled(value) for value, _ in ends)
    return Extremes(
        smallest=smallest,
        largest=largest,
        residuals=tuple(products.unscaled(r) for _, r in ends),
        smallest_converged=shown[0],
        largest_converged=shown[1],
        products=products.count,
        method=method,
        side="outputs" if products.shape[0] < products.shape[1] else "inputs",
    )


def _check_options(tol: float, which: str, most_products: int) -> None:
    where = "extreme_singular_values"
    if not 0.0 < tol < 1.0:
        raise ValueError(f"{where}: tol must be between 0 and 1, got {tol}. It is relative to the singular value.")
    if which not in ENDS:
        raise ValueError(f"{where}: which must be one of {', '.join(ENDS)}, got {which!r}.")
    if most_products < 8:
        raise ValueError(f"{where}: most_products must be at least 8, four of them for residuals, got {most_products}.")


def _dense(products: Products) -> dict:
    matrix = products.dense()
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)

    def end(i: int) -> tuple[float, float]:
        left, right = u[:, i], vh[i].conj()
        forward = torch.linalg.vector_norm(matrix @ right - s[i] * left)
        back = torch.linalg.vector_norm(matrix.mH @ left - s[i] * right)
        return float(s[i]), float(torch.maximum(forward, back))

    return {"smallest": end(-1), "largest": end(0)}
