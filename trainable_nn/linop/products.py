"""Any object with two products as a linear map of float64 vectors, whose products are counted."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .toeplitz import ToeplitzConv


class Products:
    """A v and A^H u on float64 (complex128) vectors, A scaled; the products themselves run in A's dtype.

    The scale is a power of two that brings the first result's largest entry to about 1, so that no square of a norm
    overflows or vanishes; ``unscaled`` takes it back.
    """

    def __init__(self, where: str, shape, dtype: torch.dtype, device, mv: Callable, rmv: Callable, dense=None) -> None:
        self.where, self.shape, self.dtype, self.device, self.count = where, shape, dtype, device, 0
        self._mv, self._rmv, self._dense = mv, rmv, dense
        self.options = {"dtype": wide(dtype), "device": device}
        self.eps = torch.finfo(dtype).eps  # the rounding of a product
        self._exponent: int | None = None

    def mv(self, v: Tensor) -> Tensor:
        return self.scaled(self._taken(self._mv, v, self.shape[0]))

    def rmv(self, u: Tensor) -> Tensor:
        return self.scaled(self._taken(self._rmv, u, self.shape[1]))

    def dense(self) -> Tensor:
        """The matrix: the map's own, or from products with unit vectors of the smaller side."""
        outputs, inputs = self.shape
        if self._dense is not None:
            with torch.no_grad():
                return self.scaled(self._checked(self._dense().to(**self.options), outputs * inputs))
        unit = torch.eye(min(self.shape), **self.options)
        if inputs <= outputs:
            return self.scaled(torch.stack([self._taken(self._mv, e, outputs) for e in unit], 1))
        return self.scaled(torch.stack([self._taken(self._rmv, e, inputs) for e in unit], 1).mH)

    def unscaled(self, value: float) -> float:
        """The number that this is for A itself."""
        half = (self._exponent or 0) // 2
        return value * 2.0**half * 2.0 ** ((self._exponent or 0) - half)

    def rescale(self) -> None:
        """Set the scale by the product with a random vector, if nothing has set it yet."""
        if self._exponent is None:
            self.mv(self.random(0)(self.shape[1]))

    def empty(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, **self.options)

    def random(self, seed: int) -> Callable[[int], Tensor]:
        """Normal vectors of a stream that is the same on every device."""
        generator = torch.Generator("cpu").manual_seed(seed)

        def draw(n: int) -> Tensor:
            return torch.randn(n, generator=generator, dtype=self.options["dtype"], device="cpu").to(self.device)

        return draw

    def _taken(self, product: Callable, vector: Tensor, length: int) -> Tensor:
        self.count += 1
        with torch.no_grad():
            return self._checked(product(vector.to(self.dtype)).to(**self.options), length).flatten()

    def _checked(self, values: Tensor, numel: int) -> Tensor:
        if values.numel() != numel:
            raise ValueError(
                f"{self.where}: a product gave {values.numel()} numbers, and the map's shape {self.shape} asks for "
                f"{numel}. Check shape, mv and rmv."
            )
        if not bool(torch.isfinite(values).all()):
            raise ValueError(
                f"{self.where}: a product of the map has entries that are NaN or infinite. Check its weights, and scale "
                f"them if {self.dtype} overflows."
            )
        return values

    def scaled(self, values: Tensor) -> Tensor:
        """The values over the scale, which the first ones that are not all zero set."""
        if self._exponent is None:
            largest = float(values.abs().amax())
            if largest == 0.0:
                return values
            self._exponent = math.frexp(largest)[1]
        half = -self._exponent // 2  # in two factors: 2^1074 is itself past the largest float
        return values * 2.0**half * 2.0 ** (-self._exponent - half)


def products_of(where: str, op) -> Products:
    """The products of a matrix, of an object with ``mv`` and ``rmv`` on torch vectors, or of one of scipy's kind.

    Raises:
        TypeError, ValueError: naming ``where``; it has no products or no shape, integer entries, or no entries.
    """
    if isinstance(op, Tensor):
        return _of_matrix(where, op)
    if _has(op, "mv", "rmv"):
        return _of_torch(where, op)
    if _has(op, "matvec", "rmatvec"):
        return _of_numpy(where, op)
    raise TypeError(
        f"{where}: {type(op).__name__} has neither mv and rmv nor matvec and rmatvec. Pass a matrix as a tensor, "
        f"or a linear map such as ToeplitzConv; scipy.sparse.linalg.aslinearoperator makes one of scipy's matrices."
    )


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def _of_matrix(where: str, matrix: Tensor) -> Products:
    if matrix.is_meta:
        raise ValueError(f"{where}: the matrix is on the meta device, and its values are needed. Load them first.")
    shape = _shape_of(where, matrix)
    _check_dtype(where, matrix.dtype)
    matrix = matrix.detach().to(wide(matrix.dtype))  # exact, so that its products round in float64 only
    mv, rmv = (lambda v: matrix @ v), (lambda u: matrix.mH @ u)
    return Products(
        where,
        shape,
        matrix.dtype,
        matrix.device,
        mv,
        rmv,
        lambda: matrix.to_dense() if matrix.layout is not torch.strided else matrix,
    )


def _of_torch(where: str, op) -> Products:
    dtype = getattr(op, "dtype", None)
    dtype = dtype if isinstance(dtype, torch.dtype) else torch.float64
    device = getattr(op, "device", None) or getattr(getattr(op, "x", None), "device", "cpu")
    _check_dtype(where, dtype)
    if isinstance(op, ToeplitzConv):  # float64 reads its kernel exactly, and costs a single vector little
        dtype = wide(dtype)
        op = op.to(dtype)
    dense = op.dense if callable(getattr(op, "dense", None)) else None
    return Products(where, _shape_of(where, op), dtype, device, op.mv, op.rmv, dense)


def _of_numpy(where: str, op) -> Products:
    kind = str(getattr(op, "dtype", None))
    dtype = getattr(torch, kind) if kind in ("float32", "complex64", "complex128") else torch.float64

    def on_tensors(product):
        return lambda vector: torch.as_tensor(product(vector.numpy()))

    return Products(where, _shape_of(where, op), dtype, "cpu", on_tensors(op.matvec), on_tensors(op.rmatvec))


def _shape_of(where: str, op) -> tuple[int, int]:
    shape = tuple(getattr(op, "shape", ()))
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(
            f"{where}: a map of shape (outputs, inputs), both at least 1, is needed, got {shape}. Without entries "
            f"there are no singular values."
        )
    return int(shape[0]), int(shape[1])


def _check_dtype(where: str, dtype: torch.dtype) -> None:
    if not (dtype.is_floating_point or dtype.is_complex):
        raise TypeError(f"{where}: the map's entries must be floats, got {dtype}. Convert it first.")


def _has(op, *names: str) -> bool:
    return all(callable(getattr(op, name, None)) for name in names)
