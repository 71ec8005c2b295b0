r"""The smallest singular value of a convolution by Golub-Kahan on its pseudo-inverse, measured with its own products.

The largest singular value of A^+ is one over the smallest of A that isn't zero, and well apart from the others: a few
steps find it, some tens where many values lie together. The triplet's value is \|A^T x\| for a unit x on the smaller side,
so never below the true one but by rounding; its residual is measured with A, and as long as it is too large the basis grows.
"""

import math

import torch
from torch import Tensor

from .block_inverse import MOST_REFINEMENTS, PseudoInverse
from .golub_kahan import Bases
from .products import Products
from .toeplitz import ToeplitzConv

BASIS = 40  # vectors a side
MOST_STEPS = 200
STALLED = 3  # measurements without a smaller residual


def smallest_of(
    op: ToeplitzConv, inverse: PseudoInverse, products: Products, tol: float, largest: float, seed: int
) -> tuple[float, float] | None:
    """(value, residual) of the scaled ``op``, whose pseudo-inverse is given; None where that is of no use."""
    return _Search(op, inverse, products, tol, largest).run(seed)


class _Search:
    """y on the larger side, x on the smaller: A^+ x = y / s."""

    def __init__(self, op: ToeplitzConv, inverse: PseudoInverse, products: Products, tol: float, largest: float) -> None:
        self.products, self.tol, self.floor = products, tol, products.eps * largest
        self.inverse = inverse
        forth, back = (products.rmv, products.mv) if op.transposed else (products.mv, products.rmv)
        self.down, self.up = forth, back  # from wide to narrow: to the smaller side, and from it
        self.lift, self.drop = self._counted(inverse.mv), self._counted(inverse.rmv)
        if inverse.tall:
            self.down, self.up, self.lift, self.drop = back, forth, self.drop, self.lift
        self.gram = self._counted(inverse.gram) if inverse.squares else None

    def run(self, seed: int) -> tuple[float, float] | None:
        bases = self._bases(seed)
        best, tol, stalled = (math.inf, math.inf), self.tol, 0
        for _ in range(MOST_STEPS):
            if bases.size == bases.room:
                bases.restart("largest")
            bases.extend()
            if not bases.converged(tol, "largest") and not bases.complete:
                continue
            found = self._refined(bases.vectors("largest")[1])
            stalled = 0 if found[1] < best[1] / 2 else stalled + 1
            best = min(best, found, key=lambda pair: pair[1])
            if best[1] + self.floor <= self.tol * best[0] or bases.complete or stalled == STALLED:
                break
            tol /= 8
        return best if math.isfinite(best[0]) else None

    def _bases(self, seed: int) -> Bases:
        small, large = sorted(self.products.shape)
        if self.gram is not None:
            return Bases(self.gram, self.gram, small, small, BASIS, self.products, seed)
        return Bases(self.lift, self.drop, large, small, BASIS, self.products, seed)

    def _refined(self, x: Tensor) -> tuple[float, float]:
        """Measured again with one refinement more of the inverse, for as long as the residual asks for it and shrinks."""
        found = self._measured(x)
        while found[1] + self.floor > self.tol * found[0] and self.inverse.refinements < MOST_REFINEMENTS:
            self.inverse.refinements += 1
            again = self._measured(x)
            if not again[1] < found[1] / 2:
                self.inverse.refinements -= 1
                break
            found = again
        return found

    def _measured(self, x: Tensor) -> tuple[float, float]:
        """The value at x and its residual, after a step of inverse iteration to clear x of large singular values."""
        x = _unit(self.gram(x) if self.gram is not None else self.drop(self.lift(x)))
        if not bool(torch.isfinite(x).all()):
            return math.inf, math.inf
        image = self.up(x)
        value = float(torch.linalg.vector_norm(image))
        if not 0.0 < value < math.inf:
            return (0.0, 0.0) if value == 0.0 else (math.inf, math.inf)
        residuals = [self._residual(_unit(y), x, value, image) for y in (self.lift(x), image)]
        return value, min(residuals)  # the first has more digits, and where A is singular none

    def _residual(self, y: Tensor, x: Tensor, value: float, image: Tensor) -> float:
        if not bool(torch.isfinite(y).all()):
            return math.inf
        forward = torch.linalg.vector_norm(self.down(y) - value * x)
        back = torch.linalg.vector_norm(image - value * y)
        return float(torch.maximum(forward, back))

    def _counted(self, product):
        def apply(vector: Tensor) -> Tensor:
            self.products.count += 1
            return product(vector.cpu()).to(vector.device)

        return apply


def _unit(vector: Tensor) -> Tensor:
    return vector / torch.linalg.vector_norm(vector)
