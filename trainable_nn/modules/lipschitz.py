"""Lipschitz bounds of modules, by a table of rules: exact types only, so an unknown subclass is refused, not assumed.

A bound is of ||f(x) - f(y)||_2 / ||x - y||_2 for one sample, or for a whole batch where the samples do not meet.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..errors import UnboundedError
from ..theory.nonlinearities import GELU_SLOPE, GELU_TANH_SLOPE, MISH_SLOPE, SELU_SLOPE, SILU_SLOPE
from ..theory.rounding import product_up, quotient_up, root_up, up
from . import activation as smooth
from .conv import (
    EntryNormConv1d,
    EntryNormConv2d,
    EntryNormConv3d,
    WeightNormConv1d,
    WeightNormConv2d,
    WeightNormConv3d,
)
from .linear import EntryNormLinear, WeightNormLinear
from .skip import OrthogonalDownsample2d


@dataclass(frozen=True)
class Reading:
    """How a module is read.

    any_weights: bound every value of the parameters, and every mode; else the present ones.
    input_shape: the shape of one sample (channels and image sizes), or None for every shape.
    """

    path: str
    any_weights: bool
    input_shape: tuple[int, ...] | None = None


Rule = Callable[[nn.Module, Reading, Mapping[type, "Rule"]], float]


@dataclass(frozen=True)
class Slope:
    """The rule of a map whose constant is one number."""

    value: float

    def __call__(self, module: nn.Module, reading: Reading, rules: Mapping[type, Rule]) -> float:
        return self.value


def lipschitz_bound(module: nn.Module, reading: Reading, rules: Mapping[type, Rule]) -> float:
    """A proved upper bound of the module's Lipschitz constant.

    Raises:
        UnboundedError: no rule has exactly this type, or its rule gives no finite number.
    """
    rule = rules.get(type(module))
    if rule is None or "forward" in vars(module):
        raise UnboundedError(
            f"{reading.path}: nothing bounds {_name(module)} for every value of its parameters and every input. "
            f"{INSTEAD.get(type(module), 'Use a layer of trainable_nn, or add a rule for it with rules=.')}"
        )
    bound = rule(module, reading, rules)
    if not math.isfinite(bound):
        raise UnboundedError(f"{reading.path}: {_name(module)} has no finite bound. {_why_infinite(module)}")
    return bound


def output_shape(module: nn.Module, input_shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of one sample after the module, found without computing."""
    tensors = {n: torch.empty_like(t, device="meta") for n, t in [*module.named_parameters(), *module.named_buffers()]}
    dtype = next((t.dtype for t in tensors.values()), torch.float32)
    sample = torch.empty((1, *input_shape), device="meta", dtype=dtype)
    with torch.no_grad():
        return tuple(torch.func.functional_call(module, tensors, (sample,)).shape[1:])


def _sequential(module, reading, rules) -> float:
    bounds, shape = [], reading.input_shape
    for name, child in module.named_children():
        bounds.append(lipschitz_bound(child, replace(reading, path=f"{reading.path}.{name}", input_shape=shape), rules))
        shape = None if shape is None else output_shape(child, shape)
    return product_up(bounds)


def _normalised(module, reading, rules) -> float:
    if reading.any_weights:
        return module.operator_norm_supremum(reading.input_shape)
    return module.operator_norm_bound(reading.input_shape)


def _orthogonal(module, reading, rules) -> float:
    """1; an odd stride's kernel is rounded to the dtype."""
    return 1.0 if module.stride in (1, 2) else up(1.0 + module.stride**2 * torch.finfo(module.kernel.dtype).eps)


def _stated(module, reading, rules) -> float:
    return module.slope_bound


def _leaky_relu(module, reading, rules) -> float:
    return max(1.0, abs(module.negative_slope))


def _elu(module, reading, rules) -> float:
    return max(1.0, abs(module.alpha))


def _celu(module, reading, rules) -> float:
    """e^(z / alpha) on the left of 0: at most 1, and without bound where alpha is negative."""
    return 1.0 if module.alpha > 0 else math.inf


def _gelu(module, reading, rules) -> float:
    return GELU_TANH_SLOPE if module.approximate == "tanh" else GELU_SLOPE


def _softplus(module, reading, rules) -> float:
    """1; but at its threshold torch's softplus jumps by e^(-threshold) / beta, 2e-9 for the usual 20."""
    return 1.0 if module.beta > 0 and module.threshold >= 20 else math.inf


def _dropout(module, reading, rules) -> float:
    """In training what is kept is divided by 1 - p."""
    if not (module.training or reading.any_weights):
        return 1.0
    return 0.0 if module.p == 1 else up(1.0 / (1.0 - module.p), 2)


def _average_pool(module, reading, rules) -> float:
    """(prod ceil(k / s) / k)^(1/2): patches times the row 1 / prod k.

    Where the divisor changes at the edge, ||T||^2 <= ||T||_1 ||T||_inf <= prod ceil(k / s).
    """
    axes = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}[type(module)]
    kernel, stride, padding = (_tuple(v, axes) for v in (module.kernel_size, module.stride, module.padding))
    uses = math.prod(-(-k // s) for k, s in zip(kernel, stride))
    taps = math.prod(kernel)
    override = getattr(module, "divisor_override", None)
    if override or (not module.ceil_mode and (module.count_include_pad or not any(padding))):
        return quotient_up(root_up(uses * taps), abs(override or taps))
    return root_up(uses)


def _max_pool(module, reading, rules) -> float:
    """prod ceil(k / (s / gcd(s, d)))^(1/2): an output moves by at most the largest move in its window."""
    axes = {nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3}[type(module)]
    kernel, stride, dilation = (_tuple(v, axes) for v in (module.kernel_size, module.stride, module.dilation))
    return root_up(math.prod(-(-k // (s // math.gcd(s, d))) for k, s, d in zip(kernel, stride, dilation)))


def _tuple(value, axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else tuple(value)


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _why_infinite(module: nn.Module) -> str:
    if getattr(module, "leak", 0) > 0:
        return f"With leak={module.leak:g} its weight is unbounded; use leak=0."
    if isinstance(module, nn.Softplus):
        return "Below a threshold of 20 torch's softplus jumps; use Softplus0."
    return "Make its constants and weights such that it has one."


INSTEAD = {
    nn.Linear: "Use EntryNormLinear or WeightNormLinear instead.",
    **{
        plain: f"Use EntryNorm{plain.__name__} or WeightNorm{plain.__name__} instead."
        for plain in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    },
    **{
        norm: "An input of small variance makes it as steep as it likes; leave it out, normalised layers do without."
        for norm in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm)
    },
    **{norm: "Its slope is a parameter that nothing bounds; use SmoothReLU instead." for norm in (nn.PReLU,)},
}

ISOMETRIES = (nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)
PADDINGS = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
SLOPE_ONE = (nn.ReLU, nn.ReLU6, nn.Tanh, nn.Softsign, nn.Hardtanh, nn.LogSigmoid, nn.Tanhshrink, nn.Softshrink)
OURS = (EntryNormLinear, EntryNormConv1d, EntryNormConv2d, EntryNormConv3d)
OURS += (WeightNormLinear, WeightNormConv1d, WeightNormConv2d, WeightNormConv3d)

RULES: dict[type, Rule] = {
    nn.Sequential: _sequential,
    **{module: Slope(1.0) for module in (*ISOMETRIES, *PADDINGS, *SLOPE_ONE)},
    **{module: _normalised for module in OURS},
    **{module: _stated for module in smooth.Activation.__subclasses__() if module.__module__ == smooth.__name__},
    **{module: _dropout for module in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)},
    **{module: _average_pool for module in (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)},
    **{module: _max_pool for module in (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)},
    OrthogonalDownsample2d: _orthogonal,
    nn.LeakyReLU: _leaky_relu,
    nn.ELU: _elu,
    nn.CELU: _celu,
    nn.GELU: _gelu,
    nn.SiLU: Slope(SILU_SLOPE),
    nn.Mish: Slope(MISH_SLOPE),
    nn.SELU: Slope(SELU_SLOPE),
    nn.Sigmoid: Slope(0.25),
    nn.Hardsigmoid: Slope(1.0 / 6.0 * (1.0 + 2.0**-23)),  # torch's constant is 1 / 6 in float32, also for float64
    nn.Hardswish: Slope(1.5),
    nn.Softplus: _softplus,
}
