"""Batch normalisation whose denominator has a floor, so that no batch makes it steep."""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import ConversionError
from ..ops import batch_norm


class FlooredBatchNorm:
    r"""y = gamma (x - mu) / m(s) + beta with s = (var + eps)^(1/2) and a denominator m(s) >= floor; else torch's own.

    Where s is at least ``floor`` (``smooth=True``: twice the floor) y is torch's BatchNorm, to the last bit where that
    holds for every channel: mu and var are the batch's in training and the running ones in evaluation, momentum and
    buffers as torch's, keys too.

    For every batch, every x and both modes \|\|J\|\|_2 <= max_c abs(gamma_c) / floor, J the Jacobian of the whole batch. In
    training, with n values of a channel, u their centred direction and v = (1, ..., 1) / n^(1/2), J is gamma / m on the
    complement of u and v, 0 on v, and gamma / m * (1 - var m'(s) / (s m)) on u; that factor is in [-1, 1] since
    0 <= s m'(s) <= 2 m. In evaluation J is diagonal. Torch's own has gamma / s, up to gamma / eps^(1/2).

    m(s) = max(s, floor), which has a kink; or, with ``smooth=True``, m(s) = floor + s^2 / (4 floor) below 2 floor and s
    above: m' is Lipschitz, so y is a C^{1,1} function of x and of all weights before it, as descent theorems ask.

    Shape:
        As torch's layer.
    Cost:
        Torch's layer; in a training step after which channels fall below the floor, or leave it all, the passes forward
        are made twice. Compiled, under torch.func, in forward mode and on CUDA also the variance, and its derivative.
    Raises:
        ValueError: floor is not above 0 and finite; and whatever torch's layer raises.
        ConversionError: ``SyncBatchNorm.convert_sync_batchnorm`` meets the layer, which it would take for torch's own and
        give back without the floor.
    Source:
        THEORY section 5 (floored); the smooth form is ours.
    """

    plain_type: type[nn.Module]
    _was_below = False  # some channel, in the last batch: decides what is tried first, not what comes out

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device=None,
        dtype=None,
        *,
        floor: float = 0.5,
        smooth: bool = False,
    ) -> None:
        if not 0.0 < floor < float("inf"):
            raise ValueError(f"{type(self).__name__}: floor must be above 0 and finite, got {floor}. Try 0.5.")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.floor, self.smooth = float(floor), bool(smooth)

    @classmethod
    def from_module(cls, plain: nn.Module, *, floor: float = 0.5, smooth: bool = False) -> "FlooredBatchNorm":
        """The floored form of torch's layer: same parameters and buffers by value, mode and requires_grad; no hooks.

        Raises:
            ConversionError: plain is not exactly torch's layer of this kind, or a lazy one.
        """
        if type(plain) is not cls.plain_type or any(is_lazy(p) for p in plain.parameters()):
            raise ConversionError(
                f"{cls.__name__}.from_module: needed a torch.nn.{cls.plain_type.__name__} with its shape known, got "
                f"{type(plain).__module__}.{type(plain).__qualname__}. Give the plain layer."
            )
        state = [*plain.parameters(), *plain.buffers()]
        new = cls(
            plain.num_features, plain.eps, plain.momentum, plain.affine, plain.track_running_stats,
            device=state[0].device if state else None, dtype=state[0].dtype if state else None,
            floor=floor, smooth=smooth,
        )  # fmt: skip
        new.load_state_dict(plain.state_dict())
        for ours, theirs in zip(new.parameters(), plain.parameters()):
            ours.requires_grad_(theirs.requires_grad)
        return new.train(plain.training)

    @property
    def qconfig(self):
        """Torch's attribute of quantisation; the one that ``convert_sync_batchnorm`` asks for and a forward pass does not."""
        if sys._getframe(1).f_code is nn.SyncBatchNorm.convert_sync_batchnorm.__func__.__code__:
            raise ConversionError(
                f"SyncBatchNorm.convert_sync_batchnorm: found a {type(self).__name__} of {self.num_features} channels, whose "
                f"floor {self.floor:g} it would drop, and with it the bound. Convert the other modules one by one, or "
                f"replace this layer by torch.nn.{self.plain_type.__name__} first if the bound is not needed."
            )
        if "qconfig" not in vars(self):
            raise AttributeError(f"{type(self).__name__} has no attribute qconfig: none was set.")
        return vars(self)["qconfig"]

    @qconfig.setter
    def qconfig(self, value) -> None:
        vars(self)["qconfig"] = value

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        momentum = self._count_batch()
        of_batch = self.training or self.running_mean is None
        tracked = not self.training or self.track_running_stats
        mean, var = (self.running_mean, self.running_var) if tracked else (None, None)
        if of_batch and batch_norm.runs_eagerly(x, mean, var, self.weight, self.bias):
            return self._of_batch(x, mean, var, momentum)
        return self._composed(x, self.weight, self.bias, mean, var, of_batch, momentum)

    def _composed(self, x, weight, bias, mean, var, of_batch: bool, momentum: float) -> Tensor:
        """By torch's differentiable operations, and torch's own layer with gamma s / m(s)."""
        weight = self._weight(weight, self._variance(x) if of_batch else self.running_var, x)
        return F.batch_norm(x, mean, var, weight, bias, of_batch, momentum, self.eps)

    def _of_batch(self, x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float) -> Tensor:
        """In training, by torch's own kernels alone: its layer where no channel is below the floor."""
        weight, bias, eps, kink = self.weight, self.bias, self.eps, 2.0 * self.floor if self.smooth else self.floor
        running = running_mean, running_var
        if not self._was_below:
            y, _, inverse = torch.native_batch_norm(x, weight, bias, *running, True, momentum, eps)
            if inverse.amax().item() * kink <= 1.0:
                return y
            running = None, None  # they have moved
        mean, var = batch_norm.batch_statistics(x, *running, momentum)
        below = batch_norm.largest_inverse(var, eps) * kink > 1.0
        if below is not self._was_below:
            self._was_below = below
        if not below:
            return torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)[0]
        formula = lambda x, weight, bias: self._composed(x, weight, bias, None, None, True, 0.0)
        return batch_norm.normalise_batch(x, weight, bias, mean, *self._denominator(var), formula)

    def _denominator(self, var: Tensor) -> tuple[Tensor, Tensor]:
        """1 / m(s) and (m'(s) / (s m(s)))^(1/2)"""
        if not self.smooth:
            inverse, steepest = (var + self.eps).rsqrt_(), 1.0 / self.floor
            none = batch_norm.NO_SLOPE[var.dtype] * steepest
            return inverse.clamp(max=steepest), inverse.masked_fill(inverse > steepest, none)
        s = (var + self.eps).sqrt_()
        short = s < 2.0 * self.floor
        inverse = torch.where(short, self.floor + s.square() / (4.0 * self.floor), s).reciprocal_()
        return inverse, torch.where(short, (inverse / (2.0 * self.floor)).sqrt_(), inverse)

    def acting_weight(self) -> Tensor:
        """gamma s / m(s) for the running variance: with it in the place of gamma torch's layer gives the same in evaluation."""
        return self._weight(self.weight, self.running_var, self.running_mean)

    def _count_batch(self) -> float:
        """The weight of this batch in the running statistics, as torch counts."""
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        return momentum

    def _weight(self, weight: Tensor | None, var: Tensor, x: Tensor) -> Tensor:
        """gamma s / m(s), which torch's layer then divides by s."""
        shrink = self._shrink(var)
        if weight is None:
            return shrink.to(x.dtype if shrink.dtype != torch.float64 else shrink.dtype)
        return (weight * shrink).to(weight.dtype)

    def _shrink(self, var: Tensor) -> Tensor:
        """s / m(s)"""
        var = var.float() if var.dtype in (torch.float16, torch.bfloat16) else var
        ratio = (var + self.eps).sqrt() / self.floor
        return torch.where(ratio < 2, ratio / (1 + ratio.square() / 4), 1.0) if self.smooth else ratio.clamp(max=1.0)

    @staticmethod
    def _variance(x: Tensor) -> Tensor:
        axes = [0, *range(2, x.dim())]
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return wide.var(axes, correction=0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, floor={self.floor:g}" + (", smooth=True" if self.smooth else "")


class FlooredBatchNorm1d(FlooredBatchNorm, nn.BatchNorm1d):
    __doc__ = FlooredBatchNorm.__doc__
    plain_type = nn.BatchNorm1d


class FlooredBatchNorm2d(FlooredBatchNorm, nn.BatchNorm2d):
    __doc__ = FlooredBatchNorm.__doc__
    plain_type = nn.BatchNorm2d


class FlooredBatchNorm3d(FlooredBatchNorm, nn.BatchNorm3d):
    __doc__ = FlooredBatchNorm.__doc__
    plain_type = nn.BatchNorm3d
