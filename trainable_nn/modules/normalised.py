"""What a layer with a normalised weight can say of itself: the weight that acts, bounds of its operator norm."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import functional
from ..linop import matrix_norm_at_most, operator_norm_at_most
from ..theory.convolution import geometry_factor
from ..theory.parameterisations import EntryNormConstants, WeightNormConstants
from ..theory.rounding import product_up, up
from .from_plain import layer_from_module


class Normalised:
    """A layer whose weight is P(w); ``weight`` is the free parameter w. Comes before torch's layer among the bases."""

    plain_type: type[nn.Module]
    option_names: tuple[str, ...]
    derived_names: tuple[str, ...] = ()  # attributes that follow from options and geometry

    def effective_weight(self) -> Tensor:
        """P(w), the weight that acts, differentiable in w."""
        raise NotImplementedError

    def constants(self) -> EntryNormConstants | WeightNormConstants:
        """The constants of P: suprema, slopes and their Lipschitz constant."""
        raise NotImplementedError

    def operator_norm_bound(self, input_shape: Sequence[int] | None = None) -> float:
        """A proved upper bound of ||x -> W x|| for the weight that acts now, W = ``effective_weight()``.

        It holds for W as the operator computes it in the layer's dtype and, for float32 and float64 weights, for the
        exact P(w) and every order of its arithmetic. It is never above ``operator_norm_supremum``.

        Shape:
            input_shape: the image's sizes, with or without channels and batch before them; without it the bound
            holds for every size. A linear layer needs none.
        Cost:
            ``matrix_norm_at_most`` for each group, and ``linop.operator_norm_at_most`` of a convolution.
        Raises:
            ValueError: the weight is on the meta device or not finite, or input_shape gives no output.
        """
        if self.weight.is_meta:
            raise ValueError(
                f"{type(self).__name__}.operator_norm_bound: the weight is on the meta device, and its values are "
                f"needed. Load them first, or use operator_norm_supremum."
            )
        groups, rows, columns = self._matrices()
        weight = self.effective_weight().detach().reshape(groups, rows, columns)
        norm = max((matrix_norm_at_most(matrix) for matrix in weight), default=0.0)
        allowance = self.constants().norm_allowance(rows, columns, _roundoff(self.weight.dtype))
        matrix = product_up([norm, self._geometry_factor(input_shape)])
        tight = matrix if self.weight.dim() == 2 or norm == 0.0 else min(matrix, operator_norm_at_most(self, input_shape))
        bound = up(tight + product_up([matrix, up(allowance)]), 2)  # P's rounding is a kernel too, bounded as a matrix
        return min(bound, self.operator_norm_supremum(input_shape))

    def operator_norm_supremum(self, input_shape: Sequence[int] | None = None) -> float:
        """An upper bound of ||x -> P(w) x|| that holds for every w, with the rounding of P in the layer's dtype.

        Infinite where P is unbounded (leak > 0).

        Raises:
            ValueError: input_shape gives no output.
        """
        _, rows, columns = self._matrices()
        constants = self.constants()
        supremum = constants.operator_norm_supremum(rows, columns)
        allowance = constants.rounding_allowance(columns, _roundoff(self.weight.dtype))
        stored = 2.0**-8 if self.weight.dtype in (torch.float16, torch.bfloat16) else 0.0
        return product_up([supremum, up(1.0 + allowance), 1.0 + stored, self._geometry_factor(input_shape)])

    @classmethod
    def from_module(cls, plain: nn.Module, *, nearest: bool = False, **options: float) -> "Normalised":
        """A layer whose effective weight equals ``plain.weight`` to rounding; options are eps, gain (and leak).

        Bias, device, dtype, memory format, training mode and requires_grad are kept; hooks are not.

        Raises:
            ConversionError: plain is no plain torch layer of this kind (or a subclass with a forward of its own,
            a parametrised or a lazy one), its weight is not finite or not real floats, or a value is out of P's
            range: ``nearest=True`` then takes the nearest in range instead, where gradients are almost zero.
        """
        return layer_from_module(cls, plain, nearest=nearest, options=options)

    def extra_repr(self) -> str:
        values = {name: getattr(self, name) for name in self.option_names}
        options = ", ".join(f"{name}={v if isinstance(v, str) else f'{v:g}'}" for name, v in values.items())
        return f"{super().extra_repr()}, {options}"

    def _inverse_options(self) -> dict:
        """What the inverse of P is told beside the weight."""
        return {name: getattr(self, name) for name in self.option_names}

    def _matrices(self) -> tuple[int, int, int]:
        """(groups, rows, columns) of the weight as one matrix for each group."""
        rows, columns = self.weight.shape[0], math.prod(self.weight.shape[1:])
        groups = getattr(self, "groups", 1)
        return groups, rows // groups, columns

    def _geometry_factor(self, input_shape: Sequence[int] | None) -> float:
        if self.weight.dim() == 2:
            return 1.0
        return geometry_factor(
            self.kernel_size, self.stride, self.padding, self.dilation, self.padding_mode, input_shape
        )


class EntryNormalised(Normalised):
    """P(w) = gain * w (eps + w^2)^(-1/2) + leak * w, entry by entry."""

    option_names = ("eps", "gain", "leak")

    def effective_weight(self) -> Tensor:
        """P(w), the weight that acts, differentiable in w."""
        return functional.entry_norm(self.weight, self.eps, gain=self.gain, leak=self.leak)

    def normalisation(self) -> tuple[str, tuple[float, ...]]:
        """The operator that is P, and its constants, for products that fuse it."""
        return "entry_norm", (self.eps, self.gain, self.leak)

    def constants(self) -> EntryNormConstants:
        """The constants of P: suprema, slopes and their Lipschitz constant."""
        return EntryNormConstants(self.eps, self.gain, self.leak)

    @staticmethod
    def _inverse(p: Tensor, **options) -> Tensor:
        return functional.entry_norm_inverse(p, **options)

    def _set_constants(self, **constants: float) -> None:
        functional.check_constants(type(self).__name__, **constants)
        self.eps, self.gain, self.leak = (float(constants[name]) for name in self.option_names)


class WeightNormalised(Normalised):
    """P(w) = gain * w (eps + |w_row|^2)^(-1/2), row by row; a filter of a convolution is one row."""

    option_names = ("eps", "gain")

    def effective_weight(self) -> Tensor:
        """P(w), the weight that acts, differentiable in w."""
        return functional.weight_norm(self.weight, self.eps, gain=self.gain)

    def normalisation(self) -> tuple[str, tuple[float, ...]]:
        """The operator that is P, and its constants, for products that fuse it."""
        return "weight_norm", (self.eps, self.gain)

    def constants(self) -> WeightNormConstants:
        """The constants of P: suprema, slopes and their Lipschitz constant."""
        return WeightNormConstants(self.eps, self.gain)

    @staticmethod
    def _inverse(p: Tensor, **options) -> Tensor:
        return functional.weight_norm_inverse(p, **options)

    def _set_constants(self, **constants: float) -> None:
        functional.check_constants(type(self).__name__, **constants)
        self.eps, self.gain = (float(constants[name]) for name in self.option_names)


def _roundoff(dtype: torch.dtype) -> float:
    """Unit roundoff of the arithmetic that P is computed in: 16-bit weights are computed in float32."""
    return 2.0**-53 if dtype == torch.float64 else 2.0**-24
