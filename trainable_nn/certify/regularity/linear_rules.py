"""Rules of the linear maps without parameters: pooling by means, sums and means over axes, moves of entries, fixed kernels.

Called as modules or as functions; a function is read as the module that does the same.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import functional as tnnf
from ... import modules as ours
from ...errors import UnboundedError
from ...linop import matrix_norm_at_most
from ...modules.lipschitz import RULES as LIPSCHITZ
from ...modules.lipschitz import Reading, lipschitz_bound
from ...modules.shortcut import pooled_identity
from .graph import Graph, functional
from .steps import FixedLinear
from .twin import doubled

UP = 1.0 + 2.0**-50


def linear_map(graph: Graph, module: nn.Module, path: str, source: int) -> int:
    """A parameter-free linear module whose norm the Lipschitz rules know; its entries have one sign."""
    shape = tuple(graph.nodes[source].value.shape[1:])
    norm = lipschitz_bound(module, Reading(path, any_weights=False, input_shape=shape), LIPSCHITZ)
    moves = isinstance(module, (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d))
    terms = math.prod(_ints(module.kernel_size, 3)) if moves else 0
    lower = 0.0 if moves and not _blocks(module, shape) else norm
    why = "linear, its rows are orthogonal where windows don't meet" if moves else "moves entries, and is an isometry"
    step = FixedLinear(path, type(module).__name__, module, norm, terms=terms, lower=lower, derivation=why)
    step.moves_only = not moves
    return graph.add(step, source)


def _blocks(module: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether average pooling cuts the image into whole windows that don't meet, so all singular values are equal."""
    axes = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}[type(module)]
    kernel, stride, padding = (_ints(v, axes) for v in (module.kernel_size, module.stride, module.padding))
    sizes = shape[-axes:]
    return kernel == stride and not any(padding) and all(n % k == 0 for n, k in zip(sizes, kernel))


def _ints(value, axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else tuple(value)


def downsample(graph: Graph, module: nn.Module, path: str, source: int) -> int:
    twin = doubled(module)
    norm = lipschitz_bound(module, Reading(path, any_weights=False), LIPSCHITZ)
    s = module.stride
    lower = 1.0 if module.out_channels <= s * s * module.in_channels and s in (1, 2) else 0.0
    function = partial(tnnf.orthogonal_downsample2d, kernel=twin.kernel)
    step = FixedLinear(path, type(module).__name__, function, norm, absolute=float(s * s), terms=s * s, lower=lower,
                       derivation="all min(inputs, outputs) singular values are 1 (THEORY_PAPERS II.1.4)")  # fmt: skip
    return graph.add(step, source)


def adaptive_pool(graph: Graph, module: nn.Module, path: str, source: int) -> int:
    """A Kronecker product over the axes of small matrices of means; its norm is the product of theirs."""
    axes = {nn.AdaptiveAvgPool1d: 1, nn.AdaptiveAvgPool2d: 2, nn.AdaptiveAvgPool3d: 3}[type(module)]
    shape = tuple(graph.nodes[source].value.shape[-axes:])
    wanted = module.output_size if not isinstance(module.output_size, int) else (module.output_size,) * axes
    norm, lower, terms = 1.0, 1.0, 1
    for n, m in zip(shape, (n if m is None else m for n, m in zip(shape, wanted))):
        matrix = F.adaptive_avg_pool1d(torch.eye(n, dtype=torch.float64)[:, None], m)[:, 0].T
        norm *= matrix_norm_at_most(matrix, rtol=1e-6) * (1 + 8 * n * 2.0**-53)
        terms *= -(-n // m) + 1
        lower = lower * (m / n) ** 0.5 * (1 - 2.0**-50) if n % m == 0 else 0.0
    step = FixedLinear(path, type(module).__name__, module, norm, terms=terms, lower=lower,
                       derivation="means of windows: a Kronecker product of one small matrix for each axis")  # fmt: skip
    return graph.add(step, source)


def readout(graph: Graph, module: ours.OrthogonalReadout, path: str, source: int) -> int:
    kernel = doubled(module).kernel
    norm = matrix_norm_at_most(kernel, rtol=1e-6)
    least = float(torch.linalg.svdvals(kernel)[-1]) - 2.0**-40 * norm * sum(kernel.shape)
    step = FixedLinear(path, type(module).__name__, partial(_flat_product, kernel=kernel), norm,
                       absolute=float(kernel.square().sum().sqrt()) * (1 + 2.0**-30), terms=kernel.shape[1], lower=max(least, 0.0),
                       derivation="orthonormal rows, to rounding: all singular values are 1")  # fmt: skip
    return graph.add(step, source)


def _flat_product(x: Tensor, kernel: Tensor) -> Tensor:
    return F.linear(x.flatten(1), kernel)


def pooled_path(graph: Graph, path: str, source: int, out_channels: int, stride: tuple[int, int]) -> int:
    """sqrt(s_h s_w) AvgPool beside zero channels: orthogonal rows of length 1, or shorter where the edge cuts a window."""
    channels, *sizes = graph.nodes[source].value.shape[1:]
    whole = all(n % s == 0 for n, s in zip(sizes, stride))
    function = partial(pooled_identity, out_channels=out_channels, stride=stride)
    step = FixedLinear(path, "pooled path", function, UP, terms=math.prod(stride) + 2,
                       lower=1.0 / UP if whole and out_channels == channels else 0.0,
                       derivation="orthogonal rows no longer than 1 (THEORY_PAPERS II.1.4); its zero channels have none")  # fmt: skip
    return graph.add(step, source)


@functional("mean", "sum")
def _mean(graph: Graph, path: str, source: int, args, kwargs) -> int:
    """Over k entries: rows that do not meet, each of length k^(-1/2), or k^(1/2) for the sum."""
    name, value = path.rpartition(".")[2], graph.nodes[source].value
    axes = kwargs.get("dim", kwargs.get("axis", args[0] if args else None))
    axes = tuple(range(value.dim())) if axes is None else (axes,) if isinstance(axes, int) else tuple(axes)
    axes = tuple(a % value.dim() for a in axes)
    if 0 in axes or not axes:
        raise UnboundedError(f"{path}: it joins the samples of the batch. Take the {name} over the other axes.")
    keep = bool(kwargs.get("keepdim", args[1] if len(args) > 1 else False))
    k = math.prod(value.shape[a] for a in axes)
    size = k**-0.5 if name == "mean" else k**0.5
    function = lambda x: getattr(x, name)(axes, keepdim=keep)
    step = FixedLinear(path, name, function, size * UP, terms=k, lower=size / UP,
                       derivation=f"each output takes {k} entries of its own, so all singular values are equal")  # fmt: skip
    return graph.add(step, source)


MODULES = {
    f"{kind}_pool{axes}d": getattr(nn, f"{name}{axes}d")
    for axes in (1, 2, 3)
    for kind, name in (("avg", "AvgPool"), ("adaptive_avg", "AdaptiveAvgPool"), ("max", "MaxPool"))
}
MODULES |= {"pixel_shuffle": nn.PixelShuffle, "pixel_unshuffle": nn.PixelUnshuffle}


@functional(*MODULES)
def _as_module(graph: Graph, path: str, source: int, args, kwargs) -> int:
    """The module with these arguments."""
    module = MODULES[path.rpartition(".")[2]](*args, **{k: v for k, v in kwargs.items() if k not in ("input", "self")})
    return graph.read(module, path, source)


@functional("dropout", "dropout1d", "dropout2d", "dropout3d")
def _dropout(graph: Graph, path: str, source: int, args, kwargs) -> int:
    """Nothing, where it is called for evaluation."""
    values = dict(zip(("p", "training"), args)) | kwargs
    module = nn.Dropout(values.get("p", 0.5)).train(bool(values.get("training", True)))
    return graph.read(module, path, source)


@functional("flatten", "view", "reshape", "contiguous", "clone", "squeeze", "unsqueeze", "permute", "transpose")
def _moved(graph: Graph, path: str, source: int, args, kwargs) -> int:
    name = path.rpartition(".")[2]

    def move(x: Tensor) -> Tensor:
        call = "reshape" if name == "view" else name
        return getattr(x, call)(*args, **kwargs)

    before, after = graph.nodes[source].value, move(graph.nodes[source].value)
    if before.shape[0] != after.shape[0]:
        raise UnboundedError(f"{path}: it changes the batch axis, {tuple(before.shape)} to {tuple(after.shape)}. Keep it.")
    kwargs = {k: v for k, v in kwargs.items() if k != "input"}
    step = FixedLinear(path, name, move, 1.0, lower=1.0, derivation="moves entries, and is an isometry")
    step.moves_only = True
    return graph.add(step, source)
