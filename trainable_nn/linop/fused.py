"""When a product of a convolution runs as one operator of ``ops.convolution``, and that operator's arguments."""

import torch
from torch import Tensor

from ..ops.convolution import IDENTITY
from ..ops.differentiable import nothing_differentiates
from .convolution_reader import Convolution
from .geometry import Geometry

_compiling = torch.compiler.is_compiling


def normalisation_of(read: Convolution) -> tuple[str, tuple[float, ...]] | None:
    """(operator, constants) of the map P from the one free parameter to the kernel; None: P is something else.

    A layer tells it by a method ``normalisation``, which counts only where ``effective_weight`` is of the same class:
    a subclass that overrides one of them computes another kernel.
    """
    if read.source is None or read.source.is_identity:
        return IDENTITY, ()
    layer = read.source.layer
    if "effective_weight" in vars(layer) or "weight" not in layer._parameters:
        return None
    owner = next((cls for cls in type(layer).__mro__ if "effective_weight" in vars(cls)), None)
    if owner is None or "normalisation" not in vars(owner) or type(layer).normalisation is not owner.normalisation:
        return None
    return layer.normalisation()


def geometry_arguments(geometry: Geometry, transposed: bool) -> tuple:
    """Stride, padding, dilation, transposed, output_padding and groups of ``aten::convolution``, after ``F.pad``."""
    extra = (0,) * geometry.axes
    if transposed:
        reached = (
            (m - 1) * s - 2 * p + d * (t - 1) + 1
            for m, s, p, d, t in zip(
                geometry.narrow[1:], geometry.stride, geometry.padding, geometry.dilation, geometry.kernel[2:]
            )
        )
        extra = tuple(n - r for n, r in zip(geometry.wide[1:], reached))
    return geometry.stride, geometry.padding, geometry.dilation, transposed, extra, geometry.groups


def may_fuse(*tensors: Tensor) -> bool:
    """Whether the operators, which differentiate nothing, may run: no autograd, transform or compiler watches.

    The tensors are real: the operators know no others.
    """
    return not _compiling() and nothing_differentiates(*tensors)
