r"""The linear, parameter-free skip that halves an image and loses nothing: all its singular values are 1.

An image is cut into s x s blocks, and each block is written in an orthonormal basis whose
first vector is constant: 1/s on each of the s^2 pixels. The first coefficients are
s * AvgPool_s, the paper's skip; the others, its details, fill the channels that the paper
leaves zero.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ON_CPU = {"dtype": torch.float64, "device": "cpu"}  # whatever the default device is, which may hold no values
HAAR = ((1, 1, 1, 1), (1, -1, 1, -1), (1, 1, -1, -1), (1, -1, -1, 1))  # times 1/2; pixels row by row


def block_basis(stride: int) -> Tensor:
    """An orthonormal basis of s x s blocks, (s^2, s, s), the constant block first, then rising frequency.

    Haar's for s = 2, and the products of two cosines (DCT-II) for every other s.
    """
    s = stride
    if s == 2:
        return torch.tensor(HAAR, **ON_CPU).mul(0.5).reshape(4, 2, 2)
    angle = math.pi / s * torch.outer(torch.arange(s, **ON_CPU), torch.arange(s, **ON_CPU) + 0.5)
    cosines = math.sqrt(2.0 / s) * torch.cos(angle)
    cosines[0] = math.sqrt(1.0 / s)
    order = sorted(((u, v) for u in range(s) for v in range(s)), key=lambda uv: (uv[0] + uv[1], uv[0]))
    basis = torch.stack([torch.outer(cosines[u], cosines[v]) for u, v in order])
    basis[0] = 1.0 / s  # as it is in sum / s, not in the rounding of a product of roots
    return basis


def downsample_kernel(in_channels: int, out_channels: int, stride: int = 2) -> Tensor:
    """The kernel (c', c, s, s) in float64 of the convolution that ``orthogonal_downsample2d`` is.

    Channel j of the pooled image stands at j + ceil((c' - c) / 2), as in paper A; where that is
    outside 0 ... c' - 1 (fewer channels) it is left out. Free places take the details in order,
    frequency by frequency, until they run out; then they stay zero. Each row has norm 1 or 0 and
    no two share an element, so the rows are orthonormal, or the columns where c' > s^2 c.

    Source:
        Paper A's public experiments for the offset; THEORY_PAPERS II.1.4 for the completion.
    """
    c, wide, s = in_channels, out_channels, stride
    offset = -((c - wide) // 2)
    low = {offset + j: (0, j) for j in range(c) if 0 <= offset + j < wide}
    details = iter([(band, j) for band in range(1, s * s) for j in range(c)])
    basis = block_basis(s)
    kernel = torch.zeros(wide, c, s, s, **ON_CPU)
    for place in range(wide):
        band, channel = low[place] if place in low else next(details, (None, None))
        if band is not None:
            kernel[place, channel] = basis[band]
    return kernel


def orthogonal_downsample2d(x: Tensor, kernel: Tensor) -> Tensor:
    r"""y = S x, where S has all min(inputs, outputs) singular values 1; kernel from ``downsample_kernel``.

    Shape:
        x: (\*, c, h, w) -> y: (\*, c', h / s, w / s), at most one \* axis. kernel: (c', c, s, s).
    Cost:
        One convolution with kernel s and stride s.
    Raises:
        ValueError: h or w is no multiple of s.
    """
    s = kernel.shape[-1]
    if x.shape[-2] % s or x.shape[-1] % s:
        raise ValueError(
            f"orthogonal_downsample2d: height and width must be multiples of the stride {s}, got "
            f"{tuple(x.shape[-2:])}. Pad or crop the image first, for example with torch.nn.functional.pad."
        )
    return F.conv2d(x, kernel, stride=s)
