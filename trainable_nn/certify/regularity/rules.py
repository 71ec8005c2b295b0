"""Which steps each type of module is: exact types only, so an unknown subclass is read from its own forward or refused."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import functional as tnnf
from ... import modules as ours
from ...errors import UnboundedError
from ...linop import matrix_norm_at_most
from ...modules.floored import FlooredBatchNorm1d, FlooredBatchNorm2d, FlooredBatchNorm3d
from ...modules.lipschitz import RULES as LIPSCHITZ
from ...modules.lipschitz import Reading, lipschitz_bound
from ...theory.higher_derivatives import JERKS, LARGEST_VALUES
from ...theory.nonlinearities import NONLINEARITIES
from .affine import Affine
from .elementwise import Elementwise, Smooth
from .graph import Graph, Rule, functional
from .normalisation import BatchNormalisation, FixedNormalisation
from .steps import FixedLinear, Kinked, Sum
from .twin import doubled


def _sequential(graph: Graph, module: nn.Module, path: str, source: int) -> int:
    for name, child in module.named_children():
        source = graph.read(child, f"{path}.{name}".lstrip("."), source)
    return source


def _affine(graph: Graph, module: nn.Module, path: str, source: int) -> int:
    value = graph.nodes[source].value
    if module.weight.dim() > 2 and value.dim() != module.weight.dim():
        raise UnboundedError(
            f"{path}: {type(module).__name__} got an input of shape {tuple(value.shape)} without a batch axis. Add one."
        )
    shape = tuple(value.shape[1:])
    step = graph.known.get(("step", path, shape))
    if step is None:
        if module.weight.is_meta or not torch.isfinite(module.weight).all():
            raise ValueError(
                f"{path}: the weight of {type(module).__name__} is NaN, infinite or on the meta device. Load it."
            )
        step = graph.known["step", path, shape] = Affine(path, module, shape, graph.known)
    return graph.add(step, source)


def _batch_norm(graph: Graph, module: nn.Module, path: str, source: int) -> int:
    kind = BatchNormalisation if module.training or module.running_mean is None else FixedNormalisation
    return graph.add(kind(path, module), source)


def constants_of(name: str, scale: float = 1.0) -> Smooth:
    """phi(scale z) / scale for the activation with this name."""
    phi = NONLINEARITIES[name]
    jerk = JERKS.get(name, math.inf)
    return Smooth(
        phi.slope, phi.curvature * scale, jerk * scale**2, phi.at_zero / scale, LARGEST_VALUES.get(name, math.inf) / scale
    )


def _smooth(name: str, function=None) -> Rule:
    def read(graph: Graph, module: nn.Module, path: str, source: int) -> int:
        forward = module.forward if function is None else function
        return graph.add(Elementwise(path, type(module).__name__, forward, constants_of(name)), source)

    return read


def _gelu(graph: Graph, module: nn.GELU, path: str, source: int) -> int:
    name = "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return _smooth(name)(graph, module, path, source)


def _softplus(graph: Graph, module: nn.Softplus, path: str, source: int) -> int:
    """As its formula: past its threshold torch's own jumps by e^(-threshold) / beta, and is read as if it did not."""
    beta = float(module.beta)
    if not beta > 0 or module.threshold < 20:
        raise UnboundedError(
            f"{path}: Softplus(beta={module.beta}, threshold={module.threshold}) jumps at its threshold, so its slope "
            f"has no bound. Use Softplus0, or a threshold of 20."
        )
    phi = constants_of("softplus", beta)
    return graph.add(Elementwise(path, "Softplus", lambda z: -F.logsigmoid(-beta * z) / beta, phi), source)


def _elu(graph: Graph, module: nn.ELU, path: str, source: int) -> int:
    if float(module.alpha) != 1.0:
        return _kinked(graph, module, path, source)
    return _smooth("elu", F.elu)(graph, module, path, source)


def _kinked(graph: Graph, module: nn.Module, path: str, source: int) -> int:
    slope = lipschitz_bound(module, Reading(path, any_weights=False), LIPSCHITZ)
    with torch.no_grad():
        pooling = isinstance(module, (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d))
        at_zero = 0.0 if pooling else float(module(torch.zeros(1, 1, dtype=torch.float64)).abs().max())
    function = (lambda x: module(x.clone())) if getattr(module, "inplace", False) else module
    return graph.add(Kinked(path, type(module).__name__, function, slope, at_zero), source)


def _identity(graph: Graph, module: nn.Module, path: str, source: int) -> int:
    return source


def _dropout(graph: Graph, module: nn.Module, path: str, source: int) -> int:
    if module.training and module.p > 0:
        raise UnboundedError(
            f"{path}: {type(module).__name__} draws at random in training, so the network is not one function. Call "
            f"eval() on it, or leave it out."
        )
    return source


def _linear_map(graph: Graph, module: nn.Module, path: str, source: int) -> int:
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


def _downsample(graph: Graph, module: nn.Module, path: str, source: int) -> int:
    twin = doubled(module)
    norm = lipschitz_bound(module, Reading(path, any_weights=False), LIPSCHITZ)
    s = module.stride
    lower = 1.0 if module.out_channels <= s * s * module.in_channels and s in (1, 2) else 0.0
    function = partial(tnnf.orthogonal_downsample2d, kernel=twin.kernel)
    step = FixedLinear(path, type(module).__name__, function, norm, absolute=float(s * s), terms=s * s, lower=lower,
                       derivation="all min(inputs, outputs) singular values are 1 (THEORY_PAPERS II.1.4)")  # fmt: skip
    return graph.add(step, source)


def _adaptive_pool(graph: Graph, module: nn.Module, path: str, source: int) -> int:
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


def _readout(graph: Graph, module: ours.OrthogonalReadout, path: str, source: int) -> int:
    kernel = doubled(module).kernel
    norm = matrix_norm_at_most(kernel, rtol=1e-6)
    least = float(torch.linalg.svdvals(kernel)[-1]) - 2.0**-40 * norm * sum(kernel.shape)
    step = FixedLinear(path, type(module).__name__, partial(_flat_product, kernel=kernel), norm,
                       absolute=float(kernel.square().sum().sqrt()) * (1 + 2.0**-30), terms=kernel.shape[1], lower=max(least, 0.0),
                       derivation="orthonormal rows, to rounding: all singular values are 1")  # fmt: skip
    return graph.add(step, source)


def _flat_product(x: Tensor, kernel: Tensor) -> Tensor:
    return F.linear(x.flatten(1), kernel)


def _contractive(graph: Graph, module: ours.ContractiveResidual, path: str, source: int) -> int:
    """skip(x) + a branch(x), with a constant a."""
    skip = source if module.skip is None else graph.read(module.skip, f"{path}.skip".lstrip("."), source)
    branch = graph.read(module.branch, f"{path}.branch".lstrip("."), source)
    return graph.add(Sum(path, (1.0, module.scale)), skip, branch)


def _bounded_residual(graph: Graph, module: nn.Module, path: str, source: int) -> int:
    """skip(x) + a branch(x), with a constant a."""
    if type(module).forward is not ours.SpectrallyBoundedResidual.forward or not isinstance(module.scale, float):
        raise UnboundedError(f"{path}: the scale of this SpectrallyBoundedResidual is no constant. Give it one.")
    skip = source if module.skip is None else graph.read(module.skip, f"{path}.skip", source)
    branch = graph.read(module.branch, f"{path}.branch", source)
    return graph.add(Sum(path, (1.0, module.scale)), skip, branch)


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


NORMS = ("Entry", "Weight", "Spectral")

RULES: dict[type, Rule] = {
    nn.Sequential: _sequential,
    **{kind: _affine for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)},
    **{getattr(ours, f"{p}Norm{k}"): _affine for p in NORMS for k in ("Linear", "Conv1d", "Conv2d", "Conv3d")},
    nn.Identity: _identity,
    **{kind: _dropout for kind in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)},
    **{kind: _linear_map for kind in (nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)},
    **{kind: _linear_map for kind in (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)},
    **{kind: _adaptive_pool for kind in (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)},
    ours.OrthogonalDownsample2d: _downsample,
    ours.OrthogonalReadout: _readout,
    ours.ContractiveResidual: _contractive,
    ours.SpectrallyBoundedResidual: _bounded_residual,
    **{kind: _batch_norm for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)},
    **{kind: _batch_norm for kind in (FlooredBatchNorm1d, FlooredBatchNorm2d, FlooredBatchNorm3d)},
    nn.Tanh: _smooth("tanh"),
    nn.Sigmoid: _smooth("sigmoid"),
    nn.SiLU: _smooth("silu", F.silu),
    nn.Mish: _smooth("mish", F.mish),
    nn.Softsign: _smooth("softsign"),
    nn.GELU: _gelu,
    nn.Softplus: _softplus,
    nn.ELU: _elu,
    ours.Softplus0: _smooth("softplus0"),
    ours.SmoothReLU: _smooth("smooth_relu"),
    ours.Tanh: _smooth("tanh"),
    ours.GELU1: _smooth("gelu1"),
    ours.SiLU1: _smooth("silu1"),
    ours.Erf1: _smooth("erf1"),
    ours.Arctan: _smooth("arctan"),
    ours.SoftSign: _smooth("softsign"),
    ours.ISRU: _smooth("isru"),
    **{kind: _kinked for kind in (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SELU, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid)},
    **{kind: _kinked for kind in (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)},
}
