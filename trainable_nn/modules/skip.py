"""The skip of a block that halves the image: linear, parameter-free, every singular value 1."""

import torch
from torch import Tensor, nn

from .. import functional


class OrthogonalDownsample2d(nn.Module):
    r"""y = S x with all min(inputs, outputs) singular values of S equal to 1.

    Each block of s x s pixels is written in an orthonormal basis (Haar's for s = 2, cosines
    otherwise). The first coefficients, s * AvgPool_s, stand at channel ceil((c' - c) / 2), where
    paper A puts them; the channels that it leaves zero hold the details, up to s^2 c channels.
    With fewer channels than c the middle ones stay. There are no parameters and the state_dict is
    empty; the kernel follows the module's device and dtype, and is rounded from float64 each time.

    Shape:
        x: (\*, c, h, w) -> y: (\*, c', h / s, w / s), at most one \* axis.
    Cost:
        One convolution with kernel s and stride s, from c to c' channels.
    Raises:
        ValueError: channels or stride are less than 1; or, in forward, h or w is no multiple of s.
    Source:
        Paper A's public experiments (s * AvgPool_s and zeros have rank c h w / s^2 only, so singular
        values 0 where c' > c); the completion is THEORY_PAPERS II.1.4.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 2, *, device=None, dtype=None) -> None:
        if min(in_channels, out_channels, stride) < 1:
            raise ValueError(
                f"OrthogonalDownsample2d: channels and stride must be at least 1, got "
                f"in_channels={in_channels}, out_channels={out_channels}, stride={stride}."
            )
        super().__init__()
        self.in_channels, self.out_channels, self.stride = in_channels, out_channels, stride
        shape = (out_channels, in_channels, stride, stride)
        self.register_buffer("kernel", torch.empty(shape, device=device, dtype=dtype), persistent=False)
        self._fill()

    @torch.no_grad()
    def _fill(self) -> None:
        if not self.kernel.is_meta:
            self.kernel.copy_(functional.downsample_kernel(self.in_channels, self.out_channels, self.stride))

    def _apply(self, fn, recurse=True):
        """Move as every module does, then fill again: a cast must not round twice, nor ``to_empty`` leave nothing."""
        super()._apply(fn, recurse)
        self._fill()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return functional.orthogonal_downsample2d(x, self.kernel)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}"
