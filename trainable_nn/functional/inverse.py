"""The free weight w whose normalisation P(w) is a given weight p, computed in float64."""

import math

import torch
from torch import Tensor

from ..errors import ConversionError
from .normalise import check_constants, check_weight

NEWTON_STEPS = 400
TINY = torch.finfo(torch.float64).tiny


def entry_norm_inverse(
    p: Tensor,
    eps: float = 1.0,
    *,
    gain: float = 1.0,
    leak: float = 0.0,
    nearest: bool = False,
    where: str = "entry_norm_inverse",
) -> Tensor:
    r"""w with gain * w (eps + w^2)^(-1/2) + leak * w = p, entry by entry.

    Without a leak w = sqrt(eps) p / ((gain - p) (gain + p))^(1/2), for abs(p) < gain. With one, P reaches
    every number, and Newton's method climbs to w from below: P is concave on w > 0, so no step passes it.

    Shape:
        p: any -> the same, in p's dtype and memory format.
    Raises:
        ConversionError: an entry is NaN or infinite, or is not below gain and ``nearest`` is False;
        with ``nearest=True`` such an entry gets the largest value below gain that p's dtype tells apart.
    """
    check_weight(where, p)
    check_constants(where, eps=eps, gain=gain, leak=leak)
    _check_finite(where, p)
    size = p.detach().double().abs()
    if leak > 0:
        w = _climb(size, eps, gain, leak)
    else:
        if nearest:
            size = size.clamp(max=_largest(gain, p.dtype))
        _check_range(where, "entry", size, gain)
        w = _stretch(size, eps, gain) * size
    return torch.copysign(w, p.detach().double()).to(p.dtype)


def weight_norm_inverse(
    p: Tensor, eps: float = 1.0, *, gain: float = 1.0, nearest: bool = False, where: str = "weight_norm_inverse"
) -> Tensor:
    r"""w with gain * w (eps + abs(w_row)^2)^(-1/2) = p, row by row: w = sqrt(eps) p (gain^2 - abs(p_row)^2)^(-1/2).

    Shape:
        p: any with at least one dimension -> the same, in p's dtype and memory format; rows are dimension 0.
    Raises:
        ConversionError: an entry is NaN or infinite, or a row is not shorter than gain and ``nearest`` is
        False; with ``nearest=True`` such a row is shortened to the largest length below gain.
    """
    check_weight(where, p)
    check_constants(where, eps=eps, gain=gain)
    _check_finite(where, p)
    wide = p.detach().double()
    if p.numel() == 0:
        return p.detach().clone()
    axes = tuple(range(1, p.dim()))
    most = wide.abs().amax(axes, keepdim=True) if axes else wide.abs()
    unit = wide / most.clamp(min=TINY)
    length = most * (unit.square().sum(axes, keepdim=True).sqrt() if axes else unit.abs())
    if nearest:
        reached = length.clamp(max=_largest(gain, p.dtype))
        wide, length = wide * (reached / length.clamp(min=TINY)), reached
    _check_range(where, "row", length, gain)
    return (_stretch(length, eps, gain) * wide).to(p.dtype)


def _largest(gain: float, dtype: torch.dtype) -> float:
    """The largest value below gain that is told apart from it in that dtype."""
    return gain * (1.0 - torch.finfo(dtype).eps)


def _stretch(size: Tensor, eps: float, gain: float) -> Tensor:
    """w / p = sqrt(eps) (gain^2 - size^2)^(-1/2), the difference without cancellation."""
    return math.sqrt(eps) / gain * torch.rsqrt(((gain - size) / gain) * (1.0 + size / gain))


def _climb(p: Tensor, eps: float, gain: float, leak: float) -> Tensor:
    """Newton's method for w >= 0, from the larger of two lower bounds of w."""
    slope = gain / math.sqrt(eps)
    w = torch.maximum(p / (leak + slope), (p - gain) / leak)
    for _ in range(NEWTON_STEPS):
        r = torch.rsqrt(1.0 + (w / math.sqrt(eps)).square())
        better = w + (p - (slope * w * r + leak * w)) / (slope * r**3 + leak)
        if not bool((better > w).any()):
            break
        w = torch.maximum(better, w)
    return w


def _check_finite(where: str, p: Tensor) -> None:
    if p.is_meta:
        raise ConversionError(f"{where}: the weight is on the meta device, and its values are needed. Load them first.")
    if not bool(torch.isfinite(p).all()):
        raise ConversionError(
            f"{where}: the weight has entries that are NaN or infinite. Load weights that are finite."
        )


def _check_range(where: str, what: str, size: Tensor, gain: float) -> None:
    if size.numel() == 0 or float(size.max()) < gain:
        return
    largest = float(size.max())
    index = torch.unravel_index(size.argmax(), size.shape)
    place = tuple(int(i) for i in index) if what == "entry" else int(index[0])
    kind = {"entry": "absolute value", "row": "length", "group": "norm bound"}[what]
    raise ConversionError(
        f"{where}: {what} {place} of the weight has {kind} {largest:.6g}, and gain={gain:g} reaches only what is below "
        f"it. Use gain={sufficient_gain(largest):.3g}, or nearest=True for the nearest weight in range."
    )


def sufficient_gain(largest: float) -> float:
    """A short number well above the largest entry or row, so that the free weight stays of moderate size."""
    return float(f"{1.26 * largest:.3g}")
