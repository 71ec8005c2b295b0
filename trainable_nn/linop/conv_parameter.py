"""The Jacobian of a convolution in its parameters, and its products joint with the one in its input."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap

from ..ops import convolution as fused
from .convolution_reader import Convolution, check_values, read_convolution
from .fused import geometry_arguments, may_fuse, normalisation_of
from .geometry import geometry_of
from .linear_map import LinearMap
from .without_autocast import without_autocast

WHERE = "ConvParameterJacobian"
CHUNK = 64  # columns that go through at once: each brings a kernel or a gradient of its own


class ConvParameterJacobian(LinearMap):
    r"""D = d conv(x, P(w)) / dw at given inputs x, of shape (outputs, parameters), both flattened row by row.

    By the chain rule D_w = D_kernel DP(w): DP is the derivative of ``effective_weight()`` for this package's layers, of
    torch's parametrisations where there are some, and the identity for a plain layer or kernel. With ``bias=True`` the
    columns of the bias follow: (D_w, D_b). ``joint_mv``, ``joint_tangent`` and ``joint_rmv`` take x along; where
    nothing is differentiated (``torch.no_grad``, no transform), one vector goes through one fused operator.

    Shape:
        conv_or_weight: as for ``ToeplitzConv``. x: (batch, channels, sizes...) or one sample without the batch.
        A vector is (n,); several are the columns of (n, k).
    Cost:
        ``mv`` one convolution, ``rmv`` one gradient of a kernel per column, ``chunk_size`` columns at once, and one
        derivative of P; ``joint_mv`` of one vector three convolutions, ``joint_rmv`` two gradients.
    Raises:
        TypeError, ValueError: as ``ToeplitzConv``, and for an x of another dtype, without values or not finite.
    Source:
        Paper A, equations (18) and (21): D = ((Id x X^T) DP(w), Id x 1), with X the patches of x.
    """

    gram_side = "outputs"

    def __init__(
        self,
        conv_or_weight,
        x: Tensor,
        *,
        bias: bool = False,
        stride=1,
        padding=0,
        dilation=1,
        groups: int = 1,
        padding_mode: str = "zeros",
        transposed: bool = False,
        output_padding=0,
        chunk_size: int = CHUNK,
    ) -> None:
        arguments = {
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
            "padding_mode": padding_mode,
            "transposed": transposed,
            "output_padding": output_padding,
        }
        read = read_convolution(WHERE, conv_or_weight, arguments)
        _check(read.kernel, x, chunk_size)
        single = x.dim() == read.kernel.dim() - 1
        self.x, self.chunk_size = x, chunk_size
        self._batch = x.unsqueeze(0) if single else x
        self.geometry = geometry_of(WHERE, read.kernel.shape, self._batch.shape[1:], **read.arguments)
        self.transposed, self.layer_bias, self.has_bias = read.arguments["transposed"], read.bias, bias
        self._kernel, self.parameters = _parameterised(read)
        # torch's own weight_norm has none; our layers, and a plain kernel, do
        self._has_forward_mode = read.source is None or not nn.utils.parametrize.is_parametrized(read.source.layer)
        self.dtype, self.device = x.dtype, x.device
        self._normalisation = normalisation_of(read) if len(self.parameters) == 1 else None
        self._parameter = next(iter(self.parameters.values()), None)
        self._arguments = geometry_arguments(self.geometry, self.transposed)
        self._pads = self.geometry.pads and not self.transposed
        narrow, wide = self.geometry.narrow, self.geometry.wide
        self._sample = wide if self.transposed else narrow
        self.input_shape = x.shape
        self.output_shape = torch.Size(self._sample if single else (len(self._batch), *self._sample))
        self.kernel_parameters = sum(p.numel() for p in self.parameters.values())
        columns = self.kernel_parameters + (self._sample[0] if bias else 0)
        self.shape = (self.output_shape.numel(), columns)

    @without_autocast
    def gram_mv(self, vectors: Tensor, *, side: str = "outputs") -> Tensor:
        """D D^T u on the side "outputs", the default: the layer's part of the NTK; D^T D v on the side "inputs"."""
        return self._gram(vectors, side)

    @without_autocast
    def joint_mv(self, dw: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
        r"""(y, D dw + J dx): the layer's output, bias included, and its tangent, both flattened.

        Shape:
            dw: (parameters,) or (parameters, k). dx: (x.numel(),) or (x.numel(), k). y: (outputs,).
        """
        if self._fuses("joint_mv", (dw, self.shape[1]), (dx, self.x.numel())):
            y, t = fused.jvp(*self._tangents(dw, dx), self.layer_bias, *self._normalisation, *self._arguments)
            return y.view(-1), self._along_bias(t, dw).view(-1)
        kernel = self._kernel(self.parameters)
        y = self._form(self._batch, kernel)
        if self.layer_bias is not None:
            y = y + self._along_pixels(self.layer_bias)
        return y.flatten(), self._joint_tangent("joint_mv", kernel, dw, dx)

    @without_autocast
    def joint_tangent(self, dw: Tensor, dx: Tensor) -> Tensor:
        """D dw + J dx alone, what ``joint_mv`` returns second: two convolutions."""
        if self._fuses("joint_tangent", (dw, self.shape[1]), (dx, self.x.numel())):
            t = fused.tangent(*self._tangents(dw, dx), *self._normalisation, *self._arguments)
            return self._along_bias(t, dw).view(-1)
        return self._joint_tangent("joint_tangent", self._kernel(self.parameters), dw, dx)

    @without_autocast
    def joint_rmv(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(D^T u, J^T u), the adjoint of the tangent of ``joint_mv``: (parameters,) and (x.numel(),), or columns."""
        if self._fuses("joint_rmv", (u, self.shape[0])):
            u = u.reshape(-1, *self._sample)
            x = self.geometry.padded(self._batch) if self._pads else self._batch
            dw, dx = fused.vjp(u, self._parameter, x, *self._normalisation, *self._arguments)
            dx = self.geometry.unpadded(dx) if self._pads else dx
            return self._with_bias(dw.flatten(), u), dx.flatten()
        dw = self._apply("joint_rmv", self._pull, u, self.shape[0], self.shape[1])
        return dw, self._apply("joint_rmv", self._pull_x, u, self.shape[0], self.x.numel())

    def _fuses(self, name: str, *vectors: tuple[Tensor, int]) -> bool:
        """Whether one operator does it; the vectors and their lengths are checked."""
        for vector, length in vectors:
            self._check(vector, name, length)
        if self._normalisation is None or any(vector.dim() != 1 for vector, _ in vectors):
            return False
        bias = self._parameter if self.layer_bias is None else self.layer_bias
        return may_fuse(*(vector for vector, _ in vectors), self._parameter, self._batch, bias)

    def _tangents(self, dw: Tensor, dx: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dw, dx, w and x as the operators take them."""
        w, x = self._parameter, self._batch
        dw, dx = (dw[: self.kernel_parameters] if self.has_bias else dw).reshape(w.shape), dx.reshape(x.shape)
        return (dw, self.geometry.padded(dx), w, self.geometry.padded(x)) if self._pads else (dw, dx, w, x)

    def _along_bias(self, t: Tensor, dw: Tensor) -> Tensor:
        return t + self._along_pixels(dw[self.kernel_parameters :]) if self.has_bias else t

    def _with_bias(self, dw: Tensor, u: Tensor) -> Tensor:
        return torch.cat((dw, u.transpose(0, 1).flatten(1).sum(1))) if self.has_bias else dw

    def _joint_tangent(self, name: str, kernel: Tensor, dw: Tensor, dx: Tensor) -> Tensor:
        if dw.shape[1:] != dx.shape[1:]:
            raise ValueError(
                f"{WHERE}.{name}: dw and dx need as many columns, got shapes {tuple(dw.shape)} and {tuple(dx.shape)}."
            )
        along_w = self._apply(name, self._push, dw, self.shape[1], self.shape[0])
        return along_w + self._apply(name, partial(self._push_x, kernel), dx, self.x.numel(), self.shape[0])

    def _push(self, rows: Tensor) -> Tensor:
        return self._mapped(self._push_one, rows)

    def _pull(self, rows: Tensor) -> Tensor:
        return self._mapped(self._pull_one, rows)

    def _mapped(self, product, rows: Tensor) -> Tensor:
        if len(rows) == 1:
            return product(rows[0]).unsqueeze(0)
        return vmap(product, chunk_size=self.chunk_size)(rows.contiguous())

    def _push_one(self, dw: Tensor) -> Tensor:
        own, db = dw[: self.kernel_parameters], dw[self.kernel_parameters :]
        y = self._form(self._batch, self._push_kernel(own))
        return (y + self._along_pixels(db) if self.has_bias else y).flatten()

    def _pull_one(self, u: Tensor) -> Tensor:
        u = u.reshape(-1, *self._sample)
        wide, narrow = (u, self._batch) if self.transposed else (self._batch, u)
        return self._with_bias(self._pull_kernel(self.geometry.kernel_adjoint(wide, narrow)), u)

    def _push_x(self, kernel: Tensor, rows: Tensor) -> Tensor:
        x = rows.reshape(-1, *self._batch.shape[1:])
        return self._form(x, kernel).reshape(-1, self.shape[0])

    def _pull_x(self, rows: Tensor) -> Tensor:
        product = self.geometry.correlate if self.transposed else self.geometry.scatter
        x = product(rows.reshape(-1, *self._sample), self._kernel(self.parameters))
        return x.reshape(-1, self.x.numel())

    def _form(self, x: Tensor, kernel: Tensor) -> Tensor:
        return self.geometry.scatter(x, kernel) if self.transposed else self.geometry.correlate(x, kernel)

    def _along_pixels(self, bias: Tensor) -> Tensor:
        return bias.reshape(-1, *(1,) * self.geometry.axes)

    def _push_kernel(self, dw: Tensor) -> Tensor:
        """DP(w) dw, as a kernel."""
        parts = dw.split([p.numel() for p in self.parameters.values()])
        tangents = {name: part.reshape(p.shape) for (name, p), part in zip(self.parameters.items(), parts)}
        if self._has_forward_mode:
            return jvp(self._kernel, (self.parameters,), (tangents,))[1]
        zero = torch.zeros(self.geometry.kernel, dtype=self.dtype, device=self.device)
        transpose = vjp(self._kernel, self.parameters)[1]
        return vjp(transpose, zero)[1]((tangents,))[0]  # the transpose of the transpose

    def _pull_kernel(self, dk: Tensor) -> Tensor:
        """DP(w)^T dk, flat."""
        (gradients,) = vjp(self._kernel, self.parameters)[1](dk)
        return torch.cat([gradients[name].flatten() for name in self.parameters])


def _parameterised(read: Convolution) -> tuple[Callable, dict[str, Tensor]]:
    """P as a function of the dictionary of free parameters, and these."""
    if read.source is None or read.source.is_identity:
        return (lambda parameters: parameters["weight"]), {"weight": read.kernel}
    source = read.source
    return (lambda parameters: functional_call(source, parameters, ())), source.parameters_of_kernel()


def _check(kernel: Tensor, x: Tensor, chunk_size: int) -> None:
    if chunk_size < 1:
        raise ValueError(f"{WHERE}: chunk_size must be at least 1, got {chunk_size}.")
    if kernel.is_complex():
        raise TypeError(f"{WHERE}: the weight must be real, got {kernel.dtype}. Use ToeplitzConv for complex weights.")
    if not isinstance(x, Tensor) or x.dim() not in (kernel.dim() - 1, kernel.dim()):
        found = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"{WHERE}: x must be (batch, channels, {kernel.dim() - 2} sizes) or one such sample, got {found}."
        )
    check_values(WHERE, "input", x)
    if (x.dtype, x.device) != (kernel.dtype, kernel.device):
        raise TypeError(
            f"{WHERE}: the weight has {kernel.dtype} on {kernel.device}, the input {x.dtype} on {x.device}. "
            f"Convert the input."
        )
