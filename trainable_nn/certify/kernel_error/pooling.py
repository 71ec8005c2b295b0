r"""Rounding of max pooling: its values are exact, and where two entries of a window are within their errors either may win.

The gradient of such a window may go to another of its pixels. After a ReLU whole windows are zero, and there it is lost either way;
so what may be misplaced is kept pixel by pixel (``loose``) until a step other than a piecewise linear one.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import UnboundedError
from ..regularity.steps import Kinked
from .rules import Rounding, reach_of
from .states import LOST, UP, Gradients, Value

SUMS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


class MaxPoolRounding(Rounding):
    """nn.MaxPool1d, 2d or 3d."""

    def check(self, step: Kinked) -> None:
        module = step.function
        if getattr(module, "return_indices", True) or set(_each(module.dilation, _axes(step))) != {1}:
            raise UnboundedError(f"{step.path}: nothing bounds the rounding of {step.kind} with dilation or indices. Use none.")

    def slope(self, step: Kinked, position: int) -> float:
        return step.slope

    def forward(self, step: Kinked, inputs: Sequence[Value]) -> np.ndarray:
        return step.slope * inputs[0].error * UP

    def backward(self, step: Kinked, inputs: Sequence[Value], y: Gradients) -> list[np.ndarray]:
        (x,) = inputs
        moved = 0.0 if not self._undecided(step, x, y.size).any() else 4 * step.slope * y.error
        return [(step.slope * y.error + moved) * UP + LOST]

    def loose(self, step: Kinked, x: Value, y: Gradients) -> Tensor | None:
        """Pixel by pixel, what may be misplaced of the gradients of undecided windows; None for nothing."""
        undecided = self._undecided(step, x, y.size)
        lost = y.size * undecided if y.loose is None else (y.size + y.loose) * undecided + y.loose
        if not lost.any():
            return None
        axes, module = _axes(step), step.function
        kernel, stride, padding = (_each(v, axes) for v in (module.kernel_size, module.stride, module.padding))
        with torch.enable_grad():
            point = torch.zeros_like(x.values).requires_grad_()
            sums = SUMS[axes](point, kernel, stride, padding, module.ceil_mode, True)
            back = torch.autograd.grad(sums, point, lost)[0] * float(np.prod(kernel))
        return back * UP

    def _undecided(self, step: Kinked, x: Value, like: Tensor) -> Tensor:
        """Which windows have two entries within their errors of each other."""
        axes, module = _axes(step), step.function
        kernel, stride, padding = (_each(v, axes) for v in (module.kernel_size, module.stride, module.padding))
        if np.prod(kernel) == 1:
            return torch.zeros_like(like, dtype=torch.bool)
        sizes, places = x.values.shape[-axes:], like.shape[-axes:]
        ends = [(o - 1) * s + k - n - p for n, o, k, s, p in zip(sizes, places, kernel, stride, padding)]
        windows = F.pad(x.values, [side for p, end in zip(reversed(padding), reversed(ends)) for side in (p, end)], value=-torch.inf)
        for axis, (k, s) in enumerate(zip(kernel, stride)):
            windows = windows.unfold(like.dim() - axes + axis, k, s)
        two = windows.flatten(like.dim()).topk(2, dim=-1).values
        reach = reach_of(x)
        return (two[..., 0] - two[..., 1] <= 2 * reach) & (reach > 0)


def _axes(step: Kinked) -> int:
    return int(step.kind[-2])


def _each(value, axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else tuple(value)
