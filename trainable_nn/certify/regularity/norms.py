r"""Proved upper bounds of the spectral norms of many small matrices at once, by Gram iteration in float64.

The one-matrix form and its derivation stand in ``linop.norm``: \|\|H\|\|^2 <= \|\|fl(H H^T)\|\| + gamma_n \|\|H\|\|_F^2, and so
on for the Gram matrix, each scaled by a power of two before its square; the Frobenius norm closes the chain.
"""

import math

import numpy as np
import torch
from torch import Tensor

U = 2.0**-53
LOST = 2.0**-1000  # what underflows in one product, with a margin; entries are scaled to [1/2, 1)
MOST = 2**24  # numbers in one piece


def norms_at_most(matrices: Tensor, *, rtol: float = 5e-3) -> np.ndarray:
    """(batch,) floats at least the spectral norms of (batch, m, n) matrices of float64, rarely rtol above them.

    Raises:
        ValueError: an entry is NaN or infinite.
    """
    batch, m, n = matrices.shape
    if batch == 0 or m == 0 or n == 0:
        return np.zeros(batch)
    if not torch.isfinite(matrices).all():
        raise ValueError("norms_at_most: the matrices have entries that are NaN or infinite. Replace them first.")
    size = max(1, MOST // (m * n))
    return np.concatenate([_norms(piece, rtol) for piece in matrices.to(torch.float64).split(size)])


def frobenius_at_most(values: Tensor) -> np.ndarray:
    """(batch,) floats at least the Euclidean norms of the rows of (batch, ...)."""
    rows = values.detach().to("cpu", torch.float64).flatten(1)
    if rows.shape[1] == 0:
        return np.zeros(len(rows))
    largest = rows.abs().amax(1, keepdim=True).clamp_min(1e-290)
    total = (rows / largest).square().sum(1).sqrt() * largest[:, 0]
    return (total * (1 + (rows.shape[1] + 8) * U)).numpy()


def deviations(groups: Tensor) -> tuple[Tensor, Tensor]:
    r"""The standard deviation s of the last axis of float64, 1 / n its weight, and what rounding can have changed in it.

    The mean errs by n u max \|z\|, which enters s squared as a sum of squares; the sum of squares and its root err by
    (n + 4) u s, and s <= max \|z\|. Squares that underflow are below 1e-150.
    """
    n = groups.shape[-1]
    centred = groups - groups.mean(-1, keepdim=True)
    slack = 2.0 * (n + 16) * U * groups.abs().amax(-1) + 1e-150
    return centred.square().mean(-1).sqrt(), slack


def _norms(h: Tensor, rtol: float) -> np.ndarray:
    h = h.transpose(1, 2) if h.shape[1] > h.shape[2] else h
    rank, zero = h.shape[1], (h == 0).all(2).all(1).numpy()
    steps = 0 if rank == 1 else max(1, math.ceil(math.log2(max(math.log(rank) / rtol, 2.0))))
    scales, errors = [], []
    for _ in range(steps):
        h, scale = _scaled(h)
        n = h.shape[2]
        squared = h.square().sum((1, 2)) * (1 + 2 * h[0].numel() * U)
        errors.append((n * U / (1 - n * U) * squared + LOST * n * rank) * (1 + 16 * U))
        scales.append(scale)
        h = h @ h.transpose(1, 2)
    h, scale = _scaled(h)
    bound = (h.square().sum((1, 2)) * (1 + 2 * h[0].numel() * U) + LOST * h[0].numel()).sqrt() * (1 + 16 * U)
    for error, before in zip(reversed(errors), reversed(scales)):
        squared = (bound * scale + error) * (1 + 16 * U)
        bound, scale = squared.sqrt() * (1 + 16 * U), before
    return np.where(zero, 0.0, (bound * scale * (1 + 16 * U)).numpy())


def _scaled(h: Tensor) -> tuple[Tensor, Tensor]:
    """h 2^-e with its largest entries in [1/2, 1), and 2^e, both exact; zeros stay."""
    largest = h.abs().amax((1, 2)).numpy()
    exponent = np.clip(np.frexp(np.where(largest > 0, largest, 1.0))[1], -900, 900)
    down = torch.from_numpy(np.ldexp(1.0, -exponent))
    return h * down[:, None, None], torch.from_numpy(np.ldexp(1.0, exponent))
