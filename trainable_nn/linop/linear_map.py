"""What every linear map of this package can do, from its two products with rows of vectors."""

import torch
from torch import Tensor

from .without_autocast import without_autocast

SIDES = ("inputs", "outputs")


class LinearMap:
    r"""A of shape (outputs, inputs), given by ``_push`` (k, inputs) -> (k, outputs) and its adjoint ``_pull``.

    Shape:
        A vector is (n,); several are the columns of (n, k). Products are differentiable and can be vmapped.
    Raises:
        ValueError: a vector of another length. TypeError: a vector of another dtype or device.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    gram_side = "inputs"  # the side that gram_mv takes where none is named

    @without_autocast
    def mv(self, v: Tensor) -> Tensor:
        """A v."""
        return self._apply("mv", self._push, v, self.shape[1], self.shape[0])

    @without_autocast
    def rmv(self, u: Tensor) -> Tensor:
        """A^T u, the adjoint; for complex entries A^H u."""
        return self._apply("rmv", self._pull, u, self.shape[0], self.shape[1])

    @without_autocast
    def dense(self) -> Tensor:
        """The matrix (outputs, inputs)."""
        outputs, inputs = self.shape
        options = {"dtype": self.dtype, "device": self.device}
        if inputs <= outputs:
            return self.mv(torch.eye(inputs, **options))
        return self.rmv(torch.eye(outputs, **options)).mH

    def to_scipy(self):
        """A ``scipy.sparse.linalg.LinearOperator`` on numpy arrays of the same dtype (float32 for bfloat16).

        Raises:
            ImportError: scipy isn't installed.
        """
        try:
            from scipy.sparse.linalg import LinearOperator  # scipy is no dependency of the layers
        except ImportError as error:
            raise ImportError(
                f"{type(self).__name__}.to_scipy: scipy is needed, and it isn't installed. pip install scipy."
            ) from error
        readable = torch.float32 if self.dtype is torch.bfloat16 else self.dtype  # numpy has no bfloat16

        def on_arrays(product, flat: bool):
            def apply(array):
                vectors = torch.tensor(array, dtype=self.dtype, device=self.device)
                result = product(vectors.flatten() if flat else vectors)
                return result.detach().resolve_conj().to("cpu", readable).numpy()

            return apply

        return LinearOperator(
            self.shape,
            matvec=on_arrays(self.mv, True),
            rmatvec=on_arrays(self.rmv, True),
            matmat=on_arrays(self.mv, False),
            rmatmat=on_arrays(self.rmv, False),
            dtype=torch.empty(0, dtype=readable).numpy().dtype,
        )

    def _gram(self, vectors: Tensor, side: str) -> Tensor:
        """A^T A v on the side "inputs", A A^T u on the side "outputs"."""
        if side not in SIDES:
            raise ValueError(
                f"{type(self).__name__}.gram_mv: side must be 'inputs', for A^T A v, or 'outputs', for A A^T u, "
                f"got {side!r}."
            )
        return self.rmv(self.mv(vectors)) if side == "inputs" else self.mv(self.rmv(vectors))

    def _push(self, rows: Tensor) -> Tensor:
        raise NotImplementedError

    def _pull(self, rows: Tensor) -> Tensor:
        raise NotImplementedError

    def _apply(self, name: str, product, vectors: Tensor, taken: int, given: int) -> Tensor:
        """``product``, from rows of ``taken`` numbers to rows of ``given``, on a vector or on columns."""
        self._check(vectors, name, taken)
        if vectors.dim() == 1:
            return product(vectors.unsqueeze(0)).squeeze(0)
        if vectors.shape[1] == 0:
            return vectors.new_zeros(given, 0)
        return product(vectors.mT).mT

    def _check(self, vectors: Tensor, name: str, length: int) -> None:
        if isinstance(vectors, Tensor) and vectors.dtype is self.dtype and vectors.device == self.device:
            if vectors.dim() == 1 and vectors.numel() == length:
                return  # what comes most often, and in a hurry
        where = f"{type(self).__name__}.{name}"
        if not isinstance(vectors, Tensor):
            raise TypeError(f"{where}: a tensor is needed, got {type(vectors).__name__}. Use torch.as_tensor.")
        if vectors.dim() not in (1, 2) or vectors.shape[0] != length:
            raise ValueError(
                f"{where}: a vector ({length},) or columns ({length}, k) are needed, "
                f"got shape {tuple(vectors.shape)}. Flatten the tensor first."
            )
        if (vectors.dtype, vectors.device) != (self.dtype, self.device):
            raise TypeError(
                f"{where}: the map has {self.dtype} on {self.device}, the vector {vectors.dtype} on "
                f"{vectors.device}. Convert the vector with .to({self.dtype}) and .to({str(self.device)!r})."
            )
