"""Normalised weights P(w), differentiable to any order; their constants are checked first."""

import math

import torch
from torch import Tensor

from .. import ops

EPS_RANGE = (1e-30, 1e30)  # eps^(-1/2) and 1 / eps are then normal numbers of float32
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def entry_norm(w: Tensor, eps: float = 1.0, *, gain: float = 1.0, leak: float = 0.0) -> Tensor:
    r"""P(w) = gain * w (eps + w^2)^(-1/2) + leak * w, entry by entry.

    Each entry is below gain + leak * abs(w); its slope lies between leak and gain * eps^(-1/2) + leak.

    Shape:
        w: any -> the same, in w's dtype and memory format; 16-bit entries are computed in float32.
    Cost:
        One pass over memory each for the value, the gradient and the double gradient.
    Raises:
        TypeError: w is not float16, bfloat16, float32 or float64.
        ValueError: eps outside [1e-30, 1e30], gain not positive, leak negative, or one of them not finite.
    Source:
        Paper A, Example A.2, equations (32), (33) and (36); the leak: THEORY 4(a).
    """
    check_weight("entry_norm", w)
    check_constants("entry_norm", eps=eps, gain=gain, leak=leak)
    return ops.entry_norm(w, eps, gain, leak)


def weight_norm(w: Tensor, eps: float = 1.0, dim: int | None = 0, *, gain: float = 1.0) -> Tensor:
    r"""P(w) = gain * w (eps + abs(w_row)^2)^(-1/2): each row is shorter than gain, and a zero row stays zero.

    A row is what one index of dimension ``dim`` selects: an output row of a linear layer, a filter
    of a convolution; with ``dim=None`` the whole tensor is one row. Unlike ``torch._weight_norm``
    no row is divided by zero, and all derivatives exist everywhere.

    Shape:
        w: any with at least one dimension (any at all with dim=None) -> the same, in w's dtype and
        memory format; 16-bit entries are computed in float32.
    Cost:
        One pass over memory each for the value, the gradient and the double gradient.
    Raises:
        TypeError: w is not float16, bfloat16, float32 or float64.
        ValueError: eps outside [1e-30, 1e30], or gain not positive and finite.
        IndexError: w has no dimension ``dim``.
    Source:
        Paper A, Example A.2, equations (30) and (31), Lemma A.7.
    """
    check_weight("weight_norm", w)
    check_constants("weight_norm", eps=eps, gain=gain)
    if dim is None:
        return ops.weight_norm(w.unsqueeze(0), eps, gain).squeeze(0)
    if not -w.dim() <= dim < w.dim():
        raise IndexError(
            f"weight_norm: w has no dimension {dim}, its shape is {tuple(w.shape)}; use dim=None for one norm."
        )
    if dim in (0, -w.dim()):
        return ops.weight_norm(w, eps, gain)
    return ops.weight_norm(w.movedim(dim, 0), eps, gain).movedim(0, dim)


def check_constants(where: str, *, eps: float, gain: float = 1.0, leak: float = 0.0) -> None:
    """Raise ValueError, naming ``where``, unless eps, gain and leak are constants of a normalisation."""
    low, high = EPS_RANGE
    if not low <= eps <= high:  # comparisons only: a compiler may hold these floats as symbols
        raise ValueError(f"{where}: eps must be from {low:g} to {high:g}, got {eps}.")
    if not 0.0 < gain < math.inf:
        raise ValueError(f"{where}: gain must be positive and finite, got {gain}.")
    if not 0.0 <= leak < math.inf:
        raise ValueError(f"{where}: leak must be at least 0 and finite, got {leak}.")


def check_weight(where: str, w: Tensor) -> None:
    if w.dtype not in FLOATS:
        raise TypeError(
            f"{where}: the weight has dtype {w.dtype}, and only float16, bfloat16, float32 and float64 can be "
            f"normalised. Convert it first, for example with .float()."
        )
