"""Which steps each type of module is: exact types only, so an unknown subclass is read from its own forward or refused."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from ... import modules as ours
from ...errors import UnboundedError
from ...modules.floored import FlooredBatchNorm1d, FlooredBatchNorm2d, FlooredBatchNorm3d
from ...modules.lipschitz import RULES as LIPSCHITZ
from ...modules.lipschitz import Reading, lipschitz_bound
from ...modules.shortcut import PooledConv2d, PooledSequential
from ...theory.higher_derivatives import JERKS, LARGEST_VALUES
from ...theory.nonlinearities import NONLINEARITIES
from .affine import affine
from .elementwise import Elementwise, Smooth
from .graph import Graph, Rule
from .linear_rules import adaptive_pool, downsample, linear_map, readout
from .normalisation import BatchNormalisation, FixedNormalisation
from .residual_rules import bounded_residual, contractive, pooled_conv, pooled_sequential
from .sample_norms import SampleNormalisation
from .steps import Kinked


def sequential(graph: Graph, module: nn.Module, path: str, source: int) -> int:
    for name, child in module._modules.items():  # named_children leaves out a module that stands there again
        source = graph.read(child, f"{path}.{name}".lstrip("."), source)
    return source


def _batch_norm(graph: Graph, module: nn.Module, path: str, source: int) -> int:
    kind = BatchNormalisation if module.training or module.running_mean is None else FixedNormalisation
    return graph.add(kind(path, module), source)


def _sample_norm(graph: Graph, module: nn.Module, path: str, source: int) -> int:
    return graph.add(SampleNormalisation(path, module), source)


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


NORMS = ("Entry", "Weight", "Spectral")

RULES: dict[type, Rule] = {
    nn.Sequential: sequential,
    **{kind: affine for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)},
    **{getattr(ours, f"{p}Norm{k}"): affine for p in NORMS for k in ("Linear", "Conv1d", "Conv2d", "Conv3d")},
    nn.Identity: _identity,
    **{kind: _dropout for kind in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)},
    **{kind: linear_map for kind in (nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)},
    **{kind: linear_map for kind in (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)},
    **{kind: adaptive_pool for kind in (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)},
    ours.OrthogonalDownsample2d: downsample,
    ours.OrthogonalReadout: readout,
    ours.ContractiveResidual: contractive,
    ours.SpectrallyBoundedResidual: bounded_residual,
    PooledConv2d: pooled_conv,
    PooledSequential: pooled_sequential,
    **{kind: _sample_norm for kind in (nn.LayerNorm, nn.GroupNorm)},
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
