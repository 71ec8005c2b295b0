"""One differentiable function from three kernels: a map, its first and its second derivative.

Both normalisations are gradients of a potential, so their Jacobian is symmetric and
one kernel serves backward and forward mode:

    value(w, ...)         P(w)
    first(g, w, ...)      DP(w) g
    second(v, g, w, ...)  the gradient in w of <v, DP(w) g>

torch offers no single registration that serves every transform: with
``torch.library.register_autograd`` forward mode returns zero without a word and
``torch.func.grad`` fails; a Function with a ``jvp`` rule does not compile.
So the function takes the first of four ways that fits, and each is exact:

* while compiling: a Function without ``jvp`` whose parts are formulas, which the compiler
  fuses with their neighbours; inside a transform, and in an export, the formula itself,
  which the tracer differentiates;
* under ``torch.func`` and in forward mode: Functions with ``setup_context``, ``jvp`` and a
  vmap rule;
* where plain autograd records: the older style of Function, a third of the cost per call;
* otherwise the kernel itself.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

_transforming = torch._C._are_functorch_transforms_active  # what Function.apply itself asks
_recording = torch.is_grad_enabled
_compiling, _exporting = torch.compiler.is_compiling, torch.compiler.is_exporting


@dataclass(frozen=True)
class Formulas:
    """The three maps in plain PyTorch: reference, and what a compiler sees."""

    value: Callable[..., Tensor]
    first: Callable[..., Tensor]
    second: Callable[..., Tensor]


@dataclass(frozen=True)
class Kernels:
    """The three maps as operators.

    ``second`` returns (DP(w) v, gradient in w) and ``pair`` (P(w), DP(w) g), in one pass each.
    """

    value: Callable[..., Tensor]
    first: Callable[..., Tensor]
    second: Callable[..., tuple[Tensor, Tensor]]
    pair: Callable[..., tuple[Tensor, Tensor]]


@staticmethod
def _keep_inputs(ctx, inputs, output):
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
    ctx.constants = inputs[len(tensors) :]


def differentiable(formulas: Formulas, kernels: Kernels, fold_batch: Callable) -> Callable[..., Tensor]:
    """A function f(w, \\*constants) of a tensor and floats, differentiable in w to any order.

    ``fold_batch(tensors, dims)`` moves vmap's dimension into the rows of the map: it
    returns tensors of one shape and a function that takes the dimension out again, at 0.
    """

    class Gradient(Function):
        @staticmethod
        def forward(g, w, *constants):
            return kernels.first(g, w, *constants)

        setup_context = _keep_inputs

        @staticmethod
        def backward(ctx, v):
            g, w = ctx.saved_tensors
            to_g, to_w = ctx.needs_input_grad[:2]
            if to_w and nothing_differentiates(v, g, w):
                d_g, d_w = kernels.second(v, g, w, *ctx.constants)
            else:
                d_g = first(v, w, *ctx.constants) if to_g else None
                d_w = formulas.second(v, g, w, *ctx.constants) if to_w else None
            return (d_g, d_w, *_nones(ctx))

        @staticmethod
        def jvp(ctx, t_g, t_w, *_):
            g, w = ctx.saved_tensors
            terms = [] if t_g is None else [first(t_g, w, *ctx.constants)]
            if t_w is not None:
                terms.append(formulas.second(t_w, g, w, *ctx.constants))
            return sum(terms[1:], terms[0])

        @staticmethod
        def vmap(info, dims, g, w, *constants):
            (g, w), unfold = fold_batch((g, w), dims[:2], info.batch_size)
            return unfold(first(g, w, *constants)), 0

    class Value(Function):
        @staticmethod
        def forward(w, *constants):
            return kernels.value(w, *constants)

        setup_context = _keep_inputs

        @staticmethod
        def backward(ctx, g):
            (w,) = ctx.saved_tensors
            return (first(g, w, *ctx.constants), *_nones(ctx))

        @staticmethod
        def jvp(ctx, t_w, *_):
            (w,) = ctx.saved_tensors
            return first(t_w, w, *ctx.constants)

        @staticmethod
        def vmap(info, dims, w, *constants):
            (w,), unfold = fold_batch((w,), dims[:1], info.batch_size)
            return unfold(value(w, *constants)), 0

    class Recorded(Function):
        """The constants come as one argument: each costs time of its own, forward and backward."""

        @staticmethod
        def forward(ctx, w, constants):
            ctx.save_for_backward(w)
            ctx.constants = constants
            return kernels.value(w, *constants)

        @staticmethod
        def backward(ctx, g):
            (w,) = ctx.saved_tensors
            if _recording() or _transforming() or forward_ad._current_level >= 0:
                return first(g, w, *ctx.constants), None
            return kernels.first(g, w, *ctx.constants), None

    class Compiled(Function):
        @staticmethod
        def forward(ctx, w, *constants):
            ctx.save_for_backward(w)
            ctx.constants = constants
            return formulas.value(w, *constants)

        @staticmethod
        def backward(ctx, g):
            (w,) = ctx.saved_tensors
            return (formulas.first(g, w, *ctx.constants), *_nones(ctx))

    def first(g: Tensor, w: Tensor, *constants: float) -> Tensor:
        if nothing_differentiates(g, w):
            return kernels.first(g, w, *constants)
        return Gradient.apply(g, w, *constants)

    record = super(Function, Recorded).apply  # Function.apply only looks for transforms first; there are none

    def value(w: Tensor, *constants: float) -> Tensor:
        if _compiling():
            if _transforming() or _exporting():
                return formulas.value(w, *constants)
            return Compiled.apply(w, *constants)
        if _transforming() or forward_ad._current_level >= 0:
            return Value.apply(w, *constants)
        if w.requires_grad and _recording():
            return record(w, constants)
        return kernels.value(w, *constants)

    return value


def _nones(ctx) -> tuple[None, ...]:
    return (None,) * len(ctx.constants)


def nothing_differentiates(*tensors: Tensor) -> bool:
    """Whether no mode of differentiation watches: then the bare kernel may run."""
    if forward_ad._current_level >= 0 or _transforming():
        return False
    return not (_recording() and any(tensor.requires_grad for tensor in tensors))
