"""The rows of a convolution's weight: its patches and its output gradients in factors, or made by its own pass."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .features import Factors, Features, Gradients, Rows
from .graph import Slot
from .layout import Layout
from .windows import Windows

PIECE = 2**21  # bytes of a layer's input at once
MANY = 4  # positions for each output channel from which patches cost more to lay out than a convolution's own way


def convolution(slot: Slot, gradients: Gradients, layout: Layout) -> Features | None:
    node = slot.node
    if slot.index == 2:
        return Rows(torch.stack([layout.by_sample(g).flatten(3).sum((1, 3)) for g in gradients], 1))
    if slot.index != 1:
        return None
    groups, x, weight = node._saved_groups, node._saved_input, node._saved_weight
    taps = tuple(weight.shape[2:])
    geometry = (taps, node._saved_stride, node._saved_padding, node._saved_dilation)
    x = layout.by_sample(x)
    each = [layout.by_sample(g) for g in gradients]
    shape = weight.shape

    if not node._saved_transposed:
        wide, positions = shape[1] * math.prod(taps), each[0].shape[1] * math.prod(each[0].shape[3:])
        narrow = shape[0] // groups

        def a(samples: slice) -> Tensor:
            return _patches(x[samples], groups, *geometry, each[0].shape[3:])

        def b(samples: slice, columns: slice = slice(None)) -> Tensor:
            return _stacked([_positions(g[samples], groups)[:, :, columns] for g in each], 2)

        factors = Factors(a, b, groups, wide, narrow, positions, len(each), lambda r: r.reshape(len(r), *shape))
        if x.shape[1] == 1:
            windows = Windows(x[:, 0], groups, *geometry, tuple(each[0].shape[3:]))
            factors.parts, factors.count_parts = windows.parts, taps[0]
            if groups == 1:
                factors.meets, factors.width_meets = windows.meets, windows.width_meets
            if groups == 1 and MANY * narrow <= positions and _is_quick(x):
                factors.whole = lambda samples, o: _whole(node, x[samples, 0], [g[samples, 0, o] for g in each])
        return factors

    wide, positions = shape[1] * math.prod(taps), x.shape[1] * math.prod(x.shape[3:])

    def patches_of_gradients(samples: slice, columns: slice = slice(None)) -> Tensor:
        return torch.stack([_patches(g[samples], groups, *geometry, x.shape[3:])[:, :, columns] for g in each], 2)

    return Factors(
        lambda samples: _positions(x[samples], groups),
        patches_of_gradients,
        groups,
        shape[0] // groups,
        wide,
        positions,
        len(each),
        lambda r: r.mT.reshape(len(r), *shape),
    )


def _stacked(tensors: list[Tensor], axis: int) -> Tensor:
    """Without a copy of a single one."""
    return tensors[0].unsqueeze(axis) if len(tensors) == 1 else torch.stack(tensors, axis)


def _is_quick(x: Tensor) -> bool:
    """Whether convolutions run in oneDNN, and so don't unfold."""
    return x.dtype is torch.float32 and x.is_cpu and torch.backends.mkldnn.is_available()


def _whole(node, x: Tensor, gradients: Gradients) -> Tensor:
    """Rows (m, K, O D) of a convolution's weight by its own backward pass, in which every sample is a group."""
    shape, outputs = node._saved_weight.shape, len(gradients)
    numbers = gradients[0].shape[1] * shape[1:].numel()
    found = x.new_empty(len(x), outputs, numbers)
    step = max(1, PIECE // (max(x[0].numel(), outputs * numbers) * x.element_size() + 1))
    for start in range(0, len(x), step):
        part = x[start : start + step]
        g = _stacked([g[start : start + step] for g in gradients], 1)
        rows = torch.ops.aten.convolution_backward(
            g.reshape(1, -1, *g.shape[3:]),
            part.reshape(1, -1, *part.shape[2:]),
            x.new_empty(()).expand(g.shape[:3].numel(), *shape[1:]),
            None,
            node._saved_stride,
            node._saved_padding,
            node._saved_dilation,
            False,
            node._saved_output_padding,
            len(part),
            [False, True, False],
        )[1]
        found[start : start + step] = rows.reshape(len(part), outputs, -1)
    return found


def _positions(x: Tensor, groups: int) -> Tensor:
    """(m, r, C, sizes...) as (m, groups, C / groups, r * positions)."""
    m, r, channels = x.shape[:3]
    x = x.reshape(m, r, groups, channels // groups, -1)
    return x.permute(0, 2, 3, 1, 4).reshape(m, groups, channels // groups, -1)


def _patches(x: Tensor, groups: int, taps, stride, padding, dilation, sizes) -> Tensor:
    """(m, r, C, sizes...) as (m, groups, C / groups * taps, r * positions): what each position of the output reads."""
    m, r, channels = x.shape[:3]
    x = x.flatten(0, 1)
    if any(padding):
        x = F.pad(x, [side for p in reversed(padding) for side in (p, p)])
    x = x.contiguous()
    steps = x.stride()
    view = x.as_strided(
        (m, r, groups, channels // groups, *taps, *sizes),
        (
            r * steps[0],
            steps[0],
            channels // groups * steps[1],
            steps[1],
            *(d * s for d, s in zip(dilation, steps[2:])),
            *(e * s for e, s in zip(stride, steps[2:])),
        ),
    )
    axes = len(taps)
    inner = tuple(range(3, 4 + axes))
    outer = tuple(range(4 + axes, 4 + 2 * axes))
    return view.permute(0, 2, *inner, 1, *outer).reshape(m, groups, channels // groups * math.prod(taps), -1)
