"""Networks (2.2) and (2.3) of paper B, with its initialisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...errors import DatasetError, OptionError
from .activations import FUNCTIONS
from .gaussian import c_phi


class LinearWidthResNet(nn.Module):
    r"""f(x) = a^T x_H, x_1 = sqrt(c_phi / m) phi(W_1 x), x_h = x_{h-1} + c_res / (H sqrt m) phi(W_h x_{h-1}).

    The matrices start as standard normal and are trained; a is fixed, half its entries +output_weight and half
    -output_weight. c_phi = 1 / E[phi(z)^2], so that a wide layer keeps mean squares. With residual=False it is the
    feed-forward network (2.2): x_h = sqrt(c_phi / m) phi(W_h x_{h-1}) in every layer.

    Shape:
        x: (n, in_features) -> (n,). weights[0]: (width, in_features), weights[h]: (width, width).
    Units:
        output_weight: \|\|y\|\|_2 / sqrt(n) in the paper (``for_targets``); larger is lazier.
    Raises:
        OptionError: a width or depth below 1, a residual_scale outside (0, 1), an activation that is not smooth.
    Source:
        Paper B (arXiv 1911.04351), (2.2), (2.3), section 4; c_phi as in THEORY_PAPERS II.3.1.
    """

    def __init__(
        self, in_features: int, width: int, depth: int, *, nonlinearity: str = "tanh", residual_scale: float = 0.1,
        output_weight: float = 1.0, residual: bool = True, generator: torch.Generator | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype = torch.float64,
    ) -> None:  # fmt: skip
        super().__init__()
        if min(in_features, width, depth) < 1:
            raise OptionError(
                f"LinearWidthResNet: in_features, width and depth must be at least 1, "
                f"got {in_features}, {width} and {depth}."
            )
        if not 0.0 < residual_scale < 1.0:
            raise OptionError(f"LinearWidthResNet: residual_scale must lie strictly in (0, 1), got {residual_scale}.")
        if not (math.isfinite(output_weight) and output_weight > 0):
            raise OptionError(f"LinearWidthResNet: output_weight must be finite and above 0, got {output_weight}.")
        self.in_features, self.width, self.depth = in_features, width, depth
        self.nonlinearity, self.residual_scale, self.residual = nonlinearity, residual_scale, residual
        self.c_phi = c_phi(nonlinearity).value
        shapes = [(width, in_features)] + [(width, width)] * (depth - 1)
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(s, device=device, dtype=dtype)) for s in shapes)
        a = torch.full((width,), output_weight, device=device, dtype=dtype)
        a[width // 2 :] *= -1
        self.register_buffer("a", a)
        self.reset_parameters(generator)

    @classmethod
    def for_targets(cls, targets: Tensor, in_features: int, width: int, depth: int, **options) -> LinearWidthResNet:
        """The paper's output weights for these targets: output_weight = ||y||_2 / sqrt(n)."""
        size = torch.as_tensor(targets).double().flatten()
        root_mean_square = size.square().mean().sqrt().item() if size.numel() else 0.0
        if not (math.isfinite(root_mean_square) and root_mean_square > 0):
            raise DatasetError(
                f"LinearWidthResNet.for_targets: the root mean square of the targets is {root_mean_square}, and the "
                "output weights are set to it. Give finite targets that are not all zero."
            )
        return cls(in_features, width, depth, output_weight=root_mean_square, **options)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw every entry of every matrix from N(0, 1)."""
        for weight in self.weights:
            weight.normal_(generator=generator)

    @property
    def scales(self) -> tuple[float, ...]:
        """What multiplies phi in each layer."""
        first = math.sqrt(self.c_phi / self.width)
        later = self.residual_scale / (self.depth * math.sqrt(self.width)) if self.residual else first
        return (first, *[later] * (self.depth - 1))

    def forward(self, x: Tensor) -> Tensor:
        phi = FUNCTIONS[self.nonlinearity]
        for h, (weight, scale) in enumerate(zip(self.weights, self.scales, strict=True)):
            step = scale * phi(nn.functional.linear(x, weight))
            x = x + step if h and self.residual else step
        return x @ self.a

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, width={self.width}, depth={self.depth}, nonlinearity={self.nonlinearity!r}, "
            f"residual_scale={self.residual_scale}, residual={self.residual}"
        )
