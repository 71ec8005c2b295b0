"""The Jacobian of a function at a point, as a linear operator: products only, unless asked for the matrix."""

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK = 64  # columns that go through the function at once


class Jacobian:
    r"""J = df/dx at x, of shape (outputs, inputs), both flattened row by row as ``Tensor.flatten`` does.

    Shape:
        f: a function or module of one tensor, differentiable by ``torch.func``. x: any shape.
        A vector is (n,); several are the columns of (n, k).
    Cost:
        ``mv`` one forward-mode, ``rmv`` one reverse-mode pass for each column, ``chunk_size`` columns at
        once; ``dense`` as many as the smaller side has.
    """

    def __init__(self, f: Callable[[Tensor], Tensor], x: Tensor, *, chunk_size: int = CHUNK) -> None:
        if chunk_size < 1:
            raise ValueError(f"Jacobian: chunk_size must be at least 1, got {chunk_size}.")
        self.f, self.x, self.chunk_size = f, x.detach(), chunk_size
        with torch.no_grad():
            y = f(self.x)
        self._output_shape, self.dtype = y.shape, y.dtype
        self.shape = (y.numel(), x.numel())

    def mv(self, v: Tensor) -> Tensor:
        """J v."""
        return self._columns(self._push, self._checked(v, 1, "mv"), self.shape[0])

    def rmv(self, u: Tensor) -> Tensor:
        """J^T u."""
        return self._columns(self._pull, self._checked(u, 0, "rmv"), self.shape[1])

    def gram_mv(self, u: Tensor) -> Tensor:
        """J J^T u, on the output side, where the smallest singular value of a layer is taken."""
        return self.mv(self.rmv(u))

    def dense(self) -> Tensor:
        """The matrix (outputs, inputs)."""
        outputs, inputs = self.shape
        options = {"dtype": self.dtype, "device": self.x.device}
        if inputs <= outputs:
            return self.mv(torch.eye(inputs, **options))
        return self.rmv(torch.eye(outputs, **options)).T

    def to_scipy(self):
        """A ``scipy.sparse.linalg.LinearOperator`` on numpy arrays of the same dtype."""
        from scipy.sparse.linalg import LinearOperator  # scipy is no dependency of the layers

        def on_arrays(product):
            def apply(array):
                vector = torch.tensor(array, dtype=self.dtype, device=self.x.device)
                return product(vector).detach().cpu().numpy()

            return apply

        return LinearOperator(
            self.shape,
            matvec=on_arrays(lambda v: self.mv(v.flatten())),
            rmatvec=on_arrays(lambda u: self.rmv(u.flatten())),
            matmat=on_arrays(self.mv),
            rmatmat=on_arrays(self.rmv),
            dtype=torch.empty(0, dtype=self.dtype).numpy().dtype,
        )

    def _push(self, v: Tensor) -> Tensor:
        return torch.func.jvp(self.f, (self.x,), (v.reshape(self.x.shape),))[1].flatten()

    def _pull(self, u: Tensor) -> Tensor:
        return torch.func.vjp(self.f, self.x)[1](u.reshape(self._output_shape))[0].flatten()

    def _columns(self, product: Callable, vectors: Tensor, rows: int) -> Tensor:
        if vectors.dim() == 1:
            return product(vectors)
        if vectors.shape[1] == 0:
            return vectors.new_zeros(rows, 0)
        mapped = torch.func.vmap(product, in_dims=1, out_dims=1, chunk_size=self.chunk_size)
        return mapped(vectors.contiguous())

    def _checked(self, vectors: Tensor, side: int, name: str) -> Tensor:
        if vectors.dim() not in (1, 2) or vectors.shape[0] != self.shape[side]:
            raise ValueError(
                f"Jacobian.{name}: a vector ({self.shape[side]},) or columns ({self.shape[side]}, k) are needed, "
                f"got shape {tuple(vectors.shape)}. Flatten the tensor first."
            )
        return vectors
