"""What the known operations of torch give: the rows of their weights in factors, and the gradient of their data alone.

Each rule reads what autograd saved for the operation. A rule that cannot answer returns None, and the general way is
taken: the operation's own backward pass on the gradient of each sample alone.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .convolution import PIECE, convolution
from .features import Factors, Features, Gradients, Rows
from .graph import Slot, output_shapes
from .layout import Layout


def matrix_product(slot: Slot, gradients: Gradients, layout: Layout) -> Features | None:
    """x W with the weight behind: MmBackward0, and AddmmBackward0 with its bias in front."""
    node = slot.node
    added = node.name() == "AddmmBackward0"
    each = [layout.by_sample(g) for g in gradients]
    if added and slot.index == 0:
        if output_shapes(slot.edge[0])[slot.edge[1]] != each[0].shape[2:]:
            return None
        return Rows(torch.stack([g.sum(1) for g in each], 1) * node._saved_beta)
    if slot.index != (2 if added else 1):
        return None
    x = layout.by_sample(node._saved_mat1 if added else node._saved_self)
    scale = node._saved_alpha if added else 1

    def b(samples: slice, columns: slice = slice(None)) -> Tensor:
        found = torch.stack([g[samples, :, columns].mT for g in each], 1).unsqueeze(1)
        return found if scale == 1 else found * scale

    def a(samples: slice) -> Tensor:
        return x[samples].mT.unsqueeze(1)

    return Factors(a, b, 1, x.shape[2], each[0].shape[2], x.shape[1], len(each), lambda r: r.squeeze(1).mT)


def embedding(slot: Slot, gradients: Gradients, layout: Layout) -> Features | None:
    node = slot.node
    if node._saved_scale_grad_by_freq or node._saved_sparse:
        return None
    ids = layout.by_sample(node._saved_indices).flatten(1)
    size, skipped = int(node._saved_weight_sym_argsize_0), int(node._saved_padding_idx)
    skipped = skipped - 2**64 if skipped >= 2**63 else skipped
    counts = ids != skipped  # (n, T)
    each = [layout.by_sample(g).reshape(*ids.shape, -1) * counts.unsqueeze(2) for g in gradients]

    def a(samples: slice) -> Tensor:
        return F.one_hot(ids[samples], size).to(each[0].dtype).mT.unsqueeze(1)

    def b(samples: slice, columns: slice = slice(None)) -> Tensor:
        return torch.stack([g[samples, :, columns].mT for g in each], 1).unsqueeze(1)

    def meets(left: slice, right: slice) -> Tensor:
        return (ids[left].T[:, :, None, None] == ids[right].T).to(each[0].dtype)

    positions = ids.shape[1]
    width = each[0].shape[2]
    return Factors(a, b, 1, size, width, positions, len(each), lambda r: r.squeeze(1).mT, meets=meets)


def normalised(slot: Slot, gradients: Gradients, layout: Layout) -> Features | None:
    """Scale and shift of batch normalisation in evaluation mode, group and layer normalisation."""
    node = slot.node
    if slot.index not in (1, 2):
        return None
    shape = output_shapes(slot.edge[0])[slot.edge[1]]
    if slot.index == 1 and node.name() == "NativeBatchNormBackward0":
        return _batch_norm_scale(node, gradients, layout)
    hat = _standardised(node) if slot.index == 1 else None
    if slot.index == 1 and hat is None or getattr(node, "_saved_training", False):
        return None
    rows = []
    for g in gradients:
        terms = layout.by_sample(g if hat is None else g * hat)
        if node.name() == "NativeLayerNormBackward0":
            rows.append(terms.reshape(layout.count, -1, shape.numel()).sum(1).reshape(-1, *shape))
        else:
            rows.append(terms.flatten(3).sum((1, 3)) if terms.dim() > 3 else terms.sum(1))
    return Rows(torch.stack(rows, 1))


def _standardised(node) -> Tensor | None:
    x = node._saved_input
    if node.name() == "NativeLayerNormBackward0":
        return (x - node._saved_result1) * node._saved_result2
    if node.name() == "NativeGroupNormBackward0":
        groups = x.reshape(len(x), node._saved_group, -1)
        hat = (groups - node._saved_result1.unsqueeze(2)) * node._saved_result2.unsqueeze(2)
        return hat.reshape(x.shape)
    return None


def _batch_norm_scale(node, gradients: Gradients, layout: Layout) -> Rows | None:
    """A few samples at a time, for the cache and the heap."""
    if node._saved_training or node._saved_running_mean is None:
        return None
    x = layout.by_sample(node._saved_input)
    shape = (-1, *(1,) * (x.dim() - 3))
    mean = node._saved_running_mean.reshape(shape)
    scale = (node._saved_running_var.reshape(shape) + node._saved_eps).rsqrt()
    step = max(1, PIECE // (x[0].numel() * x.element_size() + 1))
    rows: list[list[Tensor]] = [[] for _ in gradients]
    for start in range(0, len(x), step):
        hat = (x[start : start + step] - mean) * scale
        for found, g in zip(rows, gradients):
            found.append((layout.by_sample(g)[start : start + step] * hat).reshape(*hat.shape[:3], -1).sum((1, 3)))
    return Rows(torch.stack([torch.cat(found) for found in rows], 1))


def sum_or_product(slot: Slot, gradients: Gradients, layout: Layout) -> Features | None:
    """A parameter that is added to, subtracted from, or multiplied with every sample: broadcast, and so summed over."""
    node, name = slot.node, slot.node.name()
    shape, whole = output_shapes(slot.edge[0])[slot.edge[1]], gradients[0].shape
    aligned = (1,) * (len(whole) - len(shape)) + tuple(shape)
    if layout.axis != 0 or aligned[0] != 1:
        return None
    factor: Tensor | float = 1.0
    if name == "MulBackward0":
        factor = node._saved_other if slot.index == 0 else node._saved_self
        if not isinstance(factor, Tensor):
            return None
    elif slot.index == 1:
        factor = node._saved_alpha * (-1 if name == "SubBackward0" else 1)
    summed = [axis + 1 for axis, size in enumerate(aligned) if axis and size == 1]
    rows = [layout.by_sample(g * factor).sum([1, *summed]) for g in gradients]
    return Rows(torch.stack(rows, 1).reshape(layout.count, len(gradients), *shape))


RULES: dict[str, Callable[[Slot, Gradients, Layout], Features | None]] = {
    "ConvolutionBackward0": convolution,
    "AddmmBackward0": matrix_product,
    "MmBackward0": matrix_product,
    "EmbeddingBackward0": embedding,
    "NativeBatchNormBackward0": normalised,
    "NativeLayerNormBackward0": normalised,
    "NativeGroupNormBackward0": normalised,
    "AddBackward0": sum_or_product,
    "SubBackward0": sum_or_product,
    "MulBackward0": sum_or_product,
}


def convolution_data(node, g: Tensor) -> Tensor:
    x = node._saved_input
    return torch.ops.aten.convolution_backward(
        g,
        x,
        node._saved_weight,
        None,
        node._saved_stride,
        node._saved_padding,
        node._saved_dilation,
        node._saved_transposed,
        node._saved_output_padding,
        node._saved_groups,
        [True, False, False],
    )[0]


def batch_norm_data(node, g: Tensor) -> Tensor:
    x, gamma = node._saved_input, node._saved_weight
    scale = (node._saved_running_var + node._saved_eps).rsqrt()
    scale = scale if gamma is None else scale * gamma.detach()
    return g * scale.reshape(1, -1, *(1,) * (x.dim() - 2))


def matrix_product_data(node, g: Tensor) -> Tensor:
    found = g @ node._saved_mat2.detach().mT
    return found * node._saved_alpha if node.name() == "AddmmBackward0" else found


# the index of the data input, and its gradient alone; of batch normalisation in evaluation mode
DATA_RULES: dict[str, tuple[int, Callable]] = {
    "ConvolutionBackward0": (0, convolution_data),
    "NativeBatchNormBackward0": (0, batch_norm_data),
    "AddmmBackward0": (1, matrix_product_data),
    "MmBackward0": (0, matrix_product_data),
}
