"""The Jacobian of a network's outputs in its parameters, as a linear operator: products only, unless asked for more."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from .gram.network import Network
from .linear_map import LinearMap

WHERE = "ParameterJacobian"
CHUNK = 8  # columns that go through the network at once: each brings activations of its own
ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-9}  # of an inner product through a deep network


class ParameterJacobian(LinearMap):
    r"""J = d model(x) / d theta at the model's parameters, of shape (N C, parameters).

    Rows are the outputs, sample by sample: row i C + c is output c of sample i. Columns are the parameters that
    require gradients, in the order of ``named_parameters``, each flattened; a shared one stands there once. The model
    is used as it is, in its mode, and nothing is left on it; change no parameter while the operator is in use.

    Shape:
        x: (N, ...), one batch; the model gives (N, ...), C numbers a sample. A vector is (n,); several are the
        columns of (n, k).
    Cost:
        ``mv`` one forward-mode pass for each column, ``rmv`` one backward pass through a graph that is kept;
        ``chunk_size`` columns at once. ``dense`` as many as the smaller side has, and (N C) x parameters numbers.
    Raises:
        TypeError, ValueError: as ``ntk``; and for a vector of another length, dtype or device.
    Source:
        Paper A, Theorem 2.4: DF; its Gram matrix on the outputs' side is the neural tangent kernel.
    """

    gram_side = "outputs"

    def __init__(self, model: nn.Module, x: Tensor, *, chunk_size: int = CHUNK) -> None:
        if chunk_size < 1:
            raise ValueError(f"{WHERE}: chunk_size must be at least 1, got {chunk_size}.")
        if not isinstance(x, Tensor):
            raise TypeError(f"{WHERE}: x must be a tensor, one batch, got {type(x).__name__}.")
        if x.dim() == 0 or len(x) == 0:
            raise ValueError(f"{WHERE}: x must hold at least one sample on its first axis, got shape {tuple(x.shape)}.")
        self._network = Network(model, WHERE)
        self.model = self._network.model
        self.chunk_size, self.dtype, self.device = chunk_size, self._network.dtype, self._network.device
        self.x = x.detach().to(self.device)
        self._y, _ = self._network.forward(self.x)
        self.output_shape = self._y.shape
        self.parameters = self._network.parameters
        self._way: Callable[[Tensor], Tensor] | None = None
        self.shape = (self._y.numel(), sum(p.numel() for p in self.parameters.values()))

    def gram_mv(self, vectors: Tensor, *, side: str = "outputs") -> Tensor:
        """J J^T u on the side "outputs", the default: the kernel times u; J^T J v on the side "inputs"."""
        return self._gram(vectors, side)

    def split(self, v: Tensor) -> dict[str, Tensor]:
        """A vector of parameters as tensors by name."""
        self._check(v, "split", self.shape[1])
        parts = v.split([p.numel() for p in self.parameters.values()])
        return {name: part.reshape(p.shape) for (name, p), part in zip(self.parameters.items(), parts)}

    def _outputs(self, parameters: dict[str, Tensor]) -> Tensor:
        return self._network.call(parameters, self.x)

    def _push(self, rows: Tensor) -> Tensor:
        if self._way is None:
            self._way = self._way_that_agrees()
        return self._each(self._way, rows)

    def _way_that_agrees(self) -> Callable[[Tensor], Tensor]:
        """Forward mode, if <u, J v> = <J^T u, v> to rounding at random u and v; else the transpose of the transpose.

        Forward mode is missing for some operations, and differs from reverse mode for others: it moves the padding row
        of an embedding, which has no gradient, and custom operators can leave it out without a word.
        """
        draw = torch.Generator().manual_seed(0)
        options = {"generator": draw, "dtype": self.dtype}
        u, v = (torch.randn(n, **options).to(self.device) for n in self.shape)
        try:
            forward = self._forward_mode(v)
        except (NotImplementedError, RuntimeError):
            return self._transposed_twice
        expected = self._pull(u.unsqueeze(0))[0] @ v
        close = ROUNDING[self.dtype] * float(u.norm() * forward.norm())
        return self._forward_mode if abs(float(u @ forward - expected)) <= close else self._transposed_twice

    def _forward_mode(self, v: Tensor) -> Tensor:
        point = {name: p.detach() for name, p in self.parameters.items()}
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention has neither forward mode nor second derivatives
            return jvp(self._outputs, (point,), (self.split(v),))[1].flatten()

    def _transposed_twice(self, v: Tensor) -> Tensor:
        point = {name: p.detach() for name, p in self.parameters.items()}
        zero = torch.zeros(self.output_shape, dtype=self.dtype, device=self.device)
        with sdpa_kernel(SDPBackend.MATH):
            pull = vjp(self._outputs, point)[1]
            return vjp(pull, zero)[1]((self.split(v),))[0].flatten()

    def _pull(self, rows: Tensor) -> Tensor:
        parameters = list(self.parameters.values())

        def pulled(u: Tensor, batched: bool) -> tuple:
            return torch.autograd.grad(
                self._y, parameters, u, retain_graph=True, allow_unused=True, is_grads_batched=batched
            )

        found = []
        for part in rows.reshape(len(rows), *self.output_shape).split(self.chunk_size):
            try:
                values = pulled(part, True) if len(part) > 1 else [_one(v) for v in pulled(part[0], False)]
            except RuntimeError:  # a custom Function without a vmap rule
                each = [pulled(u, False) for u in part]
                values = [None if v[0] is None else torch.stack(v) for v in zip(*each)]
            filled = [p.new_zeros(len(part), p.numel()) if v is None else v.reshape(len(part), -1) for p, v in zip(parameters, values)]
            found.append(torch.cat(filled, 1).detach())
        return torch.cat(found)

    def _each(self, product: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        if len(rows) > 1:
            try:
                return vmap(product, chunk_size=self.chunk_size)(rows.contiguous()).detach()
            except RuntimeError:  # batch statistics that are updated in place, or a Function without a vmap rule
                pass
        return torch.stack([product(row) for row in rows]).detach()


def _one(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.unsqueeze(0)
