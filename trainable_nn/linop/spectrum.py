r"""The largest and the smallest singular value of a linear map, from its products.

Golub-Kahan-Lanczos keeps orthonormal U, V with A V = U B, B upper triangular, and A^T U = V B^T + r e_last^T. A triplet
B q = s p gives one of A, (s, U p, V q), whose residual is \|r\| \|p_last\|. Both bases are orthogonalised in full,
twice. When they are full, the triplets at the wanted ends and r's direction start the next ones (a thick restart);
B stays upper triangular, with an arrow of the old triplets in front.

It runs on the smaller side, so that V fills the side on which A's smallest singular value is taken: then
min s = min \|A v\| / \|v\| over the span of V approaches that value from above, and never the zeros of the larger side.

Source: Baglama and Reichel (2005), "Augmented implicitly restarted Lanczos bidiagonalization methods", SIAM J. Sci.
Comput. 27; the end that starts with A V = U B.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .products import Products, products_of

DENSE_UP_TO = 2048  # of the smaller side: five seconds on one core, and right where Golub-Kahan is not
DENSE_ENTRIES = 2**23  # of the dense matrix: 64 MiB
BASIS = {"largest": 24, "smallest": 64, "both": 64}  # vectors a side; of them a restart keeps a quarter at each end
ENDS = ("both", "largest", "smallest")
CHECK_EVERY = 8


@dataclass(frozen=True)
class Extremes:
    r"""Estimates of the least and the greatest singular value; never bounds: use ``matrix_norm_at_most`` for those.

    ``smallest`` is the least of the min(outputs, inputs) singular values, so of A A^T where ``side`` is "outputs" (a
    wide matrix) and of A^T A where it is "inputs". A residual r is max(\|A v - s u\|, \|A^T u - s v\|) for unit u, v, as
    measured at the end: some singular value lies within r of s. Converged means that r, and an eps of A's dtype times
    the largest for the rounding of its products, are at most tol * s together; a value at the level of rounding is so
    never called converged. That s is the extreme one, and not a neighbour, is what a random start makes all but certain.
    What was not asked for is nan, and not converged. ``residuals`` are of the smallest and of the largest. ``method``
    is "dense", LAPACK's of the matrix, or "golub-kahan"; ``products`` counts single vectors that A or A^T was applied
    to, without those that made up a dense matrix by blocks.
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


def extreme_singular_values(
    op,
    *,
    tol: float = 1e-6,
    which: str = "both",
    most_products: int = 1000,
    dense_up_to: int = DENSE_UP_TO,
    seed: int = 0,
) -> Extremes:
    """The smallest and the largest singular value of a linear map, with residuals.

    For ``which="largest"`` always by Golub-Kahan-Lanczos. Else by a dense matrix while its smaller side is at most
    ``dense_up_to``; above, the smallest is what Golub-Kahan reached, from above, and for most convolutions it is
    not converged. Products run in the map's own dtype, everything else in float64 (complex128).

    Shape:
        op: a matrix as a tensor, or any object with ``shape`` (outputs, inputs) and ``mv``, ``rmv`` on torch vectors,
        or ``matvec``, ``rmatvec`` on numpy's.
    Cost:
        At most ``most_products`` products, and 64 float64 vectors of each side (24 for the largest alone); dense,
        the matrix by its own method or by products of its smaller side, then O(m n min(m, n)).
    Raises:
        TypeError: op has no such products, or its dtype is no float.
        ValueError: op is empty, tol is outside (0, 1), an option is unknown, or products are NaN or infinite.
    """
    _check_options(tol, which, most_products)
    products = products_of("extreme_singular_values", op)
    small = min(products.shape) <= dense_up_to and math.prod(products.shape) <= DENSE_ENTRIES
    if small and which != "largest":
        return _extremes(_dense(products), products, tol, which, "dense")
    return _extremes(_lanczos(products, tol, which, most_products, seed), products, tol, which, "golub-kahan")


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


def _lanczos(products: Products, tol: float, which: str, most_products: int, seed: int) -> dict:
    """Run on the transpose where that has fewer columns; stop when the wanted ends have converged or at the budget."""
    forward, back, (rows, columns) = products.mv, products.rmv, products.shape
    if rows < columns:
        forward, back, rows, columns = back, forward, columns, rows
    bases = Bases(forward, back, rows, columns, BASIS[which], products, seed)
    while not bases.complete and products.count + 2 <= most_products - 4:  # the last four measure the residuals
        if bases.size == bases.room:
            bases.restart(which)
        bases.extend()
        if (bases.size % CHECK_EVERY == 0 or bases.size == bases.room) and bases.converged(tol, which):
            break
    ends = ("smallest", "largest") if which == "both" else (which,)
    found = {end: bases.measured(end) for end in ends}
    found.setdefault("largest", (bases.values_at("largest"), math.nan))
    found.setdefault("smallest", (math.nan, math.nan))
    return found


class Bases:
    """U, V and B of the module's first lines, for A with at least as many rows as columns."""

    def __init__(self, forward, back, rows: int, columns: int, room: int, products: Products, seed: int) -> None:
        self.forward, self.back = forward, back
        self.room, self.eps = min(columns, room), products.eps
        self.u, self.v = products.empty(self.room, rows), products.empty(self.room, columns)  # one vector a row
        self.b = products.empty(self.room, self.room)
        self.size, self.beta, self.complete = 0, 0.0, False
        self.random = products.random(seed)
        start = self.random(columns)
        self.next = start / torch.linalg.vector_norm(start)

    def extend(self) -> None:
        """One vector more on both sides: A v = U h + alpha u, A^T u = V b^T + beta v_next."""
        j = self.size
        self.v[j] = self.next
        w, h = _orthogonalised(self.forward(self.next), self.u[:j])
        alpha = torch.linalg.vector_norm(w)
        scale = torch.linalg.vector_norm(h) + alpha
        if alpha <= 1e-14 * max(scale, self._scale()):  # A v lies in span U: any new direction will do
            alpha = torch.zeros_like(alpha)
            w = _orthogonalised(self.random(len(w)), self.u[:j])[0]
        self.u[j] = w / torch.linalg.vector_norm(w)
        self.b[:j, j], self.b[j, j] = h, alpha
        self.size = j + 1
        rest, _ = _orthogonalised(self.back(self.u[j]), self.v[: j + 1])
        self.beta = float(torch.linalg.vector_norm(rest))
        if self.size == self.v.shape[1] or self.beta <= 1e-14 * self._scale():
            self.beta, self.complete = 0.0, True  # V spans all that the start can reach
        else:
            self.next = rest / self.beta

    def converged(self, tol: float, which: str) -> bool:
        p, s, _ = self._triplets()
        residuals = self.beta * p[-1].abs()
        wanted = {"both": (0, -1), "largest": (0,), "smallest": (-1,)}[which]
        reachable = self.eps * s[0]
        return all(bool(residuals[i] <= max(0.5 * tol * s[i], reachable)) for i in wanted)

    def restart(self, which: str) -> None:
        """Keep the triplets nearest the wanted ends, and A^T's remainder as the next direction."""
        p, s, qh = self._triplets()
        kept = self.size // 4
        index = {
            "both": [*range(kept), *range(self.size - kept, self.size)],
            "largest": [*range(kept)],
            "smallest": [0, *range(self.size - kept, self.size)],
        }[which]
        self.u[: len(index)] = p[:, index].T @ self.u
        self.v[: len(index)] = qh[index].conj() @ self.v
        self.b.zero_()
        self.b[range(len(index)), range(len(index))] = s[index].to(self.b.dtype)
        self.size = len(index)

    def measured(self, end: str) -> tuple[float, float]:
        """The value at one end and its residual, by two products more."""
        p, s, qh = self._triplets()
        i = 0 if end == "largest" else -1
        u, v = p[:, i] @ self.u[: self.size], qh[i].conj() @ self.v[: self.size]
        forward = torch.linalg.vector_norm(self.forward(v) - s[i] * u)
        back = torch.linalg.vector_norm(self.back(u) - s[i] * v)
        return float(s[i]), float(torch.maximum(forward, back))

    def values_at(self, end: str) -> float:
        return float(self._triplets()[1][0 if end == "largest" else -1])

    def _triplets(self) -> tuple[Tensor, Tensor, Tensor]:
        k = self.size
        return torch.linalg.svd(self.b[:k, :k])

    def _scale(self) -> float:
        return float(self.b[: self.size, : self.size].abs().amax()) if self.size else 0.0


def _orthogonalised(w: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """w less its part in the rows of the basis, and that part; twice, which is enough."""
    h = basis.conj() @ w
    w = w - h @ basis
    again = basis.conj() @ w
    return w - again @ basis, h + again
