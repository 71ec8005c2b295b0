"""Singular values of the residual blocks and their shortcuts, at a real image."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .linop import Jacobian

LARGEST_JACOBIAN = 2**24  # entries; 128 MB in float64


@dataclass(frozen=True)
class Spectrum:
    """The min(n, m) singular values of one Jacobian n x m, in falling order; None where it was too large."""

    path: str
    shape: tuple[int, int]
    values: Tensor | None

    @property
    def smallest(self) -> float | None:
        return None if self.values is None else float(self.values[-1])

    @property
    def mean(self) -> float | None:
        return None if self.values is None else float(self.values.mean())

    @property
    def largest(self) -> float | None:
        return None if self.values is None else float(self.values[0])


def spectra_of(
    model: nn.Module, paths: Sequence[str], images: Tensor, *, most_entries: int | None = None
) -> list[Spectrum]:
    """Spectra of the Jacobians, in their own input, of the modules at ``paths``, at the first of ``images``.

    Batch normalisation uses the statistics of ``images`` and holds them fixed, so that each module is a
    map of one image. The work is done in float64 on a copy on the CPU. A Jacobian of more than ``most_entries``
    (None: LARGEST_JACOBIAN) is left out.

    Cost:
        One vector-Jacobian product per output, batched, and a QR and an SVD.
    """
    frozen = _with_statistics_of(images, model)
    points = _inputs_of(frozen, paths, images[:1])
    most = LARGEST_JACOBIAN if most_entries is None else most_entries
    return [_spectrum(path, frozen.get_submodule(path), points[path], most) for path in paths if path in points]


def _with_statistics_of(images: Tensor, model: nn.Module) -> nn.Module:
    frozen = copy.deepcopy(model).cpu().double().train()
    for module in frozen.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0  # this batch replaces what was there
    with torch.no_grad():
        frozen(images.cpu().double())
    return frozen.eval().requires_grad_(False)


def _inputs_of(model: nn.Module, paths: Sequence[str], image: Tensor) -> dict[str, Tensor]:
    points: dict[str, Tensor] = {}

    def keep(path: str) -> Callable:
        return lambda module, inputs: points.__setitem__(path, inputs[0].detach())

    hooks = [model.get_submodule(path).register_forward_pre_hook(keep(path)) for path in paths]
    with torch.no_grad():
        model(image.cpu().double())
    for hook in hooks:
        hook.remove()
    return points


def _spectrum(path: str, module: nn.Module, x: Tensor, most_entries: int) -> Spectrum:
    jacobian = Jacobian(module, x)
    too_large = math.prod(jacobian.shape) > most_entries
    return Spectrum(path, jacobian.shape, None if too_large else singular_values(jacobian.dense()))


def singular_values(matrix: Tensor) -> Tensor:
    """All singular values, in falling order; the triangle of a QR has them too and is smaller."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    return torch.linalg.svdvals(torch.linalg.qr(tall, mode="r").R)
