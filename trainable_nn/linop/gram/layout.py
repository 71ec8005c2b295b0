"""Where the samples are in a tensor: which axis counts them, and in which order."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Axis ``axis`` holds ``count`` samples, each several times: one after the other, or (``minor``) in turns."""

    count: int
    axis: int = 0
    minor: bool = False

    def by_sample(self, tensor: Tensor) -> Tensor:
        """The tensor as (samples, times, ...), the samples' axis in front."""
        front = tensor.movedim(self.axis, 0)
        rest = front.shape[1:]
        if self.minor:
            return front.reshape(-1, self.count, *rest).transpose(0, 1)
        return front.reshape(self.count, -1, *rest)

    def only(self, tensor: Tensor, sample: int) -> Tensor:
        """The tensor with zeros in the place of all other samples."""
        size = tensor.shape[self.axis]
        at = torch.arange(size, device=tensor.device)
        which = at % self.count if self.minor else at // (size // self.count)
        shape = [size if axis == self.axis else 1 for axis in range(tensor.dim())]
        return torch.where((which == sample).reshape(shape), tensor, tensor.new_zeros(()))

    def scaled(self, tensor: Tensor, factors: Tensor) -> Tensor:
        """Each sample times its factor (count,)."""
        size = tensor.shape[self.axis]
        each = factors.repeat(size // self.count) if self.minor else factors.repeat_interleave(size // self.count)
        return tensor * each.reshape([size if axis == self.axis else 1 for axis in range(tensor.dim())])


def candidates(shape: torch.Size, count: int) -> Iterator[Layout]:
    """Every way in which a tensor of this shape can hold that many samples."""
    for axis, size in enumerate(shape):
        if size and size % count == 0:
            yield Layout(count, axis)
            if size != count:
                yield Layout(count, axis, minor=True)
