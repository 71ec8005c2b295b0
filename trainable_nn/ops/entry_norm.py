r"""Entry normalisation P(w) = gain * w (eps + w^2)^(-1/2) + leak * w, entry by entry.

With t = w eps^(-1/2), r = (1 + t^2)^(-1/2) and y = t r:

    P(w)   = gain y + leak w
    P'(w)  = gain eps^(-1/2) r^3 + leak
    P''(w) = -3 gain eps^(-1) y r^4

Source: paper A, equations (32), (33) and (36); (33) prints the exponent -3/2 where
-5/2 is right. ``csrc/entry_norm.h`` is the same arithmetic for the compiled kernels. The terms
leak w and 0 w let an infinite or NaN weight come out as no number.
"""

import torch
from torch import Tensor

from .differentiable import Formulas, differentiable
from .registry import define_map


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """16-bit entries as float32: all arithmetic is in 32 bits or more."""
    return tuple(t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors)


def _parts(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y and r for every finite x: 1 + t^2 is cut off where r^3 is below the smallest number, and y at 1."""
    most = 2.0**1000 if x.dtype == torch.float64 else 2.0**120
    t = x * eps**-0.5
    r = torch.rsqrt((1.0 + t * t).clamp(max=most))
    return (t * r).clamp(-1.0, 1.0), r


def _value(w: Tensor, eps: float, gain: float, leak: float) -> Tensor:
    (x,) = _wide(w)
    return (gain * _parts(x, eps)[0] + leak * x).to(w.dtype)


def _first(g: Tensor, w: Tensor, eps: float, gain: float, leak: float) -> Tensor:
    h, x = _wide(g, w)
    _, r = _parts(x, eps)
    return (((h * r) * (gain * eps**-0.5 * r)) * r + leak * h + 0.0 * x).to(w.dtype)


def _second(v: Tensor, g: Tensor, w: Tensor, eps: float, gain: float, leak: float) -> Tensor:
    u, h, x = _wide(v, g, w)
    y, r = _parts(x, eps)
    k = eps**-0.5 * r
    return (-3.0 * gain * y * ((u * r) * k) * ((h * r) * k) + 0.0 * x).to(w.dtype)


def _fold_batch(tensors, dims, size):
    """Entrywise: the batch is one more dimension of the tensor."""
    moved = [t.unsqueeze(0) if d is None else t.movedim(d, 0) for t, d in zip(tensors, dims)]
    return torch.broadcast_tensors(*moved), lambda out: out.expand(size, *out.shape[1:])


_formulas = Formulas(_value, _first, _second)
kernels = define_map("entry_norm", "float eps, float gain, float leak", _formulas)

entry_norm = differentiable(_formulas, kernels, _fold_batch)
