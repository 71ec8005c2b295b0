r"""Entry normalisation P(w) = gain * w (eps + w^2)^(-1/2) + leak * w, entry by entry.

With t = w eps^(-1/2), r = (1 + t^2)^(-1/2) and y = t r:

    P(w)   = gain y + leak w
    P'(w)  = gain eps^(-1/2) r^3 + leak
    P''(w) = -3 gain eps^(-1) y r^4

Source: paper A, equations (32), (33) and (36); (33) prints the exponent -3/2 where
-5/2 is right. ``csrc/entry_norm.h`` is the same arithmetic for the compiled kernels.
"""

import torch
from torch import Tensor

from .differentiable import Formulas, Kernels, differentiable
from .registry import define, like


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """16-bit entries as float32: all arithmetic is in 32 bits or more."""
    return tuple(t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors)


def _scaled(w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """t and r for every finite w: t^2 never overflows, and r never loses its digits.

    Past |t| = 2^40 (2^300 in float64) one is nothing beside t^2, and t is first made
    smaller by a power of two. Past 2^100 (2^900) r^3 is zero in any case.
    """
    double = w.dtype == torch.float64
    end, far, small = (2.0**900, 2.0**300, 2.0**-500) if double else (2.0**100, 2.0**40, 2.0**-60)
    t = (w * eps**-0.5).clamp(-end, end)
    scale = torch.where(t.abs() > far, small, 1.0).to(w.dtype)
    return t, scale * torch.rsqrt(scale * scale + (t * scale).square())


def _value(w: Tensor, eps: float, gain: float, leak: float) -> Tensor:
    (x,) = _wide(w)
    end = 2.0**28 if w.dtype == torch.float64 else 2.0**14  # past it P is gain * sign(w) to the last bit
    t = (x * eps**-0.5).clamp(-end, end)
    return (gain * (t * torch.rsqrt(1.0 + t * t)) + leak * x).to(w.dtype)  # 0 inf = NaN: inf is not hidden


def _first(g: Tensor, w: Tensor, eps: float, gain: float, leak: float) -> Tensor:
    h, x = _wide(g, w)
    _, r = _scaled(x, eps)
    slope = ((h * r) * (eps**-0.5 * r)) * r
    return (gain * slope + leak * h + 0.0 * x).to(w.dtype)


def _second(v: Tensor, g: Tensor, w: Tensor, eps: float, gain: float, leak: float) -> Tensor:
    u, h, x = _wide(v, g, w)
    t, r = _scaled(x, eps)
    k = eps**-0.5 * r
    return (-3.0 * gain * (t * r) * ((u * r) * k) * ((h * r) * k) + 0.0 * x).to(w.dtype)


def _both(v: Tensor, g: Tensor, w: Tensor, eps: float, gain: float, leak: float) -> tuple[Tensor, Tensor]:
    constants = (eps, gain, leak)
    return like(w, _first(v, w, *constants)), like(w, _second(v, g, w, *constants))


_CONSTANTS = "float eps, float gain, float leak"

_kernels = Kernels(
    value=define(
        f"entry_norm(Tensor w, {_CONSTANTS}) -> Tensor",
        lambda w, *constants: like(w, _value(w, *constants)),
        lambda w, *constants: torch.empty_like(w),
    ),
    first=define(
        f"entry_norm_backward(Tensor g, Tensor w, {_CONSTANTS}) -> Tensor",
        lambda g, w, *constants: like(w, _first(g, w, *constants)),
        lambda g, w, *constants: torch.empty_like(w),
    ),
    second=define(
        f"entry_norm_double_backward(Tensor v, Tensor g, Tensor w, {_CONSTANTS}) -> (Tensor, Tensor)",
        _both,
        lambda v, g, w, *constants: (torch.empty_like(w), torch.empty_like(w)),
    ),
)


def _fold_batch(tensors, dims, size):
    """Entrywise: the batch is one more dimension of the tensor."""
    moved = [t.unsqueeze(0) if d is None else t.movedim(d, 0) for t, d in zip(tensors, dims)]
    return torch.broadcast_tensors(*moved), lambda out: out.expand(size, *out.shape[1:])


entry_norm = differentiable(Formulas(_value, _first, _second), _kernels, _fold_batch)
