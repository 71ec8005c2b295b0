"""The fixed readout of a provable network: linear, parameter-free, every singular value 1."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..functional.readout import readout_kernel


class OrthogonalReadout(nn.Module):
    r"""y = H x, x flattened, with orthonormal rows in H: all singular values are 1.

    The first rows take (h w)^(1/2) times the mean over the image, mixed over the channels by cosines, so this is average
    pooling and a fixed linear layer, scaled to lose nothing on its rows. There are no parameters and the state_dict is
    empty; the kernel follows the module's device and dtype, and is rounded from float64 each time.

    Shape:
        x: (N, c, h, w) or (N, c) -> y: (N, out_features).
    Raises:
        ValueError: more outputs than inputs, or a size below 1; or, in forward, another shape than ``in_shape``.
    Source:
        The head I_L of paper A, Theorem 4.7, whose singular values must all be 1; THEORY section 4 (i).
    """

    def __init__(self, in_shape: Sequence[int], out_features: int, *, device=None, dtype=None) -> None:
        shape = tuple(int(size) for size in in_shape)
        if not shape or min(*shape, out_features) < 1 or out_features > math.prod(shape):
            raise ValueError(
                f"OrthogonalReadout: from 1 to {math.prod(shape) if shape else 0} outputs of an input {shape} have "
                f"orthonormal rows, got out_features={out_features}."
            )
        super().__init__()
        self.in_shape, self.out_features = shape, out_features
        empty = torch.empty(out_features, math.prod(shape), device=device, dtype=dtype)
        self.register_buffer("kernel", empty, persistent=False)
        self._fill()

    @torch.no_grad()
    def _fill(self) -> None:
        if not self.kernel.is_meta:
            self.kernel.copy_(readout_kernel(self.out_features, self.in_shape[0], math.prod(self.in_shape[1:])))

    def _apply(self, fn, recurse=True):
        """Move as every module does, then fill again: a cast must not round twice, nor ``to_empty`` leave nothing."""
        super()._apply(fn, recurse)
        self._fill()
        return self

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1:] != self.in_shape:
            raise ValueError(
                f"OrthogonalReadout: the input has shape {tuple(x.shape)}, and (N, {', '.join(map(str, self.in_shape))}) "
                f"is needed. Build the readout for this image size."
            )
        return nn.functional.linear(x.flatten(1), self.kernel)

    def extra_repr(self) -> str:
        return f"{self.in_shape}, {self.out_features}"
