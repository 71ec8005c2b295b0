"""Smooth activations with slope at most 1, exact to rounding for every finite number.

The constants of each (its bounds of slope and curvature, with their sources) stand in
``theory.nonlinearities`` and as attributes on the modules. 16-bit inputs of the composed
ones are computed in float32, so phi(0) is what is stated and not its 16-bit rounding.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.eager import may_look_at
from ..theory.nonlinearities import GELU_TO_SLOPE_1, SILU_TO_SLOPE_1
from .normalise import entry_norm

ERF_TO_SLOPE_1 = math.nextafter(math.sqrt(math.pi) / 2, 0.0)  # erf'(0) = 2 / sqrt(pi)


def softplus0(z: Tensor) -> Tensor:
    """ln(1 + e^z) - ln 2: softplus with value 0 at 0.

    ``torch.nn.functional.softplus`` jumps by 2e-9 at its threshold; the logarithm of a sigmoid does not.
    """
    x = _wide(z)
    return (-F.logsigmoid(-x) - math.log(2.0)).to(z.dtype)


def smooth_relu(z: Tensor) -> Tensor:
    """(z + (1 + z^2)^(1/2) - 1) / 2: a smooth ReLU with value 0 at 0 and curvature at most 1/2.

    With a = abs(z), ((1 + z^2)^(1/2) - a) / 2 = 1 / (2 ((1 + z^2)^(1/2) + a)), which nothing cancels.
    """
    x = _wide(z)
    positive = x > 0
    size = torch.where(positive, x, -x)  # abs(x), with the one-sided slope that the branch below wants at 0
    tail = 0.5 / (torch.hypot(size, torch.ones_like(size)) + size)
    return (torch.where(positive, x + (tail - 0.5), tail - 0.5)).to(z.dtype)


def tanh(z: Tensor) -> Tensor:
    """tanh(z)."""
    return torch.tanh(z)


def gelu1(z: Tensor) -> Tensor:
    """z Phi(z) / 1.12890...: GELU divided by its largest slope."""
    if _all_within(z, 40.0):  # a third of the time, forward and backward, and the same numbers
        return GELU_TO_SLOPE_1 * F.gelu(z)
    return GELU_TO_SLOPE_1 * torch.where(z > 40, z, F.gelu(z.clamp(-40, 40)))  # past 40 exact; squares overflow later


def silu1(z: Tensor) -> Tensor:
    """z / (1 + e^(-z)) / 1.09984...: SiLU divided by its largest slope."""
    return SILU_TO_SLOPE_1 * F.silu(z)


def erf1(z: Tensor) -> Tensor:
    """(pi^(1/2) / 2) erf(z): the error function divided by its slope at 0."""
    return ERF_TO_SLOPE_1 * torch.erf(z.clamp(-28, 28))  # past 28 even the slope e^(-784) is zero


def arctan(z: Tensor) -> Tensor:
    """arctan(z)."""
    return torch.atan(z)


def softsign(z: Tensor) -> Tensor:
    """z / (1 + abs(z)): slope 1 at 0; its slope is Lipschitz but not differentiable at 0."""
    return F.softsign(z)


def isru(z: Tensor) -> Tensor:
    """z (1 + z^2)^(-1/2), the inverse square root unit: entry normalisation with eps = 1, by the same kernels."""
    return entry_norm(z, 1.0)


def _all_within(z: Tensor, bound: float) -> bool:
    """Whether all entries are known to lie in [-bound, bound]."""
    if z.dtype not in (torch.float32, torch.float64) or not may_look_at(z) or z.numel() == 0:
        return False
    least, most = z.detach().aminmax()
    return -bound <= least.item() and most.item() <= bound  # not where one is NaN


def _wide(z: Tensor) -> Tensor:
    return z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
