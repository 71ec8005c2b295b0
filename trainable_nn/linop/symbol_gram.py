r"""A proved upper bound of max ||M(w)|| over a grid of frequencies, by the Gram matrices of the symbol in floats.

The Gram matrix of M is itself a trigonometric polynomial, whose coefficients need no frequency:

    G(w) = M(w) M(w)^* = R_0 + sum_{l > 0} (R_l e^{i <w, l>} + R_l^T e^{-i <w, l>}),  R_l = sum_{p_i - p_j = l} K_i K_j^T,

so the products of channels are made once for each lag l, not for each frequency, and in real numbers. Only
differences that the stride divides occur. Where the frequencies are so few that it costs less, G(w) is A A^T + B B^T +
i (B A^T - A B^T), M(w) = A + i B, instead: symmetric products, of half the work.

Rounding, for a kernel of Frobenius norm F with n numbers to each sum and L lags l > 0:
    R_l errs by at most gamma_n F^2, since the taps are distinct (``norm``); twice for l > 0;
    cosines and sines err by TABLE: three roundings of an angle below 2 pi and four units of the function;
    the sum over l errs by gamma_{L + 3} more, of at most ||R_l + R_l^T||_F + ||R_l - R_l^T||_F <= 4 F^2 each.
Together the Frobenius norm of the error of G(w) is at most (L + 1) F^2 (2 gamma_n + 5 (gamma_{L + 3} + TABLE)).
For T taps in P phases of width W, directly:
    A and B err entry by entry by d sum_j |K_j|, d = gamma_T + 2 TABLE, so (A, B) by sqrt(2 T) d F in the Frobenius norm,
    which is at most sqrt(T) F; that counts 2 sqrt(2) T d F^2 in G, and less than 4 T d F^2 with its square;
    the sums of n = 2 P W products, two of them in each part, and their differences by 2 gamma_{n + 4} ||(A, B)||_F^2,
    and by half of that more if only one triangle is read,
together by at most T F^2 (1 + 4 d)^2 (3 gamma_{n + 4} + 4 d).
"""

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .definite import definiteness_error, raised_level
from .norm import LOST, U
from .symbol import Grid, Peak, Symbol, angles, frequencies

TABLE = 2.0**-46
SMALL = 2**14  # entries of a tap
CHUNK = 2**19  # complex numbers at a time: 8 MiB


@dataclass(frozen=True)
class Gram:
    """G at any frequency, by lags, or directly where even is None.

    lags: (L + 1, axes), the first one zero, of each pair l, -l one.
    even, odd: (groups, L + 1, c * c), R_l + R_l^T and R_l - R_l^T; R_0 and 0 for the first.
    error: at least ||computed G(w) - G(w)||, for every group and w.
    """

    symbol: Symbol
    error: float
    lags: np.ndarray
    even: Tensor | None = None
    odd: Tensor | None = None

    @property
    def channels(self) -> int:
        return self.symbol.channels

    def chunks(self, grid: Grid):
        """The frequencies' numerators and G there, for some at a time: (groups * frequencies, c, c), group after group."""
        numerators, entries = frequencies(*grid), self.symbol.groups * self.channels**2
        step = min(len(numerators), max(1, CHUNK // entries))
        parts = [None] * 2 if self.even is None else torch.empty(2, step, entries, dtype=torch.float64, device="cpu")
        for start in range(0, len(numerators), step):
            part = numerators[start : start + step]
            yield part, self.values(grid, part, parts)

    def values(self, grid: Grid, numerators: np.ndarray, parts) -> Tensor:
        """parts: room for real and imaginary parts."""
        if self.even is None:
            return self._directly(grid, numerators)
        angle, (groups, _, entries) = angles(numerators, self.lags, grid[0]), self.even.shape
        waves = torch.cos(angle), torch.sin(angle)
        shape = groups, len(angle), entries
        real, imaginary = (part.flatten()[: math.prod(shape)].view(shape) for part in parts)
        torch.matmul(waves[0], self.even, out=real)
        torch.matmul(waves[1], self.odd, out=imaginary)
        return torch.complex(real, imaginary).reshape(-1, self.channels, self.channels)

    def _directly(self, grid: Grid, numerators: np.ndarray) -> Tensor:
        steps, phases = self.symbol.steps
        groups, _, c, width = self.symbol.taps.shape
        angle = angles(numerators, steps, grid[0])
        waves = torch.cat([torch.cos(angle), torch.sin(angle)])
        out = torch.empty(groups, len(numerators), c, c, dtype=torch.complex128, device="cpu")
        total, other = np.empty((c, c)), np.empty((c, c))
        for group, (first, taps) in itertools.product(range(groups), enumerate(phases)):
            rows = self.symbol.taps[group].flatten(1)
            rows = rows if len(phases) == 1 else rows[taps]
            parts = (waves[:, taps] @ rows).reshape(2, len(numerators), c, width).numpy()
            for number, (a, b) in enumerate(zip(*parts)):
                real, imaginary = out[group, number].numpy().real, out[group, number].numpy().imag
                np.matmul(a, a.T, out=total)
                np.add(total, np.matmul(b, b.T, out=other), out=total if first else real)
                if first:
                    real += total
                np.matmul(b, a.T, out=other)
                np.subtract(other, other.T, out=total if first else imaginary)
                if first:
                    imaginary += total
        return out.flatten(0, 1)


def gram_of(symbol: Symbol, count: int) -> Gram:
    """The Gram matrices of a symbol, of which some ``count`` will be asked for."""
    taps, c, width = symbol.taps.shape[1:]
    entries = taps * c * width
    squared = float(torch.linalg.vector_norm(symbol.taps.flatten(1), dim=1).max()) ** 2 * (1 + 8 * entries * U)
    squared += entries * LOST
    lags, pairs = _pairs(tuple(map(tuple, symbol.positions.tolist())), symbol.strides)
    _, phases = symbol.steps
    by_lags = sum(len(i) for i, _ in pairs) * c * c * width + count * len(lags) * 2 * c * c
    directly = count * (2 * c * c * width * len(phases) + 2 * taps * c * width)
    if directly < by_lags and c * width > SMALL:
        n, d = 2 * width * len(phases), _gamma(taps) + 2 * TABLE
        error = taps * squared * (1 + 4 * d) ** 2 * (3 * _gamma(n + 4) + 4 * d) * (1 + 64 * U)
        return Gram(symbol, error + LOST * n * c * c * (taps + 1), lags)
    even, odd = (torch.empty(symbol.groups, len(lags), c, c, dtype=torch.float64, device="cpu") for _ in (0, 1))
    for number, (i, j) in enumerate(pairs):
        r = _correlation(symbol.taps, i, j)
        if number == 0:
            even[:, 0], odd[:, 0] = r, 0.0
            continue
        turned = r.mT.contiguous()
        torch.add(r, turned, out=even[:, number])
        torch.sub(r, turned, out=odd[:, number])
    n, terms = taps * width, len(lags)
    error = terms * squared * (2 * _gamma(n) + 5 * (_gamma(terms + 2) + TABLE)) * (1 + 64 * U) + LOST * n * c * c * terms
    return Gram(symbol, error, lags, even.flatten(2), odd.flatten(2))


def _correlation(taps: Tensor, i: np.ndarray, j: np.ndarray) -> Tensor:
    """sum_t K_i(t) K_j(t)^T: one product of joined taps where they are small, else one for each without a copy."""
    groups, _, c, width = taps.shape
    if c * width < SMALL:
        left, right = (taps[:, t].transpose(1, 2).reshape(groups, c, -1) for t in (i, j))
        return left @ right.transpose(1, 2)
    r = taps.new_zeros(groups, c, c)
    for a, b in zip(i, j):
        r.baddbmm_(taps[:, a], taps[:, b].transpose(1, 2))
    return r


def _gamma(n: int) -> float:
    return n * U / (1 - n * U)


@lru_cache(64)  # layers often have the same taps
def _pairs(
    taps: tuple[tuple[int, ...], ...], strides: tuple[int, ...]
) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """The lags, zero first and of each opposite pair one; and for each lag the taps (i, j) that are so far apart."""
    positions = np.array(taps).reshape(len(taps), -1)
    difference = positions[:, None] - positions[None, :]
    whole = (difference % np.array(strides) == 0).all(-1)
    i, j = np.nonzero(whole)
    lag = difference[i, j] // np.array(strides)
    sign = np.zeros(len(lag), dtype=np.int64)  # of the first coordinate that is not zero
    for axis in reversed(range(lag.shape[1])):
        sign = np.where(lag[:, axis] != 0, np.sign(lag[:, axis]), sign)
    i, j, lag, sign = (a[sign >= 0] for a in (i, j, lag, sign))
    lags, number = np.unique(np.concatenate([lag, 0 * lag[:1]]), axis=0, return_inverse=True)
    number = number.ravel()[:-1]
    order = np.argsort(number, kind="stable")
    starts = np.searchsorted(number[order], np.arange(len(lags) + 1))
    pairs = [(i[order[a:b]], j[order[a:b]]) for a, b in itertools.pairwise(starts)]
    first = int(np.flatnonzero((lags == 0).all(1))[0])
    return np.roll(lags, -first, axis=0), pairs[first:] + pairs[:first]


def grid_maximum(gram: Gram, grid: Grid, slack: float, guess: float = 0.0) -> tuple[float, Peak | None]:
    """At least max ||G(w)|| over the twisted grid and the groups, rarely above it by more than slack, or above the guess.

    Infinity where rounding hides it. The peak says where it is, if not below the guess.

    Cost:
        About 4/3 c^3 + 4 L c^2 multiplications for each frequency and group, and a second time where the guess was too low.
    """
    level, peak = guess, None
    for part, grams in gram.chunks(grid):
        level, number = raised_level(grams, level, slack)
        if number is not None:
            peak = Peak(number // len(part), part[number % len(part)])
    if not gram.error <= level < math.inf:
        return math.inf, None
    return proved(gram, level), peak


def proved(gram: Gram, level: float) -> float:
    """What a level that Cholesky's algorithm ended on says of the exact G."""
    return (level * (1 + definiteness_error(gram.channels)) + gram.error) * (1 + 16 * U)
