"""The library of schemas, and how one operator joins it: schema, reference, fake kernel.

The raw operators differentiate nothing and are private; what they compute is made
differentiable in ``differentiable.py``. A compiled library adds kernels under the
same names for its device.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .differentiable import Formulas, Kernels

_library = torch.library.Library("trainable_nn", "DEF")  # kept: its end would take the schemas away


def define(schema: str, reference: Callable, fake: Callable, *, equal_operands: bool = True) -> Callable:
    """Register one operator; returns what its overload calls, a seventh of a small call's time sooner.

    ``equal_operands``: whether the reference refuses tensors that differ, as the compiled kernels do.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    checked = _of_equal_operands(name, reference) if equal_operands else reference
    _library.impl(name, checked, "CompositeExplicitAutograd")
    torch.library.register_fake(f"trainable_nn::{name}", fake, lib=_library)
    return getattr(torch.ops.trainable_nn, name).default._op


def define_map(name: str, constants: str, formulas: Formulas) -> Kernels:
    """Register the operators of one map: NAME, NAME_backward, NAME_double_backward and NAME_pair."""

    def both(v: Tensor, g: Tensor, w: Tensor, *c: float) -> tuple[Tensor, Tensor]:
        return like(w, formulas.first(v, w, *c)), like(w, formulas.second(v, g, w, *c))

    def pair(g: Tensor, w: Tensor, *c: float) -> tuple[Tensor, Tensor]:
        return like(w, formulas.value(w, *c)), like(w, formulas.first(g, w, *c))

    return Kernels(
        value=define(
            f"{name}(Tensor w, {constants}) -> Tensor",
            lambda w, *c: like(w, formulas.value(w, *c)),
            lambda w, *c: torch.empty_like(w),
        ),
        first=define(
            f"{name}_backward(Tensor g, Tensor w, {constants}) -> Tensor",
            lambda g, w, *c: like(w, formulas.first(g, w, *c)),
            lambda g, w, *c: torch.empty_like(w),
        ),
        second=define(
            f"{name}_double_backward(Tensor v, Tensor g, Tensor w, {constants}) -> (Tensor, Tensor)",
            both,
            lambda v, g, w, *c: (torch.empty_like(w), torch.empty_like(w)),
        ),
        pair=define(
            f"{name}_pair(Tensor g, Tensor w, {constants}) -> (Tensor, Tensor)",
            pair,
            lambda g, w, *c: (torch.empty_like(w), torch.empty_like(w)),
        ),
    )


def _of_equal_operands(name: str, reference: Callable) -> Callable:
    """The reference, refusing what the compiled kernels refuse."""

    def checked(*arguments):
        first, *others = (a for a in arguments if isinstance(a, Tensor))
        for other in others:
            if (first.shape, first.dtype, first.device) != (other.shape, other.dtype, other.device):
                raise RuntimeError(f"trainable_nn::{name}: gradient and weight differ in shape, dtype or device")
        return reference(*arguments)

    return checked


def like(w: Tensor, result: Tensor) -> Tensor:
    """The result in the dtype and the strides that every kernel gives: those of empty_like(w)."""
    out = torch.empty_like(w)
    return out.copy_(result)
