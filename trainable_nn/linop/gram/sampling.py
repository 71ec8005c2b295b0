"""Whether the samples of a batch meet in the network, and where they are in the tensors that meet a parameter.

Most operations of an image network keep the samples apart, and on the first axis, whatever their values: those are
listed. Where another one occurs, one more backward pass decides: every sample's output gradient is scaled by a factor
of its own, and what comes back at each parameter must be scaled alike.
"""

import torch
from torch import Tensor

from .graph import Graph, output_shapes
from .layout import Layout, candidates

ELEMENTWISE = {
    f"{name}Backward{version}"
    for name in (
        *("Relu", "Threshold", "LeakyRelu", "Elu", "Gelu", "Silu", "Mish", "Softplus", "Hardtanh", "Hardswish"),
        *("Hardsigmoid", "Sigmoid", "Tanh", "Exp", "Log", "Log1P", "Sqrt", "Rsqrt", "Erf", "Atan", "Abs", "Neg", "Where"),
        *("Clone", "Alias", "ToCopy", "Add", "Sub", "Mul", "Div", "Pow", "Clamp", "ClampMin", "ClampMax", "Maximum"),
    )
    for version in (0, 1, 2)
}
IMAGE = {
    f"{name}Backward{version}"
    for name in (
        *("Convolution", "MaxPool2DWithIndices", "MaxPool3DWithIndices", "AvgPool2D", "AvgPool3D"),
        *("MkldnnAdaptiveAvgPool2D", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D", "ConstantPadNd", "NativeGroupNorm"),
        *("ReflectionPad1D", "ReflectionPad2D", "ReflectionPad3D", "ReplicationPad1D", "ReplicationPad2D"),
        *("ReplicationPad3D", "NativeLayerNorm", "Addmm", "Mm", "Embedding"),
    )
    for version in (0, 1, 2)
}
VIEWS = {f"{name}Backward{version}" for name in ("View", "UnsafeView", "ReshapeAlias") for version in (0, 1)}
ALONG = {"MeanBackward1": "_saved_dim", "SumBackward1": "_saved_dim", "SoftmaxBackward0": "_saved_dim"}
ALONG |= {"SqueezeBackward1": "_saved_dim", "UnsqueezeBackward0": "_saved_dim", "CatBackward0": "_saved_dim"}


def keeps_samples_apart(graph: Graph, count: int) -> bool:
    """Whether every operation is one that keeps ``count`` samples apart on the first axis, whatever the values."""
    if count == 1:
        return all(_first_axis(shape, 1) for node in graph.order for shape in output_shapes(node)[:1])
    return all(_is_apart(node, graph, count) for node in graph.order)


def _is_apart(node, graph: Graph, count: int) -> bool:
    name, shape = node.name(), output_shapes(node)[0]
    read = [output_shapes(m)[nr] for _, (m, nr) in graph.data[node]]
    if not all(_first_axis(s, count) for s in (shape, *read)):
        return False
    if name in ELEMENTWISE:
        return all(len(s) == len(shape) and s[0] == shape[0] for s in read)
    if name in IMAGE or name == "NativeBatchNormBackward0":
        only_rows = all(index == (1 if name == "AddmmBackward0" else 0) for index, _ in graph.data[node])
        return only_rows and not getattr(node, "_saved_training", False)  # weights made from data couple the samples
    if name in VIEWS:
        return True
    if name in ALONG:
        return _axes_above_first(getattr(node, ALONG[name]), max(len(shape), *map(len, read), 1))
    return False


def _first_axis(shape: torch.Size, count: int) -> bool:
    return len(shape) > 0 and shape[0] > 0 and shape[0] % count == 0


def _axes_above_first(axes, dims: int) -> bool:
    axes = axes if isinstance(axes, tuple | list) else (axes,)
    signed = [axis - 2**64 if axis >= 2**63 else axis for axis in axes]  # a negative one is stored unsigned
    return len(signed) > 0 and all(axis % dims != 0 for axis in signed)


def probe_factors(count: int, like: Tensor) -> Tensor:
    """A power of two for each sample, far apart for neighbours: exact in every dtype."""
    return 2.0 ** ((torch.arange(count, device=like.device) * 17) % 41 - 20).to(like.dtype)


def find_layout(whole: Tensor, probed: Tensor, factors: Tensor) -> Layout | None:
    """The layout in which ``probed`` is ``whole`` with each sample scaled by its factor; None if the samples meet."""
    for layout in candidates(whole.shape, len(factors)):
        expected = layout.by_sample(layout.scaled(whole, factors)).flatten(1)
        error = (layout.by_sample(probed).flatten(1) - expected).abs().amax(1)
        if bool((error <= 1e3 * torch.finfo(whole.dtype).eps * expected.abs().amax(1)).all()):
            return layout
    return None
