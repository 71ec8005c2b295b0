"""The linear part of a step at the centre of the ray, with another weight or with absolute values in its place."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..regularity.affine import Affine
from ..regularity.elementwise import Elementwise
from ..regularity.steps import FixedLinear, Step, Sum


def apply_weight(step: Affine, weight: Tensor, x: Tensor) -> Tensor:
    """The layer's linear map with another weight."""
    kept = step.weight
    step.weight = weight
    try:
        return step.linear(x)
    finally:
        step.weight = kept


def absolute(step: Step, bound: Tensor, position: int, centre: Tensor) -> Tensor:
    r"""\|A\| bound, for A the Jacobian in the input at this position, where it is ``centre``."""
    if isinstance(step, Sum):
        return abs(step.scales[position]) * bound
    if isinstance(step, Elementwise):
        return step._derivatives(centre)[0].abs() * bound
    if isinstance(step, Affine):
        return apply_weight(step, step.weight.abs(), bound)
    return _with_absolute_kernel(step)(bound)


def _with_absolute_kernel(step: FixedLinear):
    """A map without a kernel of its own has no entry below 0."""
    function = step.function
    if isinstance(function, partial) and "kernel" in function.keywords:
        return partial(function.func, kernel=function.keywords["kernel"].abs())
    return function


def keeps_samples(step: Step, x: Tensor) -> bool:
    """Whether a linear map takes samples one by one: then, and for almost no other, A (w x) = w A x for weights w."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=x.dtype)
    weights, values = draw(len(x)), draw(x.shape)
    by_sample = lambda t: weights.reshape(-1, *(1,) * (t.dim() - 1)) * t
    once = step.linear(by_sample(values))
    if once.dim() == 0 or len(once) != len(x):
        return False
    return bool(torch.allclose(once, by_sample(step.linear(values)), rtol=1e-9, atol=1e-9))
