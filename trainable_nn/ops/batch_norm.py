r"""Batch normalisation with a denominator of our choice, by the kernels of torch's own: no pass over x is added.

    y = gamma (x - mu) / m(s) + beta,   s = (var + eps)^(1/2), mu and var of the batch, channel by channel.

With g the gradient in y, n values of a channel and <.> their mean,

    dx = gamma / m * (g - <g> - k <g (x - mu)> (x - mu)),   k = m'(s) / (s m(s)),    dgamma = n <g (x - mu)> / m,

which is torch's backward with k^(1/2) in the place of its saved 1 / s and gamma / (m k^(1/2)) in that of gamma.
"""

import math
import struct
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from .eager import may_look_at

NO_SLOPE = {torch.float32: 2.0**-40, torch.float64: 2.0**-80}  # s k^(1/2) for 0: what k adds then is below rounding
_HALF = (torch.float16, torch.bfloat16)


def runs_eagerly(x: Tensor, *others: Tensor | None) -> bool:
    """Whether these kernels may run on x: eager, on the CPU, statistics in full precision, more than one value a channel."""
    if forward_ad._current_level >= 0 or not may_look_at(x):
        return False
    channels, dtype, given = x.shape[1:2], x.dtype, False
    wide = torch.float32 if dtype in _HALF else dtype
    for t in others:
        if t is not None:
            given = True
            if t.dtype != wide or t.shape != channels:
                return False
    return wide in NO_SLOPE and (given or dtype == wide) and 0 < channels[0] < x.numel()


def batch_statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor, Tensor]:
    """Mean and variance (over n, not n - 1) of each channel; the running ones move as in torch's layer."""
    if running_mean is None and x.dtype not in NO_SLOPE:  # or they come out in half precision
        running_mean, running_var = torch.zeros(2, x.shape[1])
    return torch.batch_norm_update_stats(x.detach(), running_mean, running_var, momentum)


def largest_inverse(var: Tensor, eps: float) -> float:
    """The largest (var + eps)^(-1/2), rounded as torch's layer rounds what it saves."""
    least = var.amin().item() + eps
    largest = math.nan if math.isnan(least) else 1.0 / math.sqrt(least) if least > 0.0 else math.inf
    if var.dtype == torch.float64 or largest > torch.finfo(torch.float32).max:
        return largest
    return struct.unpack("f", struct.pack("f", largest))[0]


class _Normalised(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, mean, inverse, root_k, formula):
        ctx.save_for_backward(x, weight, bias, mean, inverse, root_k)
        ctx.formula = formula
        scale = inverse if weight is None else weight * inverse
        return torch.native_batch_norm(x, scale, bias, mean, torch.ones_like(mean), False, 0.0, 0.0)[0]

    @staticmethod
    def backward(ctx, g):
        x, weight, bias, mean, inverse, root_k = ctx.saved_tensors
        asked = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # differentiated once more: by the formula
            copies = [t if t is None else t.view_as(t) for t in (x, weight, bias)]
            wanted = [t for t, needed in zip(copies, asked) if needed]
            found = iter(torch.autograd.grad(ctx.formula(*copies), wanted, g, create_graph=True))
            return *(next(found) if needed else None for needed in asked), None, None, None, None
        stretch = inverse / root_k
        scale = stretch if weight is None else weight * stretch
        of_x, of_scale, of_bias = _backward(g, x, scale, None, None, mean, root_k, True, 0.0, asked)
        return of_x, of_scale * stretch if asked[1] else None, of_bias if asked[2] else None, None, None, None, None


_backward = torch.ops.aten.native_batch_norm_backward.default
_record = super(Function, _Normalised).apply  # Function.apply only looks for transforms first; there are none


def normalise_batch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    inverse: Tensor,
    root_k: Tensor,
    formula: Callable[..., Tensor],
) -> Tensor:
    """y for the mean of x itself, 1 / m and k^(1/2) of each channel; ``formula(x, weight, bias)`` is y by operations
    that can be differentiated to any order.

    Shape:
        x: (batch, channels, ...) -> the same.  weight, bias, mean, inverse, root_k: (channels,).
    """
    return _record(x, weight, bias, mean, inverse, root_k, formula)
