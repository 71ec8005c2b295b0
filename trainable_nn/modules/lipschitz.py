"""Lipschitz bounds of modules, by a table of rules: exact types only, so an unknown subclass is refused, not assumed.

A bound is of ||f(x) - f(y)||_2 / ||x - y||_2 for one sample and for a whole batch, in which batch normalisation joins the
samples. A rule returns a number; or, where ``Reading.linear`` gives them, differentiable ``Bounds`` made of numbers and of
what ``linear`` says of the linear layers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import UnboundedError
from ..theory.convolution import geometry_factor
from ..theory.nonlinearities import GELU_SLOPE, GELU_TANH_SLOPE, MISH_SLOPE, SELU_SLOPE, SILU_SLOPE
from ..theory.rounding import down, product_up, quotient_up, root_up, up
from . import activation as smooth
from .anchor import Bounds, DiagonalPart, LinearPart, acting_weight, bounds_of_diagonal, tight_bound
from .conv import (
    EntryNormConv1d,
    EntryNormConv2d,
    EntryNormConv3d,
    WeightNormConv1d,
    WeightNormConv2d,
    WeightNormConv3d,
)
from .floored import FlooredBatchNorm1d, FlooredBatchNorm2d, FlooredBatchNorm3d
from .linear import EntryNormLinear, WeightNormLinear
from .normalised import Normalised
from .preactivation import PreActivationBlock
from .shortcut import PooledConv2d, PooledSequential
from .skip import OrthogonalDownsample2d
from .spectral import SpectralNormConv1d, SpectralNormConv2d, SpectralNormConv3d, SpectralNormLinear


@dataclass(frozen=True)
class Reading:
    """How a module is read.

    any_weights: bound every value of the parameters, and every mode; else the present ones.
    input_shape: the shape of one sample (channels and image sizes), or None for every shape.
    linear: what bounds a linear map with its present weight, for every shape; None finds a tight number.
    diagonal: with linear, what bounds the scales of a normalisation.
    any_mode: bound training and evaluation together; always so with any_weights.
    """

    path: str
    any_weights: bool
    input_shape: tuple[int, ...] | None = None
    linear: Callable[[LinearPart], Bounds] | None = None
    any_mode: bool = False
    diagonal: Callable[[DiagonalPart], Bounds] = bounds_of_diagonal


Rule = Callable[[nn.Module, Reading, Mapping[type, "Rule"]], "float | Bounds"]


@dataclass(frozen=True)
class Slope:
    """The rule of a map whose constant is one number."""

    value: float

    def __call__(self, module: nn.Module, reading: Reading, rules: Mapping[type, Rule]) -> float:
        return self.value


def lipschitz_bound(module: nn.Module, reading: Reading, rules: Mapping[type, Rule]) -> "float | Bounds":
    """A proved upper bound of the module's Lipschitz constant; a float unless ``reading.linear`` is given.

    Raises:
        UnboundedError: no rule has exactly this type, or its rule gives no finite number.
        ValueError: a weight is on the meta device or not finite, and a number is asked for.
    """
    rule = rules.get(type(module))
    if rule is None or "forward" in vars(module) or _computes_a_weight(module):
        raise UnboundedError(
            f"{reading.path}: nothing bounds {_name(module)} for every value of its parameters and every input. "
            f"{INSTEAD.get(type(module), 'Use a layer of trainable_nn, or add a rule for it with rules=.')}"
        )
    bound = rule(module, reading, rules)
    if isinstance(bound, float) and not -math.inf < bound < math.inf:
        raise UnboundedError(f"{reading.path}: {_name(module)} has no finite bound. {_why_infinite(module)}")
    return bound


def product_of(bounds: Sequence["float | Bounds"]) -> "float | Bounds":
    """Of maps one after the other."""
    known = product_up(b for b in bounds if isinstance(b, (int, float)))
    moving = [b for b in bounds if not isinstance(b, (int, float))]
    for bound in moving[1:]:
        moving[0] = moving[0] * bound
    return moving[0] * known if moving else known


def sum_of(one: "float | Bounds", other: "float | Bounds") -> "float | Bounds":
    """Of maps beside each other, whose outputs are added."""
    return up(one + other) if isinstance(one, (int, float)) and isinstance(other, (int, float)) else one + other


def _computes_a_weight(module: nn.Module) -> bool:
    """Whether a hook or an assignment put something else in the place of the parameter ``weight``."""
    return isinstance(module, WEIGHTED) and "weight" not in module._parameters


def output_shape(module: nn.Module, input_shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of one sample after the module, found without computing."""
    tensors = {n: torch.empty_like(t, device="meta") for n, t in [*module.named_parameters(), *module.named_buffers()]}
    dtype = next((t.dtype for t in tensors.values()), torch.float32)
    sample = torch.empty((2, *input_shape), device="meta", dtype=dtype)
    with torch.no_grad():
        return tuple(torch.func.functional_call(module, tensors, (sample,)).shape[1:])


def _sequential(module, reading, rules) -> "float | Bounds":
    """The product; a linear layer and the floored normalisation behind it count as one map, diag(gamma / floor) W."""
    children, bounds, shape = [(n, m) for n, m in module._modules.items() if m is not None], [], reading.input_shape
    merged = False
    for (name, child), (next_name, after) in zip(children, [*children[1:], ("", None)]):
        inside = replace(reading, path=f"{reading.path}.{name}", input_shape=shape)
        shape = None if shape is None else output_shape(child, shape)
        if merged:
            merged = False
            continue
        merged = type(after) is MERGED.get(type(child), "") and rules.get(type(child)) is _weighted
        merged = merged and rules.get(type(after)) is _floored and not reading.any_weights
        merged = merged and not _computes_a_weight(child) and "forward" not in {**vars(child), **vars(after)}
        behind = f"{reading.path}.{next_name}"
        bounds.append(_linear(child, inside, after, behind) if merged else lipschitz_bound(child, inside, rules))
    return product_of(bounds)


def _weighted(module, reading, rules) -> "float | Bounds":
    if reading.any_weights:
        return module.operator_norm_supremum(reading.input_shape) if isinstance(module, Normalised) else math.inf
    return _linear(module, reading)


def _linear(module: nn.Module, reading: Reading, after: nn.Module | None = None, behind: str = "") -> "float | Bounds":
    """A linear layer with its present weight, and a floored normalisation behind it, which stands at the path ``behind``."""
    weight = module.effective_weight() if isinstance(module, Normalised) else module.weight
    supremum = module.operator_norm_supremum() if isinstance(module, Normalised) else math.inf
    geometry, factor = (), 1.0
    if not isinstance(module, nn.Linear):
        names = ("stride", "padding", "dilation", "groups", "padding_mode")
        geometry = tuple((name, getattr(module, name)) for name in names)
        factor = geometry_factor(
            module.kernel_size, *(getattr(module, n) for n in ("stride", "padding", "dilation", "padding_mode"))
        )
    rows, least = None, 1.0
    if after is not None:
        supremum = math.inf
        rows = None if after.weight is None else _wide(after.weight) / after.floor
        least = after.floor if rows is None else 1.0
    part = LinearPart(reading.path, weight, rows, geometry, factor, supremum, "" if rows is None else behind)
    if reading.linear is not None:
        return reading.linear(part) * (1.0 / least * (1 + 2.0**-50))
    if weight.is_meta:
        raise ValueError(
            f"{reading.path}: the weight is on the meta device, and its values are needed. Load them first."
        )
    shape = reading.input_shape if not isinstance(module, TRANSPOSED) else None
    bound = tight_bound(part, acting_weight(part).detach(), shape)
    if rows is not None:
        bound = up(bound + product_up([factor, float(acting_weight(part).detach().double().norm()), 2.0**-21]), 3)
    return quotient_up(bound, least)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _diagonal(gamma: Tensor | None, floor: float, reading: Reading) -> "float | Bounds":
    """max |gamma| / floor."""
    if floor <= 0.0:
        return math.inf
    if gamma is None:
        return quotient_up(1.0, floor)
    if reading.any_weights:
        return math.inf
    part = DiagonalPart(reading.path, gamma, floor)
    return float(bounds_of_diagonal(part).proved) if reading.linear is None else reading.diagonal(part)


def _floored(module, reading, rules) -> "float | Bounds":
    return _diagonal(module.weight, module.floor, reading)


def _normalised_samples(module, reading, rules) -> "float | Bounds":
    """max |gamma| / eps^(1/2), in both modes: eps is the floor of the variance."""
    return _diagonal(module.weight, down(math.sqrt(module.eps)) if module.eps > 0 else 0.0, reading)


def _pooled_conv(module, reading, rules) -> "float | Bounds":
    return sum_of(_weighted(module, reading, rules), 1.0)


def _pooled_sequential(module, reading, rules) -> "float | Bounds":
    return sum_of(_sequential(module, reading, rules), 1.0)


def _preactivation(module, reading, rules) -> "float | Bounds":
    """L(branch) L(before) + L(shortcut), the shortcut's with L(before) unless it reads x."""
    reading = replace(reading, input_shape=None)
    through = {
        part: product_of(
            [
                lipschitz_bound(module.get_submodule(n), replace(reading, path=f"{reading.path}.{n}"), rules)
                for n in names
            ]
        )
        for part, names in module.layer_names.items()
    }
    reads_x = module.shortcut_reads_input or not module.layer_names["shortcut"]
    shortcut = through["shortcut"] if reads_x else product_of([through["before"], through["shortcut"]])
    return sum_of(product_of([through["before"], through["branch"]]), shortcut)


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
    in_training = 0.0 if module.p == 1 else up(1.0 / (1.0 - module.p), 2)
    if reading.any_weights or reading.any_mode:
        return max(in_training, 1.0)
    return in_training if module.training else 1.0


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


def _adaptive_pool(module, reading, rules) -> float:
    """prod over the axes of 1 where there are n >= out pixels or one bin, else out^(1/2): the bins that meet in a pixel.

    Means, n >= out: a pixel in two bins is at an edge between whole pixels, so both bins hold two or more, and the
    columns of the matrix sum to at most 1, as the rows do. Maxima: two bins meet in a pixel, or all out of them.
    """
    axes = int(type(module).__name__[-2])
    mean = "Avg" in type(module).__name__
    sizes = [None] * axes if reading.input_shape is None else reading.input_shape[-axes:]
    meeting = [
        1 if out in (None, 1) else out if n is None or n < out else 1 if mean or n % out == 0 else 2
        for out, n in zip(_tuple(module.output_size, axes), sizes)
    ]
    return root_up(math.prod(meeting))


def _tuple(value, axes: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * axes


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _why_infinite(module: nn.Module) -> str:
    if type(module) in WEIGHTED:
        kind = type(module).__name__
        known = "" if type(module) in TRANSPOSED else f"; use EntryNorm{kind} or WeightNorm{kind} instead"
        return f"Its weight may be as large as it likes{known}."
    if getattr(module, "leak", 0) > 0:
        return f"With leak={module.leak:g} its weight is unbounded; use leak=0."
    if isinstance(module, nn.Softplus):
        return "Below a threshold of 20 torch's softplus jumps; use Softplus0."
    return "Make its constants and weights such that it has one."


INSTEAD = {
    **{
        norm: f"A batch of small variance makes it as steep as it likes; use Floored{norm.__name__}.from_module on it."
        for norm in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    },
    nn.SyncBatchNorm: "A batch of small variance makes it as steep as it likes; use FlooredBatchNorm1d, 2d or 3d.",
    **{
        norm: "An image of small variance makes it as steep as it likes; use FlooredBatchNorm1d, 2d or 3d."
        for norm in (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    },
    nn.PReLU: "Its slope is a parameter that no rule reads; use LeakyReLU or SmoothReLU instead.",
}

ISOMETRIES = (nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)
PADDINGS = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
SLOPE_ONE = (nn.ReLU, nn.ReLU6, nn.Tanh, nn.Softsign, nn.Hardtanh, nn.LogSigmoid, nn.Tanhshrink, nn.Softshrink)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
MERGED = {nn.Conv2d: FlooredBatchNorm2d, nn.Conv3d: FlooredBatchNorm3d}  # others may count channels on another axis
FLOORED = (FlooredBatchNorm1d, FlooredBatchNorm2d, FlooredBatchNorm3d)
OURS = (EntryNormLinear, EntryNormConv1d, EntryNormConv2d, EntryNormConv3d)
OURS += (WeightNormLinear, WeightNormConv1d, WeightNormConv2d, WeightNormConv3d)
OURS += (SpectralNormLinear, SpectralNormConv1d, SpectralNormConv2d, SpectralNormConv3d)
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
ADAPTIVE = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
ADAPTIVE += (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)

RULES: dict[type, Rule] = {
    nn.Sequential: _sequential,
    **{module: Slope(1.0) for module in (*ISOMETRIES, *PADDINGS, *SLOPE_ONE)},
    **{module: _weighted for module in (*OURS, *WEIGHTED)},
    **{module: _floored for module in FLOORED},
    **{module: _normalised_samples for module in (nn.LayerNorm, nn.GroupNorm)},
    **{module: _adaptive_pool for module in ADAPTIVE},
    PooledConv2d: _pooled_conv,
    PooledSequential: _pooled_sequential,
    PreActivationBlock: _preactivation,
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
