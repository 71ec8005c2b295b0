r"""The pseudo-inverse of a convolution's matrix, by blocks of image rows: what finds its smallest singular values.

Cut along one axis into slabs of rows at least as thick as the kernel reaches, a square convolution is block
tridiagonal, with lower, diagonal and upper blocks L_i, D_i, U_i, and

    S_1 = D_1,  S_{i+1} = D_{i+1} - L_{i+1} S_i^{-1} U_i

are the pivots of its block LU factorisation: only they are dense and kept, as inverses, since L and U are convolutions.
Any other convolution, and a square one whose pivots fail, goes through the Gram matrix of its smaller side,
G = A A^T, which is block tridiagonal too and positive: A^+ = A^T G^{-1}. That squares the condition; refinement
with products of A gives the digits back for as long as G's pivots are positive.

Nothing here is a bound, nor exact: whoever uses the inverse measures what it finds with products of A.

Source: block tridiagonal LU as in Golub and Van Loan (2013), Matrix Computations, section 4.5; pivots against taps are ours.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from .geometry import Geometry
from .slabs import Cut, gram_cut, square_cut
from .taps import Taps, from_pixels, taps_of, to_pixels

MOST_BYTES = 5 * 2**28  # of the inverted pivots: 1.25 GiB
GOOD, USABLE = 1e-9, 0.1  # |A A^+ x - x| / |x|: where refinement may stop, and where it may begin
MOST_REFINEMENTS = 3
SHIFTS = (0.0, 2.0**-46, 2.0**-38)  # of G, times the square of a bound of its largest entry's row


class Lu:
    """A^{-1} of a square A by block LU; vectors are (groups, pixels, channels, columns)."""

    def __init__(self, taps: Taps, cut: Cut) -> None:
        slabs = list(zip(cut.outputs, cut.inputs))
        self.taps, self.slabs = taps, slabs
        self.lower = [taps.block(o, i) for (o, _), (_, i) in zip(slabs[1:], slabs)]
        self.upper = [taps.block(o, i) for (o, _), (_, i) in itertools.pairwise(slabs)]
        self.inverses = [torch.linalg.inv(taps.block(*slabs[0]).dense())]
        for lower, upper, slab in zip(self.lower, self.upper, slabs[1:]):
            left = _on_columns(lower, self.inverses[-1])
            pivot = taps.block(*slab).dense()
            pivot -= _on_columns(upper.transposed, left.mT).mT
            self.inverses.append(torch.linalg.inv(pivot))

    def solve(self, b: Tensor) -> Tensor:
        starts, inputs = zip(*self.slabs)
        return _swept(b, starts, inputs, self.inverses, self.lower, self.upper, self.taps)

    def solve_transposed(self, b: Tensor) -> Tensor:
        outputs, starts = zip(*self.slabs)
        inverses = [inverse.mT for inverse in self.inverses]
        lower, upper = ([block.transposed for block in blocks] for blocks in (self.upper, self.lower))
        return _swept(b, starts, outputs, inverses, lower, upper, self.taps.transposed)


class Gram:
    """(A A^T + shift)^{-1}, and A^+ if shift is 0, by block Cholesky pivots, for an A with at most as many rows as columns."""

    def __init__(self, taps: Taps, cut: Cut, shift: float) -> None:
        self.taps, self.slabs = taps, cut.outputs
        reach = [taps.reach(slab) for slab in self.slabs]
        own = [taps.block(slab, read) for slab, read in zip(self.slabs, reach)]
        self.lower = [_Product(a, b, i[0] - j[0]) for a, b, i, j in zip(own[1:], own, reach[1:], reach)]
        shift = shift * sum(float(torch.linalg.matrix_norm(tap.matrix).max()) for tap in taps.taps) ** 2
        self.inverses, left = [], None
        for number, block in enumerate(own):
            pivot = _on_columns(block, block.dense().mT)
            pivot.diagonal(dim1=1, dim2=2).add_(shift)
            if number:
                left = _on_columns(self.lower[number - 1], self.inverses[-1])
                pivot -= _on_columns(self.lower[number - 1], left.mT).mT
            self.inverses.append(torch.cholesky_inverse(torch.linalg.cholesky(pivot)))

    def solve(self, b: Tensor) -> Tensor:
        return self.taps.transposed.times(self.solve_gram(b))

    def solve_transposed(self, b: Tensor) -> Tensor:
        return self.solve_gram(self.taps.times(b))

    def solve_gram(self, b: Tensor) -> Tensor:
        upper = [block.transposed for block in self.lower]
        return _swept(b, self.slabs, self.slabs, self.inverses, self.lower, upper, None)


class _Product:
    """A B^T for two slabs A and B of rows; A's columns begin ``offset`` pixels after B's."""

    def __init__(self, a: Taps, b: Taps, offset: int) -> None:
        self.a, self.b, self.offset = a, b, offset
        self.pixels, self.channels = (a.pixels[0], b.pixels[0]), (a.channels[0], b.channels[0])

    @property
    def transposed(self) -> _Product:
        return _Product(self.b, self.a, -self.offset)

    def times(self, x: Tensor) -> Tensor:
        y = self.b.transposed.times(x)
        z = y.new_zeros(y.shape[0], self.a.pixels[1], *y.shape[2:])
        start, stop = max(self.offset, 0), min(y.shape[1], self.offset + z.shape[1])
        if start < stop:
            z[:, start - self.offset : stop - self.offset] = y[:, start:stop]
        return self.a.times(z)


def _on_columns(block: Taps | _Product, matrix: Tensor) -> Tensor:
    """The block times a dense (groups, inputs, columns)."""
    shape = (block.pixels[1], block.channels[1])
    return block.times(matrix.reshape(matrix.shape[0], *shape, matrix.shape[2])).flatten(1, 2)


def _swept(b: Tensor, starts, stops, inverses, lower, upper, taps: Taps | None) -> Tensor:
    """Forward and backward substitution; ``starts`` cut b, ``stops`` the result."""
    done = []
    for number, (start, stop) in enumerate(starts):
        rest = b[:, start:stop]
        if number:
            rest = rest - lower[number - 1].times(done[-1])
        done.append(_inverted(inverses[number], rest, stops[number], taps))
    x = done[-1]
    parts = [x]
    for number in reversed(range(len(done) - 1)):
        x = done[number] - _inverted(inverses[number], upper[number].times(x), stops[number], taps)
        parts.append(x)
    return torch.cat(parts[::-1], 1)


def _inverted(inverse: Tensor, x: Tensor, slab: tuple[int, int], taps: Taps | None) -> Tensor:
    channels = x.shape[2] if taps is None else taps.channels[1]
    return (inverse @ x.flatten(1, 2)).reshape(x.shape[0], slab[1] - slab[0], channels, x.shape[3])


class PseudoInverse:
    """A^+ of shape (wide, narrow) for A = ``Geometry.correlate``: products with float64 vectors, flattened as torch's.

    ``error`` is |A A^+ x - x| / |x| for a random x of the smaller side, with the refinements that products take.
    """

    def __init__(self, geometry: Geometry, cut: Cut, taps: Taps, inverse: Lu | Gram, tall: bool) -> None:
        self.geometry, self.cut, self.taps, self.inverse, self.tall = geometry, cut, taps, inverse, tall
        generator = torch.Generator("cpu").manual_seed(0)
        options = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
        x = torch.randn(taps.groups, taps.pixels[0], taps.channels[0], 1, **options)
        self.refinements = 0
        self.error = self._error(x)
        while GOOD < self.error <= USABLE and self.refinements < MOST_REFINEMENTS:
            self.refinements, before = self.refinements + 1, self.error
            self.error = self._error(x)
            if not self.error < before / 2:
                break

    @property
    def usable(self) -> bool:
        return self.error <= USABLE

    def mv(self, vector: Tensor) -> Tensor:
        """A^+ u."""
        product = self._backward if self.tall else self._forward
        x = to_pixels(vector, self.geometry.narrow, self.geometry.groups, self.cut.axis)
        return from_pixels(product(x), self.geometry.wide, self.cut.axis)

    def rmv(self, vector: Tensor) -> Tensor:
        """(A^+)^T v."""
        product = self._forward if self.tall else self._backward
        x = to_pixels(vector, self.geometry.wide, self.geometry.groups, self.cut.axis)
        return from_pixels(product(x), self.geometry.narrow, self.cut.axis)

    @property
    def squares(self) -> bool:
        """Whether ``gram`` is what to iterate with: the inverse of a shifted A A^T leaves no null vector out, as A^+ would."""
        return isinstance(self.inverse, Gram)

    def gram(self, vector: Tensor) -> Tensor:
        """(A A^T + shift)^{-1} x on the smaller side."""
        shape = self.geometry.wide if self.tall else self.geometry.narrow
        x = to_pixels(vector, shape, self.geometry.groups, self.cut.axis)
        return from_pixels(self.inverse.solve_gram(x), shape, self.cut.axis)

    def _error(self, x: Tensor) -> float:
        return float((self.taps.times(self._forward(x)) - x).norm() / x.norm())

    def _forward(self, x: Tensor) -> Tensor:
        """From the smaller side."""
        y = self.inverse.solve(x)
        for _ in range(self.refinements):
            y = y + self.inverse.solve(x - self.taps.times(y))
        return y

    def _backward(self, y: Tensor) -> Tensor:
        """To the smaller side."""
        x, transposed = self.inverse.solve_transposed(y), self.taps.transposed
        for _ in range(self.refinements):
            x = x + self.inverse.solve_transposed(y - transposed.times(x))
        return x


def pseudo_inverse(geometry: Geometry, kernel: Tensor) -> PseudoInverse | None:
    """The pseudo-inverse of the convolution with this float64 kernel; None where no cut fits or all pivots fail.

    Cost:
        For n slabs of m unknowns: about 5 n m^3 flops and 8 n m^2 bytes, which are at most ``MOST_BYTES``.
    """
    rows, columns = math.prod(geometry.narrow), math.prod(geometry.wide)
    tall = rows > columns
    square = [square_cut(geometry, axis) for axis in range(geometry.axes)] if rows == columns else []
    gram = [gram_cut(geometry, axis, tall) for axis in range(geometry.axes)]
    for cuts, shifts in ((square, (None,)), (gram, SHIFTS)):
        fitting = [cut for cut in cuts if cut is not None and cut.bytes <= MOST_BYTES]
        if not fitting:
            continue
        cut = min(fitting, key=lambda cut: cut.flops)
        taps = taps_of(geometry, kernel, cut.axis)
        taps = taps.transposed if tall else taps
        for shift in shifts:
            try:
                inverse = Lu(taps, cut) if shift is None else Gram(taps, cut, shift)
            except torch.linalg.LinAlgError:
                continue
            found = PseudoInverse(geometry, cut, taps, inverse, tall)
            if found.usable or shift:
                return found
            del inverse, found  # before the next one takes as much
    return None
