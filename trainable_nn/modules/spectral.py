"""Layers whose operator norm stays below gain for every value of their parameters: weights over a smooth norm bound."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import functional
from ..linop import FrequencyGrid, frequency_grid, operator_norm_at_most
from ..theory.convolution import sides
from ..theory.rounding import product_up, quotient_up, up
from ..theory.schatten import ENTRY_ROUNDINGS, SchattenNormConstants
from .normalised import Normalised, _roundoff

SYMBOL_CHANNELS = 64  # on the smaller side of a group; at 128 the grid costs half of a training step of the layer
SYMBOL_POINTS = 8192  # of a grid, memory's limit


class SchattenNormalised(Normalised):
    """P(w) = gain * w (eps + L(w)^2)^(-1/2), L(w) a smooth upper bound of the operator norm, group by group."""

    option_names = ("eps", "gain", "power")
    derived_names = ("_factor", "_grid")
    _factor: float = 1.0
    _grid: FrequencyGrid | None = None

    def effective_weight(self) -> Tensor:
        """P(w), the weight that acts, differentiable in w."""
        return functional.schatten_norm(self.weight, self.eps, self.power, **self._norm_options())

    def constants(self) -> SchattenNormConstants:
        """The constants of P on one group: suprema, slopes and their Lipschitz constant."""
        _, rows, columns = self._matrices()
        if self._grid is None:
            return SchattenNormConstants(self.eps, self.gain, self.power, min(rows, columns), self._factor)
        channels = self.weight.shape[1] * (max(self._grid.phases) + 1)
        shape = (min(rows, channels), self._grid.factor, self._grid.points, self._grid.taps)
        return SchattenNormConstants(self.eps, self.gain, self.power, *shape)

    def operator_norm_bound(self, input_shape: Sequence[int] | None = None) -> float:
        """A proved upper bound of ||x -> W x|| for the weight that acts now, W = ``effective_weight()``.

        It holds for W as the operator computes it in the layer's dtype and, for float32 and float64 weights, for the
        exact P(w). It is never above ``operator_norm_supremum``.

        Shape:
            input_shape: the image's sizes, with or without channels and batch before them; without it the bound
            holds for every size. A linear layer needs none.
        Cost:
            That of ``linop.operator_norm_at_most``.
        Raises:
            ValueError: the weight is on the meta device or not finite, or input_shape gives no output.
        """
        if self._grid is None or self.weight.is_meta:
            return super().operator_norm_bound(input_shape)
        supremum, overlap = self.operator_norm_supremum(input_shape), self._geometry_factor(input_shape)
        _, _, columns = self._matrices()
        norm = up(operator_norm_at_most(self, input_shape) * up(1.0 + 2.0 * self.constants().length_allowance(columns)), 2)
        length = float(torch.linalg.vector_norm(self.effective_weight().detach().double())) * (1.0 + 2.0**-20)
        rounding = product_up([overlap, 2.0 * ENTRY_ROUNDINGS * _roundoff(self.weight.dtype), length])
        return min(up(norm + rounding), supremum)

    def operator_norm_supremum(self, input_shape: Sequence[int] | None = None) -> float:
        """An upper bound of ||x -> P(w) x|| that holds for every w, with the rounding of P in the layer's dtype.

        It is gain but for rounding; for a convolution whose norm is bounded by its kernel's, less where an image of
        that shape uses its pixels less often.

        Raises:
            ValueError: input_shape gives no output.
        """
        overlap = self._geometry_factor(input_shape)
        _, rows, columns = self._matrices()
        if rows * columns == 0:
            return 0.0
        constants, dtype = self.constants(), self.weight.dtype
        overlap_of_rounding = product_up([overlap, constants.kappa, torch.finfo(dtype).eps])  # twice the unit roundoff
        denormals = up(math.sqrt(rows * columns) * overlap * torch.finfo(dtype).smallest_normal, 4)
        supremum = constants.operator_norm_supremum()
        if self._grid is None:
            supremum = product_up([supremum, min(1.0, quotient_up(overlap, self._factor))])
        error = up(constants.length_allowance(max(rows, columns)) + overlap_of_rounding)
        return up(supremum * up(1.0 + error) + denormals, 2)

    @staticmethod
    def _inverse(p: Tensor, **options) -> Tensor:
        return functional.schatten_norm_inverse(p, **options)

    def _inverse_options(self) -> dict:
        return {"eps": self.eps, "power": self.power, **self._norm_options()}

    def _norm_options(self) -> dict:
        groups, _, _ = self._matrices()
        return {"gain": self.gain, "groups": groups, "factor": self._factor, "grid": self._grid}

    def _set_constants(self, *, eps: float, gain: float, power: int) -> None:
        functional.check_constants(type(self).__name__, eps=eps, gain=gain)
        functional.check_power(type(self).__name__, power)
        self.eps, self.gain, self.power = float(eps), float(gain), power


class SpectralNormLinear(SchattenNormalised, nn.Linear):
    r"""y = x P(w)^T + b with P(w) = gain * w (eps + S(w)^2)^(-1/2), S(w) = (tr (w w^T)^p)^(1/(2p)), p = power.

    \|\|P(w)\|\|_2 < gain for every w, and all singular values keep their ratios. S is from 1 to rank^(1/(2p)) times the spectral
    norm, and unlike it smooth: p = 1 is the Frobenius norm, and each doubling of p costs one product of matrices of the
    smaller side. The parameter ``weight`` is w, with torch's shape, name and initial values; ``effective_weight()`` is P(w).

    Shape:
        x: (\*, n) -> y: (\*, m). weight: (m, n). bias: (m,).
    Raises:
        ValueError: eps outside [1e-30, 1e30], gain not positive and finite, or power no power of two.
    Source:
        THEORY 5.
    """

    plain_type = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        eps: float = 1.0,
        gain: float = 1.0,
        power: int = 16,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._set_constants(eps=eps, gain=gain, power=power)

    def forward(self, x: Tensor) -> Tensor:
        return functional.schatten_norm_linear(
            x, self.weight, self.bias, eps=self.eps, gain=self.gain, power=self.power
        )


class SpectralNormConvNd(SchattenNormalised):
    r"""Convolution with kernel P(w) = gain * w (eps + L(w)^2)^(-1/2), group by group; arguments as torch's.

    The operator norm of x -> y is below gain for every w and images of every size, since L(w) is an upper bound of the
    operator norm of the convolution with kernel w, and a smooth one:

    bound="symbol": the Schatten-2p norm of the polyphase symbol on a coarse grid of frequencies (``linop.frequency_grid``). For
        random weights and p = 16 it is 1.1 to 1.2 times the norm; it costs some frequencies' worth of products in c^3.
    bound="kernel": the Schatten-2p norm of the kernel as a matrix, times the root of the uses of one pixel. Cheap,
        and about 2 times the norm of a random 3 x 3 kernel of stride 1; 1.0 times where patches don't overlap.
    bound="auto": "symbol" where patches overlap and the smaller side of a group has at most 64 channels, else
        "kernel". ``layer.bound`` says which it is.

    The parameter ``weight`` is w, with torch's shape, name and initial values; ``effective_weight()`` is P(w).

    Shape:
        As torch's layer. weight: (out_channels, in_channels / groups, kernel_size...).
    Raises:
        ValueError: eps outside [1e-30, 1e30], gain not positive and finite, power no power of two, or another
        bound; and whatever torch's layer raises.
    Source:
        THEORY 5; the grid's constant is ours.
    """

    option_names = ("eps", "gain", "power", "bound")

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
        power: int = 16,
        bound: str = "auto",
    ) -> None:
        arguments = (kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype)
        super().__init__(in_channels, out_channels, *arguments)
        self._set_constants(eps=eps, gain=gain, power=power)
        self._set_bound(bound)

    def forward(self, x: Tensor) -> Tensor:
        return functional.schatten_norm_conv(
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
            power=self.power,
            factor=self._factor,
            grid=self._grid,
        )

    def _set_bound(self, bound: str) -> None:
        if bound not in ("auto", "symbol", "kernel"):
            raise ValueError(
                f"{type(self).__name__}: bound must be 'auto', 'symbol' or 'kernel', got {bound!r}. Choose one of them."
            )
        factor = self._geometry_factor(None)
        pads = sides(self.kernel_size, self.padding, self.dilation)
        grid = frequency_grid(self.kernel_size, self.stride, pads, self.dilation, self.padding_mode, self.power)
        _, rows, _ = self._matrices()
        side = min(rows, self.weight.shape[1] * (max(grid.phases) + 1))
        if bound == "auto":
            worth = 1 < grid.points <= SYMBOL_POINTS and side <= SYMBOL_CHANNELS
            bound = "symbol" if worth else "kernel"
        if grid.points == 1:
            factor = min(factor, grid.factor)  # without overlap the symbol is the kernel
        self.bound = bound
        self._factor, self._grid = (1.0, grid) if bound == "symbol" and grid.points > 1 else (factor, None)


class SpectralNormConv1d(SpectralNormConvNd, nn.Conv1d):
    __doc__ = SpectralNormConvNd.__doc__
    plain_type = nn.Conv1d


class SpectralNormConv2d(SpectralNormConvNd, nn.Conv2d):
    __doc__ = SpectralNormConvNd.__doc__
    plain_type = nn.Conv2d


class SpectralNormConv3d(SpectralNormConvNd, nn.Conv3d):
    __doc__ = SpectralNormConvNd.__doc__
    plain_type = nn.Conv3d
