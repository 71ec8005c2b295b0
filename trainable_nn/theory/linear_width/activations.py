"""The smooth activations as functions of float64 arrays, with the derivative; their constants are NONLINEARITIES'."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import OptionError
from ..nonlinearities import GELU_TO_SLOPE_1, LN2, NONLINEARITIES, SILU_TO_SLOPE_1, Nonlinearity


def _softplus(z: Tensor) -> Tensor:
    return torch.logaddexp(z, torch.zeros_like(z))  # torch's own jumps by 2e-9 at its threshold


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softplus": _softplus,
    "softplus0": lambda z: _softplus(z) - LN2,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda z: nn.functional.gelu(z, approximate="tanh"),
    "gelu1": lambda z: nn.functional.gelu(z) * GELU_TO_SLOPE_1,
    "silu": nn.functional.silu,
    "silu1": lambda z: nn.functional.silu(z) * SILU_TO_SLOPE_1,
    "mish": lambda z: z * torch.tanh(_softplus(z)),
    "elu": nn.functional.elu,
    "erf1": lambda z: torch.erf(z) * (math.sqrt(math.pi) / 2),
    "arctan": torch.arctan,
    "softsign": lambda z: z / (1 + z.abs()),
    "isru": lambda z: z * (1 + z * z).rsqrt(),
    "smooth_relu": lambda z: (z + (1 + z * z).sqrt() - 1) / 2,
}


def nonlinearity_called(name: str) -> Nonlinearity:
    """Constants of a smooth activation; an OptionError where the name is unknown or its slope jumps."""
    if name not in FUNCTIONS:
        raise OptionError(
            f"linear_width: no smooth activation is called {name!r}; the theory needs one whose slope does not jump. "
            f"Take one of {', '.join(FUNCTIONS)}."
        )
    return NONLINEARITIES[name]


def value_and_slope(name: str, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """phi(z) and phi'(z), entry by entry, in float64."""
    value, slope, _ = _derivatives(name, z, order=1)
    return value, slope


def value_slope_and_bend(name: str, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """phi(z), phi'(z) and phi''(z), entry by entry, in float64."""
    return _derivatives(name, z, order=2)


def _derivatives(name: str, z: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    nonlinearity_called(name)
    with torch.enable_grad():
        at = torch.tensor(np.asarray(z, dtype=np.float64), requires_grad=True)
        value = FUNCTIONS[name](at)
        (slope,) = torch.autograd.grad(value.sum(), at, create_graph=order == 2)
        bend = torch.autograd.grad(slope.sum(), at)[0].numpy() if order == 2 else None
    return value.detach().numpy(), slope.detach().numpy(), bend
