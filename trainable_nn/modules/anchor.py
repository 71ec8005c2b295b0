r"""What is proved of a linear layer whose weight moves: a tight bound at an anchor, and the distance from it.

    ||T(w)|| <= min(B + f |w - w0|, f |w|),  B >= ||T(w0)||,  f = geometry_factor, |.| the Frobenius norm of a group,

the largest over the groups. The pair (w0, B) is true whatever becomes of w, so the bound can't go stale: a step of an
optimiser, a loaded file, a write through ``.data`` or another weight in a functional call all show in |w - w0|.

Rounding: a Frobenius norm sums n squares for each row, in any order, in the weight's arithmetic, at least float32; the
rows are summed in float64. w - w0 has one rounding, a weight times a row's factor at most four.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linop import convolution_norm_at_most, matrix_norm_at_most

HALVES = (torch.float16, torch.bfloat16)
ABOVE = 1.1  # of a size over what it stands for, so that rounding never shows


@dataclass(frozen=True)
class Bounds:
    """size: a smooth function of the parameters.  proved: at least the Lipschitz constant. Both 0-dim float64."""

    size: Tensor
    proved: Tensor

    def __mul__(self, other: "Bounds | float") -> "Bounds":
        size, proved = (other.size, other.proved) if isinstance(other, Bounds) else (other, other)
        return Bounds(self.size * size, self.proved * proved)

    def __add__(self, other: "Bounds | float") -> "Bounds":
        size, proved = (other.size, other.proved) if isinstance(other, Bounds) else (other, other)
        return Bounds(self.size + size, self.proved + proved)

    __rmul__, __radd__ = __mul__, __add__


@dataclass(frozen=True)
class LinearPart:
    """A linear map inside a branch.

    weight: what acts, one row for each output channel, or input channel of a transposed convolution.
    rows: a factor for each row that comes after, or None; by ``after``, the path of a floored normalisation.
    geometry: the arguments of ``convolution_norm_at_most`` as pairs, or () for a matrix.
    factor: at least ||T|| over the norm of the weight as a matrix.  supremum: over every weight.
    """

    path: str
    weight: Tensor
    rows: Tensor | None
    geometry: tuple[tuple[str, object], ...]
    factor: float
    supremum: float = math.inf
    after: str = ""

    @property
    def groups(self) -> int:
        return dict(self.geometry).get("groups", 1)


@dataclass(frozen=True)
class DiagonalPart:
    """A normalisation inside a branch: weight / floor, entry by entry, is at least what it multiplies by."""

    path: str
    weight: Tensor
    floor: float


@dataclass(frozen=True)
class Anchor:
    """weight: w0, float32 or float64.  bound: B, 0-dim float64.  geometry: of the map that B bounds."""

    weight: Tensor
    bound: Tensor
    geometry: tuple[tuple[str, object], ...]

    def fits(self, part: LinearPart) -> bool:
        there = self.weight.shape == part.weight.shape and self.weight.device == part.weight.device
        return there and self.geometry == part.geometry

    def moved(self, device: torch.device) -> "Anchor":
        return Anchor(self.weight.to(device), self.bound.to(device), self.geometry)


def acting_weight(part: LinearPart) -> Tensor:
    """The weight as the operator reads it, with its rows' factors: rounded to autocast's dtype where autocast is on."""
    weight = part.weight
    if _is_rounded(weight):
        weight = weight.to(torch.get_autocast_dtype(weight.device.type))
    weight = weight.float() if weight.dtype in HALVES else weight
    if part.rows is None:
        return weight
    return weight * part.rows.to(weight.dtype).reshape(-1, *[1] * (weight.dim() - 1))


def _is_rounded(weight: Tensor) -> bool:
    """Whether autocast rounds it; it leaves float64 alone."""
    kind = weight.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind) and weight.dtype != torch.float64


def _supremum(part: LinearPart) -> float:
    """Infinity where autocast rounds what a normalised layer keeps below its supremum."""
    return math.inf if _is_rounded(part.weight) else part.supremum


def size_of(part: LinearPart) -> Bounds:
    """The smooth size 1.1 f (1e-24 + |w|^2)^(1/2) of the whole weight, in the place of both."""
    size = _size(part, acting_weight(part))
    return Bounds(size, size)


def bounds_of(part: LinearPart, anchors: Mapping[str, Anchor]) -> Bounds:
    """The smooth size, and what the anchor proves; differentiable in the weight."""
    weight, anchor = acting_weight(part), anchors.get(part.path)
    length = _length(weight, part.groups)
    proved = part.factor * length
    if anchor is not None and anchor.fits(part):
        away = _length(weight - anchor.weight, part.groups)
        rounded = 0.0 if part.rows is None else 4 * _roundoff(weight)
        proved = torch.minimum(proved, anchor.bound + part.factor * (away + rounded * length))
    if part.rows is not None:
        proved = proved * (1 + 4 * _roundoff(weight))
    supremum = _supremum(part)
    return Bounds(_size(part, weight), proved.clamp(max=supremum) if supremum < math.inf else proved)


def bounds_of_diagonal(part: DiagonalPart) -> Bounds:
    """The largest entry, and as its smooth size 1.1 times the 8-norm."""
    scales = part.weight.double() / part.floor
    size = ABOVE * (scales.square().square().square().sum() + 1e-192) ** 0.125
    return Bounds(size, scales.abs().amax() * (1 + 2.0**-50))


def distance_to(anchor: Anchor, part: LinearPart) -> float:
    """At least f |w - w0| now, rounding included."""
    weight = acting_weight(part).detach()
    rounded = 0.0 if part.rows is None else 4 * _roundoff(weight)
    return float(part.factor * (_length(weight - anchor.weight, part.groups) + rounded * _length(weight, part.groups)))


def _size(part: LinearPart, weight: Tensor) -> Tensor:
    flat = weight.reshape(-1)
    return ABOVE * part.factor * (torch.dot(flat, flat).double() + 1e-24).sqrt()


def _roundoff(weight: Tensor) -> float:
    return 2.0**-53 if weight.dtype == torch.float64 else 2.0**-24


def _length(weight: Tensor, groups: int) -> Tensor:
    """At least the largest Frobenius norm of a group, in float64."""
    rows = weight.flatten(1)
    if torch.is_grad_enabled():  # the second derivative of vector_norm is NaN at 0
        squares = rows.square().sum(1).double()
    else:
        squares = torch.linalg.vector_norm(rows, dim=1).double().square()
    squared = squares.reshape(groups, -1).sum(1).amax()
    n = weight[0].numel() + 8
    lost = weight.numel() * (2.0**-124 if weight.dtype == torch.float32 else 2.0**-900)  # squares below the least float
    return (squared + lost).sqrt() * (1 + 1.1 * n * _roundoff(weight))


def anchored(part: LinearPart, old: Anchor | None) -> Anchor:
    """The anchor at the weight of now, in the old one's memory if it fits.

    Raises:
        ValueError: the weight is not finite.
    """
    weight = acting_weight(part).detach().clone()
    bound = torch.tensor(tight_bound(part, weight), dtype=torch.float64, device=weight.device)
    if old is None or not old.fits(part) or old.weight.dtype != weight.dtype:
        return Anchor(weight, bound, part.geometry)
    old.weight.copy_(weight)
    old.bound.copy_(bound)
    return old


def tight_bound(part: LinearPart, weight: Tensor, input_shape: tuple[int, ...] | None = None) -> float:
    """At least the operator norm with this weight, for every input size or for one; a few per cent above it.

    Cost:
        See ``operator_norm_at_most``; the grid is coarser where there are more channels, 13 % of excess at 512.
    """
    if not part.geometry:
        return min(matrix_norm_at_most(weight), _supremum(part))
    narrow = min(weight.shape[0] // part.groups, weight.shape[1])
    rtol = 0.05 if input_shape is not None else min(1.0, max(0.05, narrow / 512))
    return min(convolution_norm_at_most(weight, input_shape, rtol=rtol, **dict(part.geometry)), _supremum(part))
