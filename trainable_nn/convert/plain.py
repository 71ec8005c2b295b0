"""The plain torch form of each layer of this package: layers of torch.nn, or torch.fx graphs of them."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .. import modules
from ..errors import ConversionError
from ..functional.activation import ERF_TO_SLOPE_1
from ..modules.normalised import Normalised
from ..modules.preactivation import PreActivationBlock
from ..modules.shortcut import PooledConv2d, PooledSequential
from ..theory.nonlinearities import GELU_TO_SLOPE_1, SILU_TO_SLOPE_1
from .skips import carry_over


def plain_normalised(layer: Normalised) -> nn.Module:
    """torch's own layer with the effective weight as its weight."""
    plain = layer.plain_type.__new__(layer.plain_type)
    own = {*layer.option_names, *layer.derived_names}
    plain.__dict__.update({name: value for name, value in vars(layer).items() if name not in own})
    weight = nn.Parameter(layer.effective_weight().detach().clone(), requires_grad=layer.weight.requires_grad)
    plain._parameters = {**layer._parameters, "weight": weight}
    return plain


def plain_pooled(conv: PooledConv2d) -> nn.Conv2d:
    """One convolution whose kernel is the projection's plus the window of the pooled path.

    Output i reads inputs i s - h ... i s + h with h = max(s - 1, padding): the window stands at 0 ... s - 1
    behind the centre. Stride s and padding h give ceil(n / s) outputs for every n, zeros beyond the edge.
    """
    half = [max(s - 1, d * (k - 1) // 2) for s, d, k in zip(conv.stride, conv.dilation, conv.kernel_size)]
    shape = (conv.out_channels, conv.in_channels, 2 * half[0] + 1, 2 * half[1] + 1)
    kernel = conv.weight.new_zeros(shape)
    rows, columns = (
        slice(h - d * (k - 1) // 2, h + d * (k - 1) // 2 + 1, d)
        for h, d, k in zip(half, conv.dilation, conv.kernel_size)
    )
    kernel[:, :, rows, columns] = _ungrouped(conv)
    offset = (conv.out_channels - conv.in_channels + 1) // 2
    window = kernel[offset : offset + conv.in_channels, :, half[0] :, half[1] :]
    eye = torch.eye(conv.in_channels, dtype=kernel.dtype, device=kernel.device)[..., None, None]
    window[:, :, : conv.stride[0], : conv.stride[1]] += eye * math.prod(conv.stride) ** -0.5
    plain = _conv(kernel.contiguous(memory_format=_format_of(conv.weight)), conv.stride, tuple(half))
    plain.bias, plain.weight.requires_grad = conv.bias, conv.weight.requires_grad
    return carry_over(conv, plain)


def _ungrouped(conv: nn.Conv2d) -> Tensor:
    """The kernel over all input channels, with zeros between groups."""
    if conv.groups == 1:
        return conv.weight.detach()
    full = conv.weight.new_zeros(conv.out_channels, conv.in_channels, *conv.kernel_size)
    rows, columns = conv.out_channels // conv.groups, conv.in_channels // conv.groups
    for group, own in enumerate(conv.weight.detach().split(rows)):
        full[group * rows : (group + 1) * rows, group * columns : (group + 1) * columns] = own
    return full


def _format_of(weight: Tensor) -> torch.memory_format:
    """The layout that the strides say; the kernel of a 1x1 convolution is contiguous in both."""
    last = weight.shape[1] > 1 and weight.stride(1) == 1 and weight.stride(3) == weight.shape[1]
    return torch.channels_last if last else torch.contiguous_format


def _conv(kernel: Tensor, stride: Sequence[int], padding: Sequence[int] = (0, 0), groups: int = 1) -> nn.Conv2d:
    """A convolution without bias that has this kernel; nothing is drawn at random."""
    conv = nn.Conv2d(
        kernel.shape[1] * groups, kernel.shape[0], kernel.shape[2:], tuple(stride), tuple(padding),
        groups=groups, bias=False, device="meta", dtype=kernel.dtype,
    )  # fmt: skip
    conv.weight = nn.Parameter(kernel)
    return conv


def plain_downsample(skip: modules.OrthogonalDownsample2d) -> nn.Conv2d:
    """The convolution with kernel s and stride s that the skip is; it has no parameter to train."""
    conv = _conv(skip.kernel.detach().clone(), (skip.stride, skip.stride))
    conv.weight.requires_grad_(False)
    return carry_over(skip, conv)


def plain_sequential(shortcut: PooledSequential) -> fx.GraphModule:
    """A graph: the layers one after the other, plus a fixed depthwise convolution padded with zero channels."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = _through(graph, list(shortcut._modules), x)
    root, pooled = nn.Module(), x
    for name, layer in shortcut._modules.items():
        root.add_module(name, layer)
    if math.prod(shortcut.stride) > 1:
        name = "pooled" if "pooled" not in shortcut._modules else "pooled_"
        root.add_module(name, _window(shortcut))
        pooled = graph.call_module(name, (x,))
    missing = shortcut.out_channels - shortcut.in_channels
    if missing:
        pooled = graph.call_function(F.pad, (pooled, (0, 0, 0, 0, (missing + 1) // 2, missing // 2)))
    graph.output(graph.call_function(torch.add, (y, pooled)))
    return _graph_module(shortcut, root, graph)


def _window(shortcut: PooledSequential) -> nn.Conv2d:
    """s * AvgPool_s channel by channel, with ceil(n / s) outputs for every n."""
    (rows, columns), channels = shortcut.stride, shortcut.in_channels
    like = next((p for p in shortcut.parameters() if p.is_floating_point()), torch.empty(0))
    kernel = like.new_zeros(channels, 1, 2 * rows - 1, 2 * columns - 1)
    kernel[:, :, rows - 1 :, columns - 1 :] = (rows * columns) ** -0.5
    conv = _conv(kernel, shortcut.stride, (rows - 1, columns - 1), groups=channels)
    conv.weight.requires_grad_(False)
    return conv.train(shortcut.training)


def plain_preactivation(block: PreActivationBlock) -> fx.GraphModule:
    """A graph of the block's own layers."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    names = block.layer_names
    u = _through(graph, names["before"], x)
    reads_x = block.shortcut_reads_input or not names["shortcut"]
    skip = _through(graph, names["shortcut"], x if reads_x else u)
    graph.output(graph.call_function(torch.add, (_through(graph, names["branch"], u), skip)))
    return _graph_module(block, block, graph)


def plain_readout(readout: modules.OrthogonalReadout) -> nn.Sequential:
    """Flatten, and a linear layer that is not trained."""
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.out_features, linear.in_features = readout.kernel.shape
    linear.weight = nn.Parameter(readout.kernel.detach().clone(), requires_grad=False)
    linear.register_parameter("bias", None)
    return carry_over(readout, nn.Sequential(nn.Flatten(), linear.train(readout.training)))


def plain_residual(block: modules.SpectrallyBoundedResidual | modules.ContractiveResidual) -> fx.GraphModule:
    """A graph: skip(x) + a * branch(x) with the scale a of now."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    kept = graph.call_module("skip", (x,)) if block.skip is not None else x
    change = graph.call_module("branch", (x,))
    graph.output(graph.call_function(torch.add, (kept, change), {"alpha": float(block.scale)}))
    return _graph_module(block, block, graph)


def plain_floored(norm: modules.FlooredBatchNorm1d) -> nn.Module:
    """Torch's layer with gamma s / m(s) for gamma, in evaluation; in training no plain layer has a floor.

    Raises:
        ConversionError: the layer uses the statistics of its batch.
    """
    if norm.training or norm.running_var is None:
        raise ConversionError(
            f"fold: {type(norm).__name__} uses the statistics of its batch, and no plain layer has a floor for them. "
            f"Call eval() on the model before folding, and give the layer running statistics."
        )
    weight, plain = norm.acting_weight(), norm.plain_type.__new__(norm.plain_type)
    plain.__dict__.update({name: value for name, value in vars(norm).items() if name not in ("floor", "smooth")})
    plain._parameters, plain._buffers = dict(norm._parameters), dict(norm._buffers)
    trained = norm.weight is not None and norm.weight.requires_grad
    plain._parameters["weight"] = nn.Parameter(weight.detach(), requires_grad=trained)
    if plain._parameters["bias"] is None:
        plain._parameters["bias"] = nn.Parameter(torch.zeros_like(weight), requires_grad=False)
    plain.affine = True
    return plain


def _through(graph: fx.Graph, names: Sequence[str], x: fx.Node) -> fx.Node:
    for name in names:
        x = graph.call_module(name, (x,))
    return x


def _graph_module(old: nn.Module, root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    made = fx.GraphModule(root, graph, f"Plain{type(old).__name__}")
    for part in made.modules():
        if type(part) is nn.Module:  # a container that torch.fx made for a path with dots
            part.training = old.training
    return carry_over(old, made)


def _softplus0(z: Tensor) -> Tensor:
    return -F.logsigmoid(-z) - math.log(2.0)


def _root(size: Tensor) -> Tensor:
    """(1 + size^2)^(1/2) for size >= 0 without overflow; ONNX has no hypot."""
    longer = torch.clamp(size, min=1.0)
    return longer * torch.sqrt(1.0 + (torch.clamp(size, max=1.0) / longer) ** 2)


def _smooth_relu(z: Tensor) -> Tensor:
    size = torch.abs(z)
    return F.relu(z) + (0.5 / (_root(size) + size) - 0.5)


def _gelu1(z: Tensor) -> Tensor:
    return GELU_TO_SLOPE_1 * torch.where(z > 40, z, F.gelu(torch.clamp(z, -40, 40)))


def _silu1(z: Tensor) -> Tensor:
    return SILU_TO_SLOPE_1 * F.silu(z)


def _erf1(z: Tensor) -> Tensor:
    return ERF_TO_SLOPE_1 * torch.erf(z)


def _arctan(z: Tensor) -> Tensor:
    return torch.atan(z)


def _isru(z: Tensor) -> Tensor:
    return z / _root(torch.abs(z))


def _expression(formula: Callable[[Tensor], Tensor]) -> Callable[[nn.Module], nn.Module]:
    """The rule that puts the graph of a formula in an activation's place."""
    return lambda old: _graph_module(old, nn.Module(), fx.Tracer().trace(formula))


def _layer(kind: type[nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """The rule that puts a layer of torch.nn in an activation's place."""
    return lambda old: carry_over(old, kind())


RULES: dict[type[nn.Module], Callable[[nn.Module], nn.Module]] = {
    PooledConv2d: plain_pooled,
    PooledSequential: plain_sequential,
    PreActivationBlock: plain_preactivation,
    modules.OrthogonalDownsample2d: plain_downsample,
    modules.OrthogonalReadout: plain_readout,
    modules.ContractiveResidual: plain_residual,
    modules.SpectrallyBoundedResidual: plain_residual,
    modules.FlooredBatchNorm1d: plain_floored,
    modules.FlooredBatchNorm2d: plain_floored,
    modules.FlooredBatchNorm3d: plain_floored,
    modules.Tanh: _layer(nn.Tanh),
    modules.SoftSign: _layer(nn.Softsign),
    modules.Softplus0: _expression(_softplus0),
    modules.SmoothReLU: _expression(_smooth_relu),
    modules.GELU1: _expression(_gelu1),
    modules.SiLU1: _expression(_silu1),
    modules.Erf1: _expression(_erf1),
    modules.Arctan: _expression(_arctan),
    modules.ISRU: _expression(_isru),
} | dict.fromkeys(
    (
        modules.EntryNormLinear, modules.EntryNormConv1d, modules.EntryNormConv2d, modules.EntryNormConv3d,
        modules.WeightNormLinear, modules.WeightNormConv1d, modules.WeightNormConv2d, modules.WeightNormConv3d,
        modules.SpectralNormLinear, modules.SpectralNormConv1d, modules.SpectralNormConv2d, modules.SpectralNormConv3d,
    ),
    plain_normalised,
)  # fmt: skip
