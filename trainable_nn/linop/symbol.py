r"""The symbol of a convolution on a circle, M(w) = sum_j K_j e^{i <w, p_j>}, K_j real, and the grids of its frequencies.

With stride s, w is a frequency of the polyphase kernel: p_j = s b_j + r_j, tap j stands in the block of columns r_j and is
multiplied by e^{i <w, b_j>}. The side with fewer channels is taken, M or M^*: the kernel is turned round where the
input has fewer rows, one for each column and phase. M(-w) is the conjugate of M(w), so half of a grid is enough.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

Grid = tuple[tuple[int, ...], tuple[int, ...]]  # its sizes, and 0 or 1 for each axis: half a step beside zero


@dataclass(frozen=True)
class Symbol:
    """taps: (groups, taps, c, width), float64, contiguous; entries at most 1, and somewhere 1/2 or more.

    positions: (taps, axes), distinct. by_inputs: the kernel was turned round; its strides are 1 then.
    """

    taps: Tensor
    positions: np.ndarray
    strides: tuple[int, ...]
    by_inputs: bool

    @property
    def channels(self) -> int:
        return self.taps.shape[2]

    @property
    def groups(self) -> int:
        return self.taps.shape[0]

    @cached_property
    def steps(self) -> tuple[np.ndarray, list[list[int]]]:
        """b_j (taps, axes), and for each phase that occurs its taps."""
        steps, phases = np.divmod(self.positions, np.array(self.strides))
        _, number = np.unique(phases, axis=0, return_inverse=True)
        number = number.ravel()
        return steps, [np.flatnonzero(number == p).tolist() for p in range(number.max() + 1)]

    def of_group(self, group: int) -> "Symbol":
        return replace(self, taps=self.taps[group, None])


@dataclass(frozen=True)
class Peak:
    """Where a grid's maximum is: a group, and the numerators of a frequency."""

    group: int
    numerators: np.ndarray


def symbol_of(kernel: Tensor, positions: np.ndarray, strides: tuple[int, ...]) -> Symbol:
    """The symbol of a kernel whose entries are at most 1 and somewhere 1/2 or more.

    Shape:
        kernel: (groups, rows, columns, taps), float64.  positions: (taps, axes), distinct.
    """
    rows, columns = kernel.shape[1:3]
    by_inputs = columns * math.prod(strides) < rows
    if by_inputs:
        kernel, positions = _polyphase_transposed(kernel, positions, strides)
        strides = (1,) * len(strides)
    return Symbol(kernel.permute(0, 3, 1, 2).contiguous(), positions, strides, by_inputs)


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


REMEMBERED = 2**14  # points of a grid whose frequencies are kept, since layers often have the same


def frequencies(sizes: tuple[int, ...], twists: tuple[int, ...]) -> np.ndarray:
    """Half of the grid w_a = pi (2 m_a + twist_a) / N_a, as the odd or even numbers 2 m_a + twist_a."""
    return (_half if math.prod(sizes) <= REMEMBERED else _half.__wrapped__)(sizes, twists)


@lru_cache(256)
def _half(sizes: tuple[int, ...], twists: tuple[int, ...]) -> np.ndarray:
    m = np.stack(np.meshgrid(*(np.arange(n) for n in sizes), indexing="ij"), -1).reshape(-1, len(sizes))
    opposite = (-m - np.array(twists)) % np.array(sizes)
    weights = np.array([math.prod(sizes[a + 1 :]) for a in range(len(sizes))])
    kept = m[m @ weights <= opposite @ weights]
    numerators = 2 * kept + np.array(twists)
    numerators.flags.writeable = False
    return numerators


def angles(numerators: np.ndarray, lags: np.ndarray, sizes: tuple[int, ...]) -> Tensor:
    """<w, l> modulo 2 pi, for w_a = pi numerator_a / size_a: exact until the last division."""
    turn = 2 * math.prod(sizes)
    weights = np.array([turn // (2 * n) for n in sizes])
    return torch.from_numpy(((numerators * weights) @ lags.T % turn) / turn) * (2 * math.pi)
