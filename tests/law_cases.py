"""The modules that tests/test_laws.py holds to its laws, and the broken ones that each law must catch."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import trainable_nn as tnn


@dataclass(frozen=True)
class Case:
    """A module to build, the shape of one sample, and what is claimed of it."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    bound: Callable[[nn.Module], float] = lambda module: math.inf
    keys: tuple[str, ...] = ()
    says: tuple[str, ...] = ()


def _layer(build, shape, *says: str) -> Case:
    return Case(build, shape, lambda m: m.operator_norm_bound(shape), ("weight", "bias"), says)


def _activation(build) -> Case:
    return Case(build, (3, 4), lambda m: m.slope_bound, (), ())


def _residual() -> nn.Module:
    layers = (tnn.WeightNormConv2d(2, 4, 3, stride=2, padding=1), tnn.Softplus0(), tnn.EntryNormConv2d(4, 4, 1))
    return tnn.SpectrallyBoundedResidual(nn.Sequential(*layers), tnn.OrthogonalDownsample2d(2, 4), bound=0.7)


def _contractive() -> nn.Module:
    layers = (tnn.SpectralNormConv2d(2, 4, 3, stride=2, padding=1), tnn.GELU1(), tnn.WeightNormConv2d(4, 4, 1))
    return tnn.ContractiveResidual(nn.Sequential(*layers), tnn.OrthogonalDownsample2d(2, 4), strength=0.7)


def _plain_residual() -> nn.Module:
    layers = (
        nn.Conv2d(2, 4, 3, 2, 1),
        tnn.FlooredBatchNorm2d(4, track_running_stats=False),
        nn.GELU(),
        nn.LeakyReLU(0.3),
    )
    branch = nn.Sequential(*layers, nn.Conv2d(4, 4, 1, groups=2, bias=False))
    return tnn.SpectrallyBoundedResidual(branch, tnn.OrthogonalDownsample2d(2, 4), bound=0.7)


def _residual_bound(block: nn.Module) -> float:
    return 1.0 + block.certified_bound((2, 6, 4))


_RESIDUAL_KEYS = ("branch.0.weight", "branch.0.bias", "branch.2.weight", "branch.2.bias")

CASES = {
    "EntryNormLinear": _layer(
        lambda: tnn.EntryNormLinear(6, 4, eps=0.5, gain=1.3, leak=0.2), (6,), "eps=0.5", "gain=1.3", "leak=0.2"
    ),
    "WeightNormLinear": _layer(lambda: tnn.WeightNormLinear(6, 4, eps=0.5, gain=1.3), (6,), "eps=0.5", "gain=1.3"),
    "EntryNormConv1d": _layer(
        lambda: tnn.EntryNormConv1d(4, 6, 3, padding=1, groups=2, leak=0.3), (4, 7), "groups=2", "leak=0.3"
    ),
    "EntryNormConv2d": _layer(
        lambda: tnn.EntryNormConv2d(3, 4, 3, 2, padding=1, padding_mode="circular", eps=0.1), (3, 6, 6), "eps=0.1"
    ),
    "EntryNormConv3d": _layer(lambda: tnn.EntryNormConv3d(2, 3, 2, padding="same"), (2, 3, 4, 3), "padding=same"),
    "WeightNormConv1d": _layer(
        lambda: tnn.WeightNormConv1d(3, 4, 3, padding="same", padding_mode="reflect"), (3, 7), "reflect"
    ),
    "WeightNormConv2d": _layer(
        lambda: tnn.WeightNormConv2d(4, 6, (3, 2), (1, 2), dilation=2, groups=2, gain=0.8), (4, 7, 6), "gain=0.8"
    ),
    "WeightNormConv3d": _layer(lambda: tnn.WeightNormConv3d(2, 3, 2, 1, 1, eps=3.0), (2, 3, 3, 2), "eps=3"),
    "SpectralNormLinear": _layer(
        lambda: tnn.SpectralNormLinear(6, 4, eps=0.5, gain=1.3, power=2), (6,), "eps=0.5", "gain=1.3", "power=2"
    ),
    "SpectralNormConv1d": _layer(
        lambda: tnn.SpectralNormConv1d(4, 6, 3, padding=1, groups=2, eps=0.02, power=2),
        (4, 7),
        "groups=2",
        "bound=symbol",
    ),
    "SpectralNormConv2d": _layer(
        lambda: tnn.SpectralNormConv2d(3, 4, 3, 2, padding=1, padding_mode="reflect", eps=0.02, power=4),
        (3, 6, 6),
        "power=4",
        "bound=symbol",
    ),
    "SpectralNormConv2d by its kernel": _layer(
        lambda: tnn.SpectralNormConv2d(3, 4, 3, padding="same", power=1, gain=0.6, bound="kernel"),
        (3, 6, 5),
        "bound=kernel",
    ),
    "SpectralNormConv3d": _layer(lambda: tnn.SpectralNormConv3d(2, 3, 2, dilation=2, power=1), (2, 3, 4, 3), "power=1"),
    **{
        activation.__name__: _activation(activation)
        for activation in (
            tnn.Arctan,
            tnn.Erf1,
            tnn.GELU1,
            tnn.ISRU,
            tnn.SiLU1,
            tnn.SmoothReLU,
            tnn.SoftSign,
            tnn.Softplus0,
            tnn.Tanh,
        )
    },
    "OrthogonalDownsample2d": Case(
        lambda: tnn.OrthogonalDownsample2d(3, 5), (3, 4, 6), lambda m: 1.0, (), ("3, 5", "stride=2")
    ),
    "OrthogonalDownsample2d by 3": Case(
        lambda: tnn.OrthogonalDownsample2d(2, 7, 3), (2, 6, 3), lambda m: 1.0, (), ("2, 7", "stride=3")
    ),
    "OrthogonalReadout": Case(
        lambda: tnn.OrthogonalReadout((3, 2, 4), 5), (3, 2, 4), lambda m: 1.0, (), ("(3, 2, 4), 5",)
    ),
    "ContractiveResidual": Case(_contractive, (2, 6, 4), lambda m: 1.7, _RESIDUAL_KEYS, ("strength=0.7", "scale=")),
    "SpectrallyBoundedResidual": Case(
        _residual, (2, 6, 4), _residual_bound, ("tightness", *_RESIDUAL_KEYS), ("bound=0.7", "scale=")
    ),
    "SpectrallyBoundedResidual of plain layers": Case(
        _plain_residual,
        (2, 6, 4),
        _residual_bound,
        ("tightness", "branch.0.weight", "branch.0.bias", "branch.1.weight", "branch.1.bias", "branch.4.weight"),
        ("bound=0.7", "scale="),
    ),
    "FlooredBatchNorm2d without running statistics": Case(
        lambda: tnn.FlooredBatchNorm2d(3, floor=0.8, smooth=True, track_running_stats=False),
        (3, 4, 6),
        lambda m: float(m.weight.abs().max()) / 0.8,
        ("weight", "bias"),
        ("floor=0.8", "smooth=True"),
    ),
}
NOT_IMAGES = {"OrthogonalReadout"}  # an image goes in and a vector comes out
IMAGES = {name: case for name, case in CASES.items() if len(case.shape) in (3, 4) and name not in NOT_IMAGES}


class Broken(nn.Linear):
    """A layer that a flaw makes wrong; every flaw is one that real layers have had."""

    def __init__(self, flaw: str) -> None:
        super().__init__(6, 4)
        self.flaw, self.constant = flaw, 0.7
        self.hidden = torch.eye(6)  # neither buffer nor parameter: nothing moves it
        self.register_buffer("fixed", torch.eye(6), persistent=False)  # lost by to_empty
        self.kept = self.weight * 2 if flaw == "keeps a computed tensor" else None

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, "_" + self.flaw.replace(" ", "_"))(x)

    def _keeps_a_computed_tensor(self, x):
        return nn.functional.linear(x, self.kept, self.bias)

    def _multiplies_by_a_hidden_tensor(self, x):
        return super().forward(x @ self.hidden)

    def _multiplies_by_a_lost_buffer(self, x):
        return super().forward(x @ self.fixed)

    def _answers_on_the_processor(self, x):
        return torch.zeros(len(x), 4)

    def _casts_by_hand(self, x):
        return super().forward(x).float() @ self.weight.bfloat16()

    def _branches_on_data(self, x):
        return super().forward(x) if bool(x.sum() > 0) else super().forward(-x)

    def _asks_whether_a_constant_is_finite(self, x):
        return super().forward(x) * (self.constant if math.isfinite(self.constant) else 0.0)

    def _has_no_tangent(self, x):
        return nn.functional.linear(x, torch._weight_norm(self.weight, self.weight[:, :1], 0))

    def _differentiates_once(self, x):
        return _Once.apply(x) @ self.weight.T

    def _divides_by_its_norm(self, x):
        return nn.functional.linear(x, self.weight / self.weight.norm(dim=1, keepdim=True))


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Flattens(nn.Conv2d):
    """A convolution that gives its image back in torch's default layout."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).contiguous()


class Boasts(tnn.EntryNormLinear):
    """A layer that claims half of its bound."""

    def operator_norm_bound(self, input_shape=None) -> float:
        return super().operator_norm_bound(input_shape) / 2


def broken(flaw: str, **claims) -> Case:
    return Case(lambda: Broken(flaw), (6,), **claims)


PARAMETRISED = Case(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), (6,), keys=("weight", "bias"))
COUNTEREXAMPLES = {
    "the bound encloses the truth": _layer(lambda: Boasts(6, 4), (6,)),
    "state_dict keeps torch's keys": PARAMETRISED,
    "a deep copy is equal and apart": broken("keeps a computed tensor"),
    "a pickle is equal": PARAMETRISED,
    "a module built on meta can be filled": broken("multiplies by a lost buffer", keys=("weight", "bias")),
    "every dtype moves and agrees": broken("multiplies by a hidden tensor"),
    "every device moves and agrees": broken("answers on the processor"),
    "channels last is kept": Case(lambda: Flattens(3, 4, 3), (3, 6, 6), keys=("weight", "bias")),
    "autocast agrees to 8 bits": broken("casts by hand"),
    "it compiles to one graph": broken("branches on data"),
    "it compiles for every batch size": broken("asks whether a constant is finite"),
    "it exports": broken("branches on data"),
    "gradients of samples agree under vmap": broken("branches on data"),
    "forward mode agrees with reverse mode": broken("has no tangent"),
    "second derivatives agree with differences": broken("differentiates once"),
    "training mode changes nothing": Case(lambda: nn.Dropout(0.5), (6,)),
    "zero weights give finite values and slopes": broken("divides by its norm"),
    "repr says the constants": Case(lambda: nn.Linear(6, 4), (6,), says=("eps=",)),
}
