r"""Extreme singular values of the convolutions whose matrix falls apart into small ones.

Where no pixel is read twice and no padding at all, A is the kernel's matrix, once for each output pixel. With circular
padding, as many outputs as input pixels over the stride, and a stride that divides them, A is a block-diagonal
matrix in the Fourier basis: M(w) = sum_t K_t e^{i <w, o_t // s>}, one block of columns for each phase o_t mod s of a
tap's offset o_t. Where the padding isn't circular, M's values are no singular values of A, and are not used here.

Both give triplets, not only values. Where A has fewer connected rows, or columns, than min(rows, columns), its smallest
singular value is zero by counting.

Source: Sedghi et al. (2019), arXiv:1805.10408; with strides Senderovich et al. (2022), arXiv:2211.13771.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .geometry import Geometry

CHUNK = 2**22  # complex numbers of the blocks that are factored at once


@dataclass(frozen=True)
class Ends:
    """(value, residual) of both ends; how they were found; pairs of vectors a decomposition of them all gave."""

    smallest: tuple[float, float]
    largest: tuple[float, float]
    method: str


def zero_by_counting(geometry: Geometry) -> bool:
    """Whether the outputs that read something, or the inputs that are read, are fewer than min(rows, columns)."""
    tables = [geometry.reached(axis) for axis in range(geometry.axes)]
    outputs = geometry.narrow[0] * math.prod(int((t >= 0).any(1).sum()) for t in tables)
    inputs = geometry.wide[0] * math.prod(len(t[t >= 0].unique()) for t in tables)
    return min(outputs, inputs) < min(math.prod(geometry.narrow), math.prod(geometry.wide))


def closed_form(geometry: Geometry, kernel: Tensor) -> Ends | None:
    """Both ends of the singular values of the convolution with this float64 kernel; None where there is no closed form."""
    kernel = kernel.detach().to("cpu").reshape(geometry.groups, -1, *kernel.shape[1:])
    if all(map(_reads_once, (geometry.reached(axis) for axis in range(geometry.axes)))):
        ends, method = _ends([kernel.flatten(2)]), "kernel"
    elif all(_is_circle(geometry, axis) for axis in range(geometry.axes)):
        ends, method = _ends(_symbols(geometry, kernel)), "fourier"
    else:
        return None
    smallest = (0.0, 0.0) if _zeros(geometry, method) else ends[0]
    return Ends(smallest, ends[1], method)


def _zeros(geometry: Geometry, method: str) -> bool:
    """Whether the blocks have fewer singular values together than A."""
    rows, columns = (shape[0] // geometry.groups for shape in (geometry.narrow, geometry.wide))
    if method == "kernel":
        columns *= math.prod(geometry.kernel[2:])
    else:
        columns *= math.prod(geometry.stride)
    here = geometry.groups * math.prod(geometry.narrow[1:]) * min(rows, columns)
    return here < min(math.prod(geometry.narrow), math.prod(geometry.wide))


def _reads_once(table: Tensor) -> bool:
    return bool((table >= 0).all()) and table.numel() == len(table.unique())


def _is_circle(geometry: Geometry, axis: int) -> bool:
    n, m, s = geometry.wide[1 + axis], geometry.narrow[1 + axis], geometry.stride[axis]
    return geometry.mode == "circular" and n % s == 0 and m * s == n


def _symbols(geometry: Geometry, kernel: Tensor):
    """M at half of the frequencies, (groups * frequencies, rows, columns * phases), in chunks."""
    tensor = partial(torch.tensor, device="cpu")
    sizes, strides = geometry.narrow[1:], geometry.stride
    groups, rows, columns = kernel.shape[:3]
    places = itertools.product(*(range(k) for k in geometry.kernel[2:]))
    before = [edge[0] + own for edge, own in zip(geometry.edges, geometry.padding)]
    offsets = tensor([[t * d - b for t, d, b in zip(tap, geometry.dilation, before)] for tap in places])
    steps = tensor(strides)
    phases = (offsets % steps) @ tensor([math.prod(strides[a + 1 :]) for a in range(len(strides))])
    kernel = kernel.flatten(3).to(torch.complex128)
    grid = torch.cartesian_prod(*(torch.arange(n, device="cpu") for n in sizes)).reshape(-1, len(sizes))
    weights = tensor([math.prod(sizes[a + 1 :]) for a in range(len(sizes))])
    grid = grid[grid @ weights <= (-grid % tensor(sizes)) @ weights]
    turns = grid[:, None] * torch.div(offsets, steps, rounding_mode="floor") % tensor(sizes)
    waves = torch.exp(2j * math.pi * (turns.double() / tensor(sizes)).sum(-1))
    step = max(1, CHUNK // (groups * rows * columns * math.prod(strides)))
    for part in waves.split(step):
        block = kernel.new_zeros(groups, len(part), rows, math.prod(strides), columns)
        for tap, phase in enumerate(phases.tolist()):
            block[:, :, :, phase] += part[:, tap, None, None] * kernel[:, None, :, :, tap]
        yield block.flatten(3).flatten(0, 1)


def _ends(chunks) -> list[tuple[float, float]]:
    """(smallest, its residual), (largest, its residual) of the singular values of all blocks."""
    best: list[tuple[float, Tensor] | None] = [None, None]
    for blocks in chunks:
        values = torch.linalg.svdvals(blocks)
        for end, column, sign in ((0, values[:, -1], 1), (1, values[:, 0], -1)):
            at = int((sign * column).argmin())
            if best[end] is None or sign * float(column[at]) < sign * best[end][0]:
                best[end] = (float(column[at]), blocks[at])
    return [_triplet(block, -1 if end == 0 else 0) for end, (_, block) in enumerate(best)]


def _triplet(block: Tensor, at: int) -> tuple[float, float]:
    u, s, vh = torch.linalg.svd(block, full_matrices=False)
    left, right = u[:, at], vh[at].conj()
    forward = torch.linalg.vector_norm(block @ right - s[at] * left)
    back = torch.linalg.vector_norm(block.mH @ left - s[at] * right)
    return float(s[at]), float(torch.maximum(forward, back))
