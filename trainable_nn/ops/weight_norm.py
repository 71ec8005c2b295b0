r"""Weight normalisation P(w) = gain * w (eps + |w_row|^2)^(-1/2); a row is an index of dimension 0.

With rho = (eps + |w|^2)^(-1/2) and n = rho w, row by row:

    DP(w) g                        = gain rho (g - n <n, g>)
    gradient in w of <v, DP(w) g>  = gain rho^2 (n (3 a b - c) - b v - a g),  a = <n, v>, b = <n, g>, c = <v, g>

Source: paper A, equations (30) and (31), Lemma A.7. ``csrc/weight_norm.h`` is the same
arithmetic for the compiled kernels. All of it is in float64, so that the radial part of
DP(w) g, a difference of nearly equal numbers, keeps its digits.
"""

import math

import torch
from torch import Tensor

from .differentiable import Formulas, differentiable
from .registry import define_map


def _unit(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """n, rho * scale and scale, row by row; scaled so that no square overflows.

    The scale is a constant to autograd: no value depends on it.
    """
    if x.numel() == 0:
        return x, x, torch.ones((), dtype=x.dtype, device=x.device)
    axes = tuple(range(1, x.dim()))
    largest = x.detach().abs().amax(axes, keepdim=True) if axes else x.detach().abs()
    scale = largest.clamp(min=math.sqrt(eps))
    u = x / scale
    length = u.square().sum(axes, keepdim=True) if axes else u.square()
    rho = torch.rsqrt((math.sqrt(eps) / scale).square() + length)
    return u * rho, rho, scale


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In float64, or in float32 where the device has no more."""
    widest = torch.float32 if tensors[0].device.type == "mps" else torch.float64
    return tuple(t.to(widest) for t in tensors)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    axes = tuple(range(1, a.dim()))
    return (a * b).sum(axes, keepdim=True) if axes else a * b


def _value(w: Tensor, eps: float, gain: float) -> Tensor:
    (x,) = _wide(w)
    return (gain * _unit(x, eps)[0]).to(w.dtype)


def _first(g: Tensor, w: Tensor, eps: float, gain: float) -> Tensor:
    h, x = _wide(g, w)
    n, rho, scale = _unit(x, eps)
    return (gain * rho * (h - n * _dot(n, h)) / scale).to(w.dtype)


def _second(v: Tensor, g: Tensor, w: Tensor, eps: float, gain: float) -> Tensor:
    u, h, x = _wide(v, g, w)
    n, rho, scale = _unit(x, eps)
    a, b, c = _dot(n, u), _dot(n, h), _dot(u, h)
    return (gain * (n * (3.0 * a * b - c) - b * u - a * h) * (rho / scale) * (rho / scale)).to(w.dtype)


def _fold_batch(tensors, dims, size):
    """Rows are independent: the batch is more rows."""
    moved = [t.unsqueeze(0) if d is None else t.movedim(d, 0) for t, d in zip(tensors, dims)]
    moved = torch.broadcast_tensors(*moved)
    folded = tuple(t.flatten(0, 1) for t in moved)
    return folded, lambda out: out.unflatten(0, moved[0].shape[:2]).expand(size, *moved[0].shape[1:])


_formulas = Formulas(_value, _first, _second)
kernels = define_map("weight_norm", "float eps, float gain", _formulas)
weight_norm = differentiable(_formulas, kernels, _fold_batch)
