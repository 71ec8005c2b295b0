"""What tests judge by: dense matrices through torch's own layers, matrices of known spectrum, random geometries.

Nothing here imports the package: an oracle shares neither code nor convention with what it judges.
"""

import math
import random

import torch
from torch import Tensor, nn

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
MODES = ("zeros", "reflect", "replicate", "circular")


def matrix_of(linear, input_shape: tuple[int, ...]) -> Tensor:
    """The matrix (outputs, inputs) of an affine map, by feeding it the unit vectors as one batch."""
    n = math.prod(input_shape)
    with torch.no_grad():
        unit = torch.eye(n, dtype=torch.float64).reshape(n, *input_shape)
        return (linear(unit) - linear(torch.zeros_like(unit))).reshape(n, -1).T


def jacobian_of(f, x: Tensor) -> Tensor:
    """df/dx at one sample x, flattened on both sides, by reverse mode, one output at a time."""
    y = f(x.unsqueeze(0)).squeeze(0)
    matrix = torch.autograd.functional.jacobian(lambda z: f(z.unsqueeze(0)).squeeze(0), x)
    return matrix.reshape(y.numel(), x.numel())


def norm_of(matrix: Tensor) -> float:
    """The largest singular value by LAPACK; 0 for an empty matrix."""
    return float(torch.linalg.svdvals(matrix.detach().double()).amax()) if matrix.numel() else 0.0


def matrix_with(singular_values: list[float], rows: int, columns: int, seed: int) -> Tensor:
    """A random matrix with these singular values, to rounding, and zeros for the rest."""
    generator = torch.Generator().manual_seed(seed)
    k = len(singular_values)
    left = torch.linalg.qr(torch.randn(rows, k, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(columns, k, generator=generator, dtype=torch.float64))[0]
    return left * torch.tensor(singular_values, dtype=torch.float64) @ right.T


def patches_of(conv: nn.Module, axes: int) -> nn.Module:
    """The convolution of the same geometry that copies every patch into channels: torch's own im2col, padding too."""
    taps = math.prod(conv.kernel_size)
    options = {n: getattr(conv, n) for n in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
    copier = CONVOLUTIONS[axes](1, taps, **options, bias=False, dtype=torch.float64)
    copier.weight.data.copy_(torch.eye(taps, dtype=torch.float64).reshape(copier.weight.shape))
    return copier


def random_geometry(rng: random.Random, axes: int) -> tuple[dict, tuple[int, ...]]:
    """Arguments of torch's convolution (plain dict) and image sizes that it takes, all drawn at random."""
    largest = {1: (7, 12), 2: (4, 7), 3: (3, 4)}[axes]
    while True:
        kernel = tuple(rng.randint(1, largest[0]) for _ in range(axes))
        dilation = tuple(rng.choice((1, 1, 2, 3)) for _ in range(axes))
        mode = rng.choice(MODES)
        padding = rng.choice(("same", "valid", "numbers", "numbers"))
        stride = (1,) * axes if padding == "same" else tuple(rng.choice((1, 1, 2, 3, 4)) for _ in range(axes))
        if padding == "numbers":
            padding = tuple(rng.randint(0, 3) for _ in range(axes))
        groups = rng.choice((1, 1, 2))
        sizes = tuple(rng.randint(1, largest[1]) for _ in range(axes))
        arguments = {
            "in_channels": groups * rng.randint(1, 2),
            "out_channels": groups * rng.randint(1, 2),
            "kernel_size": kernel,
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
            "padding_mode": mode,
        }
        if _takes(arguments, sizes, axes):
            return arguments, sizes


def _takes(arguments: dict, sizes: tuple[int, ...], axes: int) -> bool:
    """Whether torch computes a non-empty output."""
    conv = CONVOLUTIONS[axes](**arguments, bias=False)
    try:
        with torch.no_grad():
            return conv(torch.zeros(1, arguments["in_channels"], *sizes)).numel() > 0
    except RuntimeError:
        return False
