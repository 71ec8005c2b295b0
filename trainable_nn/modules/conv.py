"""Convolutions of one, two and three axes whose kernel is normalised in forward."""

from torch import Tensor, nn

from .. import functional
from .normalised import EntryNormalised, WeightNormalised


class EntryNormConvNd(EntryNormalised):
    r"""Convolution with kernel P(w) = gain * w (eps + w^2)^(-1/2) + leak * w, entry by entry; arguments as torch's.

    Each entry of P(w) is below gain where leak = 0. The parameter ``weight`` is w, with torch's shape, name and
    initial values; ``effective_weight()`` is P(w).

    Shape:
        As torch's layer. weight: (out_channels, in_channels / groups, kernel_size...).
    Raises:
        ValueError: eps outside [1e-30, 1e30], gain not positive, leak negative, or one of them not finite; and
        whatever torch's layer raises.
    Source:
        Paper A, Example A.2; its leak is THEORY 4(a).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
        *,
        eps: float = 1.0,
        gain: float = 1.0,
        leak: float = 0.0,
    ) -> None:
        arguments = (kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype)
        super().__init__(in_channels, out_channels, *arguments)
        self._set_constants(eps=eps, gain=gain, leak=leak)

    def forward(self, x: Tensor) -> Tensor:
        return functional.entry_norm_conv(
            x,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.padding_mode,
            eps=self.eps,
            gain=self.gain,
            leak=self.leak,
        )


class WeightNormConvNd(WeightNormalised):
    r"""Convolution with kernel P(w) = gain * w (eps + abs(w_filter)^2)^(-1/2), filter by filter; arguments as torch's.

    Each filter of P(w) is shorter than gain, a zero filter stays zero, and nothing is divided by zero. The parameter
    ``weight`` is w, with torch's shape, name and initial values; ``effective_weight()`` is P(w).

    Shape:
        As torch's layer. weight: (out_channels, in_channels / groups, kernel_size...).
    Raises:
        ValueError: eps outside [1e-30, 1e30], or gain not positive and finite; and whatever torch's layer raises.
    Source:
        Paper A, Example A.2, Lemma A.7.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
        *,
        eps: float = 1.0,
        gain: float = 1.0,
    ) -> None:
        arguments = (kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype)
        super().__init__(in_channels, out_channels, *arguments)
        self._set_constants(eps=eps, gain=gain)

    def forward(self, x: Tensor) -> Tensor:
        return functional.weight_norm_conv(
            x,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.padding_mode,
            eps=self.eps,
            gain=self.gain,
        )


class EntryNormConv1d(EntryNormConvNd, nn.Conv1d):
    __doc__ = EntryNormConvNd.__doc__
    plain_type = nn.Conv1d


class EntryNormConv2d(EntryNormConvNd, nn.Conv2d):
    __doc__ = EntryNormConvNd.__doc__
    plain_type = nn.Conv2d


class EntryNormConv3d(EntryNormConvNd, nn.Conv3d):
    __doc__ = EntryNormConvNd.__doc__
    plain_type = nn.Conv3d


class WeightNormConv1d(WeightNormConvNd, nn.Conv1d):
    __doc__ = WeightNormConvNd.__doc__
    plain_type = nn.Conv1d


class WeightNormConv2d(WeightNormConvNd, nn.Conv2d):
    __doc__ = WeightNormConvNd.__doc__
    plain_type = nn.Conv2d


class WeightNormConv3d(WeightNormConvNd, nn.Conv3d):
    __doc__ = WeightNormConvNd.__doc__
    plain_type = nn.Conv3d


WeightNormConv = WeightNormConv2d
