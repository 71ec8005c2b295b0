r"""The proved bound of an operator norm as a function of the weight: its value, and its exact subgradient.

The bound is a factor times a largest singular value s of one matrix M that is linear in the kernel: the symbol at the
grid's peak, or the kernel as a matrix; no channel is held to the pixels here (``channel_box``), and no small
convolution is taken as a matrix of pixels (``dense_norm``). With M v = s u, the
derivative of s along dM is Re u^* dM v; where s is not simple, any of its pairs (u, v) gives a subgradient. The level is
taken so narrow that the peak is the grid's greatest but for 1e-7.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .definite import top_vector
from .layers import Convolution, read_layer, read_weight, sizes_of, weight_of
from .norm import matrix_norm_at_most
from .operator_norm import Attained, attained_bound
from .without_autocast import without_autocast

NARROW = 1e-7  # relative: of the level above the peak
SLACK = 1e-3  # what operator_norm_at_most spends on a grid by default


@without_autocast
def differentiable_norm_at_most(conv_or_weight, input_shape: Sequence[int] | None, **arguments) -> Tensor:
    """``operator_norm_at_most`` of a layer, or ``convolution_norm_at_most`` of a weight, that autograd differentiates.

    A float64 scalar on the weight's device: a proved bound of the values that the weight has now; ``operator_norm_at_most`` is a
    few percent less on small images, and up to half where pixels are copied, since it takes a small matrix as it is. Its gradient is an exact
    subgradient of the bound's formula, so a descent along it lowers the bound. Gradients flow through parametrisations
    and ``effective_weight()``. The work itself is done on the CPU; only the weight and its gradient travel.

    Shape:
        input_shape: as for ``operator_norm_at_most``; arguments: stride, padding, dilation, groups, padding_mode of a weight.
    Cost:
        Up to twice ``operator_norm_at_most``, for the narrower level.
    Raises:
        What the two functions raise. RuntimeError: the gradient is differentiated again.
    """
    if isinstance(conv_or_weight, nn.Module):
        if arguments:
            raise TypeError(
                f"differentiable_norm_at_most: {', '.join(arguments)} was given beside a "
                f"{type(conv_or_weight).__name__}, which has its own. Leave it out, or pass the weight."
            )
        layer, weight = read_layer(conv_or_weight, input_shape), weight_of(conv_or_weight)
    else:
        layer, weight = _read(conv_or_weight, input_shape, **arguments), conv_or_weight
    return _Bound.apply(weight, layer)


def _read(
    weight: Tensor, input_shape, *, stride=1, padding=0, dilation=1, groups: int = 1, padding_mode: str = "zeros"
) -> Convolution:
    matrices = read_weight(weight, groups, "differentiable_norm_at_most")
    sizes = sizes_of(input_shape, weight.dim() - 2, groups * weight.shape[1], "differentiable_norm_at_most")
    return Convolution.from_arguments(matrices, sizes, stride, padding, dilation, padding_mode)


class _Bound(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, layer: Convolution | Tensor) -> Tensor:
        if isinstance(layer, Tensor):
            one = np.zeros((1, 0), dtype=np.int64)
            attained = Attained(matrix_norm_at_most(layer, rtol=NARROW), 0, np.arange(1), one, (), None)
            kernel = layer[None, :, :, None]
        else:
            attained, kernel = attained_bound(layer, SLACK, NARROW), layer.kernel
        ctx.attained, ctx.kernel, ctx.weight = attained, kernel, (weight.shape, weight.dtype, weight.device)
        return torch.tensor(attained.bound, dtype=torch.float64, device=weight.device)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        shape, dtype, device = ctx.weight
        found = _gradient(ctx.attained, ctx.kernel).reshape(shape)
        return (float(gradient) * found).to(device, dtype), None


def _gradient(attained: Attained, kernel: Tensor) -> Tensor:
    """d bound / d kernel, of the kernel's shape."""
    whole = kernel.new_zeros(kernel.shape).contiguous()
    if not 0.0 < attained.bound < math.inf:
        return whole
    taps = kernel[attained.group].flatten(2)[..., attained.taps]  # (rows, columns, taps)
    exponent = math.frexp(float(taps.abs().max()))[1]
    taps = torch.ldexp(taps, torch.tensor(-exponent, device="cpu"))
    phases, waves = attained.waves()
    rows, columns, _ = taps.shape
    m = torch.zeros(rows, max(phases) + 1, columns, dtype=torch.complex128, device="cpu")
    for tap, phase in enumerate(phases):
        m[:, phase] += waves[tap] * taps[..., tap]
    u, s, v = _top(m.flatten(1))
    v = v.reshape(-1, columns)
    parts = [(u.conj()[:, None] * v[phase] * waves[tap]).real for tap, phase in enumerate(phases)]
    factor = math.ldexp(attained.bound, -exponent) / s
    whole[attained.group].flatten(2)[..., attained.taps] = factor * torch.stack(parts, -1)  # a view of what is contiguous
    return whole


def _top(m: Tensor) -> tuple[Tensor, float, Tensor]:
    """(u, s, v) with m v = s u, of the largest s."""
    wide = m.shape[0] <= m.shape[1]
    gram = m @ m.mH if wide else m.mH @ m
    largest = float(torch.linalg.eigvalsh(gram)[-1])
    first = top_vector(gram, largest * (1 + 1e-10))[:, 0]
    other = (m.mH if wide else m) @ first
    s = float(torch.linalg.vector_norm(other))
    u, v = (first, other / s) if wide else (other / s, first)
    return u, s, v
