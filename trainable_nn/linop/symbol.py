r"""A proved upper bound of max ||M(w)|| over a grid of frequencies, M(w) = sum_j K_j e^{i <w, p_j>}, K_j real.

The Gram matrix of M is itself a trigonometric polynomial, whose coefficients need no frequency:

    G(w) = M(w) M(w)^* = R_0 + sum_{l > 0} (R_l e^{i <w, l>} + R_l^T e^{-i <w, l>}),  R_l = sum_{p_i - p_j = l} K_i K_j^T,

so the products of channels are made once for each lag l, not for each frequency, and in real numbers. Only
differences that the stride divides occur: with stride s, w is a frequency of the polyphase kernel. The
side with fewer channels is taken. G(-w) is the conjugate of G(w), so half of the grid is enough.

Rounding, for a kernel of Frobenius norm F with n numbers to each sum and L lags l > 0:
    R_l errs by at most gamma_n F^2, since the taps are distinct (``norm``); twice for l > 0;
    cosines and sines err by TABLE: three roundings of an angle below 2 pi and four units of the function;
    the sum over l errs by gamma_{L + 3} more, of at most ||R_l + R_l^T||_F + ||R_l - R_l^T||_F <= 4 F^2 each.
Together the Frobenius norm of the error of G(w) is at most (L + 1) F^2 (2 gamma_n + 5 (gamma_{L + 3} + TABLE)).
"""

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .definite import definiteness_error, raised_level, rayleigh_quotients, top_vector
from .norm import LOST, U

TABLE = 2.0**-46
SMALL = 2**14  # entries of a tap
CHUNK = 2**19  # complex numbers at a time: 8 MiB
WARM_STEPS = 4  # of Lanczos from a neighbour's vector
Grid = tuple[tuple[int, ...], tuple[int, ...]]  # its sizes, and 0 or 1 for each axis: half a step beside zero


@dataclass(frozen=True)
class Gram:
    """The coefficients of G.

    lags: (L + 1, axes), the first one zero, of each pair l, -l one.
    by_inputs: G stands for the input's side, with a row for each column and phase of the kernel.
    even, odd: (groups, L + 1, c * c), R_l + R_l^T and R_l - R_l^T; R_0 and 0 for the first.
    squared: at least F^2 of every group.  error: at least ||computed G(w) - G(w)||, for every group and w.
    """

    lags: np.ndarray
    even: Tensor
    odd: Tensor
    squared: float
    error: float
    by_inputs: bool = False

    @property
    def channels(self) -> int:
        return math.isqrt(self.even.shape[-1])


def gram_of(kernel: Tensor, positions: np.ndarray, strides: tuple[int, ...]) -> Gram:
    """The Gram coefficients of a kernel whose entries are at most 1 and somewhere 1/2 or more.

    Shape:
        kernel: (groups, rows, columns, taps), float64.  positions: (taps, axes), distinct.
    """
    rows, columns = kernel.shape[1:3]
    by_inputs = columns * math.prod(strides) < rows
    if by_inputs:
        kernel, positions = _polyphase_transposed(kernel, positions, strides)
        strides = (1,) * len(strides)
    lags, pairs = _pairs(positions, strides)
    kernel = kernel.permute(0, 3, 1, 2).contiguous()  # (groups, taps, c, columns)
    groups, taps, c, width = kernel.shape
    even, odd = (kernel.new_empty(groups, len(lags), c, c) for _ in (0, 1))
    for number, (i, j) in enumerate(pairs):
        r = _correlation(kernel, i, j)
        if number == 0:
            even[:, 0], odd[:, 0] = r, 0.0
            continue
        turned = r.mT.contiguous()
        torch.add(r, turned, out=even[:, number])
        torch.sub(r, turned, out=odd[:, number])
    count = kernel[0].numel()
    squared = float(kernel.square().sum((1, 2, 3)).max()) * (1 + 4 * count * U) + count * LOST
    n, terms = taps * width, len(lags)
    error = terms * squared * (2 * _gamma(n) + 5 * (_gamma(terms + 2) + TABLE)) * (1 + 64 * U) + LOST * n * c * c * terms
    return Gram(lags, even.flatten(2), odd.flatten(2), squared, error, by_inputs)


def _correlation(kernel: Tensor, i: np.ndarray, j: np.ndarray) -> Tensor:
    """sum_t K_i(t) K_j(t)^T: one product of joined taps where they are small, else one for each without a copy."""
    groups, _, c, width = kernel.shape
    if c * width < SMALL:
        left, right = (kernel[:, t].transpose(1, 2).reshape(groups, c, -1) for t in (i, j))
        return left @ right.transpose(1, 2)
    r = kernel.new_zeros(groups, c, c)
    for a, b in zip(i, j):
        r.baddbmm_(kernel[:, a], kernel[:, b].transpose(1, 2))
    return r


def _gamma(n: int) -> float:
    return n * U / (1 - n * U)


def _polyphase_transposed(kernel: Tensor, positions: np.ndarray, strides: tuple[int, ...]) -> tuple[Tensor, np.ndarray]:
    """The kernel of M^* up to the sign of its frequencies: one row for each column and phase, one tap for each block."""
    steps, phases = np.divmod(positions, np.array(strides))
    blocks, block_of = np.unique(steps, axis=0, return_inverse=True)
    phase_of = np.ravel_multi_index(tuple(phases.T), strides)
    groups, rows, columns, _ = kernel.shape
    out = kernel.new_zeros(groups, math.prod(strides), len(blocks), columns, rows)
    for tap, (phase, block) in enumerate(zip(phase_of, block_of.ravel())):
        out[:, phase, block] = kernel[..., tap].mT
    return out.transpose(2, 3).reshape(groups, -1, len(blocks), rows).transpose(2, 3), blocks


def _pairs(positions: np.ndarray, strides: tuple[int, ...]) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """The lags, zero first and of each opposite pair one; and for each lag the taps (i, j) that are so far apart."""
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


def frequencies(sizes: tuple[int, ...], twists: tuple[int, ...]) -> np.ndarray:
    """Half of the grid w_a = pi (2 m_a + twist_a) / N_a, as the odd or even numbers 2 m_a + twist_a."""
    m = np.stack(np.meshgrid(*(np.arange(n) for n in sizes), indexing="ij"), -1).reshape(-1, len(sizes))
    opposite = (-m - np.array(twists)) % np.array(sizes)
    weights = np.array([math.prod(sizes[a + 1 :]) for a in range(len(sizes))])
    kept = m[m @ weights <= opposite @ weights]
    return 2 * kept + np.array(twists)


def grid_maximum(
    gram: Gram, sizes: tuple[int, ...], twists: tuple[int, ...], slack: float, ceiling: float = math.inf
) -> tuple[float, "Peak | None"]:
    """At least max ||G(w)|| over the twisted grid and the groups, rarely above it by more than slack; or infinity.

    Infinity stands for a maximum above ``ceiling``, and for one that rounding hides. The peak says where it is.

    Cost:
        About 2 c^3 + 4 L c^2 multiplications for each frequency and group.
    """
    c, groups = gram.channels, gram.even.shape[0]
    numerators = frequencies(sizes, twists)
    step = max(1, CHUNK // (groups * c * c))
    level, peak = 0.0, None
    for start in range(0, len(numerators), step):
        part = numerators[start : start + step]
        level, number = raised_level(_values(gram, sizes, part), level, slack, ceiling)
        if level == math.inf:
            return math.inf, None
        if number is not None:
            peak = Peak(number // len(part), part[number % len(part)])
    if not gram.error <= level:
        return math.inf, None
    return (level * (1 + definiteness_error(c)) + gram.error) * (1 + 16 * U), peak


@dataclass(frozen=True)
class Peak:
    """Where a grid's maximum is: a group, and the numerators of a frequency."""

    group: int
    numerators: np.ndarray


def estimates_beside(gram: Gram, grid: Grid, peak: Peak, level: float, others: list[Grid]) -> list[float]:
    """Estimates, from below, of other grids' maxima: at their points next to the peak of the first, proved below level."""
    one = replace(gram, even=gram.even[peak.group, None], odd=gram.odd[peak.group, None])
    turns = peak.numerators / (2 * np.array(grid[0]))
    start = top_vector(_values(one, grid[0], peak.numerators[None])[0], level)
    angles = []
    for sizes, twists in others:
        low = np.floor(turns * sizes - np.array(twists) / 2)
        corners = low + np.array(list(itertools.product((0, 1), repeat=len(sizes))))
        numerators = (2 * corners + np.array(twists)).astype(np.int64)
        angles.append(_angles(numerators, gram.lags, sizes))
    quotients = rayleigh_quotients(_at_angles(one, torch.cat(angles)), WARM_STEPS, start)
    return quotients.reshape(len(others), -1).amax(1).tolist()


def _values(gram: Gram, sizes: tuple[int, ...], numerators: np.ndarray) -> Tensor:
    """G at some frequencies, for one group after the other: (groups * frequencies, c, c)."""
    return _at_angles(gram, _angles(numerators, gram.lags, sizes))


def _at_angles(gram: Gram, angle: Tensor) -> Tensor:
    real, imaginary = torch.cos(angle) @ gram.even, torch.sin(angle) @ gram.odd
    return torch.complex(real, imaginary).reshape(-1, gram.channels, gram.channels)


def _angles(numerators: np.ndarray, lags: np.ndarray, sizes: tuple[int, ...]) -> Tensor:
    """<w, l> modulo 2 pi, for w_a = pi numerator_a / size_a: exact until the last division."""
    turn = 2 * math.prod(sizes)
    weights = np.array([turn // (2 * n) for n in sizes])
    return torch.from_numpy(((numerators * weights) @ lags.T % turn) / turn) * (2 * math.pi)
