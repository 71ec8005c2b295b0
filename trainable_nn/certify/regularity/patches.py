r"""What an affine layer's weight meets: the input's patches as the columns of a matrix U, so that y = P(w) U + b."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...theory.convolution import sides
from .norms import norms_at_most
from .states import U

FINE = 100  # entries of a patch up to which its norms are proved tightly
MOST_PATCHES = 2**26  # numbers in all patches of the batch; beyond it g ||x|| bounds their norm
MOST_WORK = 1e9  # multiplications for the norms of one layer's patches; beyond it likewise
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def applied(module: nn.Module, weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's map with this weight: a product, or a convolution with the module's geometry."""
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    padding = module.padding
    if module.padding_mode != "zeros":
        x, padding = F.pad(x, _edges(module), mode=module.padding_mode), 0
    return CONVOLVE[weight.dim() - 2](x, weight, bias, module.stride, padding, module.dilation, module.groups)


def patch_norms(
    module: nn.Module, uses: int, positions: int, x: Tensor, samples: int, bound: np.ndarray
) -> tuple[np.ndarray, float]:
    """At least \\|\\|U\\|\\| of each sample, and of all together; ``bound`` where finding more is too dear.

    Shape:
        uses: entries of one patch. positions: patches of all samples. bound: (samples,), proved without looking.
    """
    groups = getattr(module, "groups", 1)
    each_work = samples * groups * _work(uses, positions // samples, _rtol(uses))
    if uses * positions * groups > MOST_PATCHES or each_work > MOST_WORK:
        return bound, float(np.sqrt(np.square(bound).sum()) * (1 + 4 * samples * U))
    joins = groups * _work(uses, positions, _rtol(uses)) <= MOST_WORK
    each, whole = np.zeros(samples), 0.0
    for group in _unfolded(module, uses, x, groups):
        matrices = group.reshape(samples, -1, *group.shape[1:]).transpose(1, 2).flatten(2)
        each = np.maximum(each, norms_at_most(matrices, rtol=_rtol(uses)))
        joint = group.transpose(0, 1).flatten(1)[None]
        whole = max(whole, float(norms_at_most(joint, rtol=_rtol(uses))[0])) if joins else math.inf
    return each, whole


def _rtol(uses: int) -> float:
    return 5e-3 if uses <= FINE else 1.0  # each halving of it costs uses^3


def _work(uses: int, positions: int, rtol: float) -> float:
    """Multiplications of ``norms_at_most`` for one matrix."""
    rank, length = sorted((uses, max(positions, 1)))
    squarings = max(1, math.ceil(math.log2(max(math.log(max(rank, 2)) / rtol, 2.0))))
    return float(rank) ** 2 * length + (squarings - 1) * float(rank) ** 3


def _unfolded(module: nn.Module, uses: int, x: Tensor, groups: int) -> Tensor:
    """(groups, batch, entries of a patch, positions): the patches by a convolution with unit vectors."""
    if not hasattr(module, "kernel_size"):
        return x.reshape(1, x.shape[0], -1, x.shape[-1]).transpose(2, 3)
    channels, axes = x.shape[1] // groups, len(module.kernel_size)
    copier = torch.eye(uses, dtype=x.dtype).reshape(uses, channels, *module.kernel_size)
    padding = module.padding
    if module.padding_mode != "zeros":
        x, padding = F.pad(x, _edges(module), mode=module.padding_mode), 0
    pieces = x.split(channels, dim=1)
    found = [CONVOLVE[axes](p, copier, None, module.stride, padding, module.dilation) for p in pieces]
    return torch.stack([piece.flatten(2) for piece in found])


def _edges(module: nn.Module) -> list[int]:
    pairs = sides(module.kernel_size, module.padding, module.dilation)
    return [side for pair in reversed(pairs) for side in pair]
