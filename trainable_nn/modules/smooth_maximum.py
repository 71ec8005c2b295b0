"""max(1, r) from above, without its kink."""

import torch
from torch import Tensor


def smooth_maximum_with_one(r: Tensor, start: float) -> Tensor:
    r"""h(r) >= max(1, r), equal to 1 for r <= start < 1, and three times continuously differentiable.

    With w = 1 - start, t = max(r - start, 0), z = t / w and m(z) = z (1 + z^3)^(-1/3) < min(1, z): h = 1 + t - w m(z).
    So h - 1 = w (z - m) >= 0, h - r >= w (1 - m) > 0; z - m = z^4 / 3 + ... is three times differentiable at 0.
    """
    width = 1.0 - start
    t = (r - start).clamp(min=0.0)
    z = t / width
    near, far = z.clamp(max=1.0), 1.0 / z.clamp(min=1.0)
    m = torch.where(z > 1.0, (1.0 + far**3) ** (-1 / 3), near * (1.0 + near**3) ** (-1 / 3))
    return 1.0 + t - width * m
