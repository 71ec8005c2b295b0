"""The paper's shortcut: a learned projection plus the mean of each s x s block, scaled by s."""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def pooled_identity(x: Tensor, out_channels: int, stride: tuple[int, int]) -> Tensor:
    r"""y = sqrt(s_h s_w) * AvgPool(x), its channels centred in ``out_channels`` and zeros around them.

    Of the c' - c zero channels, ceil((c' - c) / 2) stand before and the others behind. A window that the
    image's edge cuts is summed as if zeros followed. So the output is ceil(h / s_h) x ceil(w / s_w), as
    that of a 1x1 convolution of this stride, and the rows of the map are orthogonal and no longer than 1:
    its operator norm is at most 1 on every image size, and every non-zero singular value is 1 where the
    strides divide the size.

    Shape:
        x: (\*, c, h, w) -> (\*, out_channels, ceil(h / s_h), ceil(w / s_w)), at most one \* axis.
    Source:
        Paper A's public experiments (THEORY_PAPERS II.1.4): there the strides are equal and divide the size.
    """
    missing = out_channels - x.shape[-3]
    pooled = _window_sums(x, stride)
    return F.pad(pooled, (0, 0, 0, 0, (missing + 1) // 2, missing // 2)) if missing else pooled


def _window_sums(x: Tensor, stride: tuple[int, int]) -> Tensor:
    """Sum of each window over the square root of its size: s times the mean for a full s x s window."""
    rows, columns = stride
    if rows == columns == 1:
        return x
    root = math.isqrt(rows * columns)
    if root * root == rows * columns:
        return F.avg_pool2d(x, stride, stride, ceil_mode=True, divisor_override=root)
    return F.avg_pool2d(x, stride, stride, ceil_mode=True, divisor_override=1) * (rows * columns) ** -0.5


def check_widening(where: str, in_channels: int, out_channels: int) -> None:
    """Raise ValueError, naming ``where``, if the shortcut would have to drop channels."""
    if out_channels < in_channels:
        raise ValueError(
            f"{where}: the pooled shortcut pads channels and never drops them, got {in_channels} channels in and "
            f"{out_channels} out. Keep the plain projection here, or use OrthogonalDownsample2d."
        )


def keeps_the_grid(conv: nn.Conv2d) -> bool:
    """Whether the output is ceil(h / s_h) x ceil(w / s_w) for every h and w: 2 padding = dilation (kernel - 1)."""
    if conv.padding == "same":
        return True
    padding = (0, 0) if conv.padding == "valid" else conv.padding
    return all(2 * p == d * (k - 1) for p, d, k in zip(padding, conv.dilation, conv.kernel_size))


class PooledConv2d(nn.Conv2d):
    r"""y = conv(x) + pooled_identity(x): paper A's projection shortcut of stride s, conv1x1 + s * AvgPool_s.

    The convolution is the user's own, untouched: the same arguments as ``nn.Conv2d``, the same keys
    ``weight`` and ``bias``, the same start. The pooled part has no parameters.

    Shape:
        x: (\*, in_channels, h, w) -> (\*, out_channels, ceil(h / s_h), ceil(w / s_w)), at most one \* axis.
    Raises:
        ValueError: out_channels below in_channels, or kernel, padding and dilation that give another grid
            than a 1x1 convolution of this stride.
    Source:
        Paper A's public experiments, THEORY section 1. Rank: the pooled part alone reaches c h w / s^2 of
        the c' h w / s^2 outputs, so nothing is proved of the smallest singular value.
    """

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self._check()

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> "PooledConv2d":
        """The pooled form of a plain convolution; parameters, hooks and modes are shared with it, not copied."""
        pooled = cls.__new__(cls)
        pooled.__dict__.update(conv.__dict__)
        pooled._check()
        return pooled

    def _check(self) -> None:
        check_widening("PooledConv2d", self.in_channels, self.out_channels)
        if not keeps_the_grid(self):
            raise ValueError(
                f"PooledConv2d: a kernel of {self.kernel_size} with padding {self.padding} and dilation {self.dilation} "
                "gives another image size than the pooled path; 2 * padding must be dilation * (kernel - 1)."
            )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + pooled_identity(x, self.out_channels, self.stride)


class PooledSequential(nn.Sequential):
    r"""y = layers(x) + pooled_identity(x): the pooled path beside a shortcut of several layers.

    For a projection with its own normalisation or pooling, such as conv + bn, or avgpool + conv + bn of
    timm's resnet26d. The pooled path goes around all of them, so a normalisation does not undo it. The
    layers keep their names and with them their keys.

    Shape:
        x: (\*, in_channels, h, w) -> (\*, out_channels, ceil(h / s_h), ceil(w / s_w)); the layers must give the same.
    Raises:
        ValueError: out_channels below in_channels.
    """

    def __init__(self, *layers, in_channels: int, out_channels: int, stride: int | Sequence[int]) -> None:
        super().__init__(*layers)
        check_widening("PooledSequential", in_channels, out_channels)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.stride = (stride, stride) if isinstance(stride, int) else tuple(stride)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + pooled_identity(x, self.out_channels, self.stride)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}"
