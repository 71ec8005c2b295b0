r"""The shapes of one convolution and its three products.

A convolution is one trilinear form T(narrow, wide, kernel) = <narrow, conv(wide, kernel)>: ``wide`` is what torch's
convolution reads, ``narrow`` what it writes. Its derivative in each argument is a product here, and a transposed
convolution is the same form read from narrow to wide.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

MODES = ("zeros", "reflect", "replicate", "circular")
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_KERNEL_ADJOINT = {1: torch.nn.grad.conv1d_weight, 2: torch.nn.grad.conv2d_weight, 3: torch.nn.grad.conv3d_weight}


@dataclass(frozen=True)
class Geometry:
    """Shapes (channels, sizes...) of both sides, the kernel (narrow channels, wide channels / groups, taps...), steps.

    ``padding`` is what torch's convolution adds itself, ``edges`` what ``F.pad`` puts on before it: (before, after)
    of each axis.
    """

    wide: tuple[int, ...]
    narrow: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    edges: tuple[tuple[int, int], ...]
    groups: int
    mode: str

    @property
    def axes(self) -> int:
        return len(self.stride)

    def correlate(self, wide: Tensor, kernel: Tensor) -> Tensor:
        """conv(wide, kernel): (k, wide...) -> (k, narrow...)."""
        convolve = _CONVOLVE[self.axes]
        y = convolve(self.padded(wide), kernel, None, self.stride, self.padding, self.dilation, self.groups)
        return _crop(y, [(0, n) for n in self.narrow[1:]])  # more than narrow: output_padding past the stride

    def scatter(self, narrow: Tensor, kernel: Tensor) -> Tensor:
        """The transpose of ``correlate`` in wide: (k, narrow...) -> (k, wide...)."""
        rest = tuple(
            n + a + b + 2 * p - (m - 1) * s - d * (t - 1) - 1
            for n, (a, b), p, m, s, d, t in zip(
                self.wide[1:], self.edges, self.padding, self.narrow[1:], self.stride, self.dilation, self.kernel[2:]
            )
        )
        transpose = _TRANSPOSE[self.axes]
        x = transpose(narrow, kernel, None, self.stride, self.padding, rest, self.groups, self.dilation)
        return self.unpadded(x)

    def kernel_adjoint(self, wide: Tensor, narrow: Tensor) -> Tensor:
        """The transpose of ``correlate`` in the kernel: the gradient of <narrow, conv(wide, kernel)> in it."""
        wide = self.padded(wide)
        reached = [
            (n + 2 * p - d * (t - 1) - 1) // s + 1
            for n, p, d, t, s in zip(wide.shape[2:], self.padding, self.dilation, self.kernel[2:], self.stride)
        ]
        missing = [(0, r - m) for r, m in zip(reached, self.narrow[1:])]
        narrow = F.pad(narrow, _as_torch(missing))
        adjoint = _KERNEL_ADJOINT[self.axes]
        return adjoint(wide, self.kernel, narrow, self.stride, self.padding, self.dilation, self.groups)

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Flat indices (narrow, wide, kernel) of every product in T; a triple of taps may meet one input twice."""
        narrow, wide, tap = (torch.zeros(1, dtype=torch.int64, device="cpu") for _ in range(3))
        for axis in range(self.axes):
            table = self.reached(axis)  # (narrow size, taps)
            row, column = (table >= 0).nonzero().T
            at = table[row, column]
            narrow = _outer(narrow, row, self.narrow[1 + axis])
            wide = _outer(wide, at, self.wide[1 + axis])
            tap = _outer(tap, column, self.kernel[2 + axis])
        channel = torch.arange(self.narrow[0], device="cpu")[:, None, None]
        inner = torch.arange(self.kernel[1], device="cpu")[None, :, None]
        group = channel // (self.narrow[0] // self.groups)
        pixels, image, taps = (math.prod(s) for s in (self.narrow[1:], self.wide[1:], self.kernel[2:]))
        rows = (channel * pixels + narrow).expand(-1, self.kernel[1], -1)
        columns = (group * self.kernel[1] + inner) * image + wide
        weights = (channel * self.kernel[1] + inner) * taps + tap
        return rows.flatten(), columns.flatten(), weights.flatten()

    def reached(self, axis: int) -> Tensor:
        """Which pixel of wide output i reads at tap t; -1 for a padded zero."""
        before, after = (e + self.padding[axis] for e in self.edges[axis])
        line = _line(self.wide[1 + axis], before, after, self.mode)
        i = torch.arange(self.narrow[1 + axis], device="cpu")[:, None] * self.stride[axis]
        return line[i + torch.arange(self.kernel[2 + axis], device="cpu") * self.dilation[axis]]

    @cached_property
    def pads(self) -> bool:
        """Whether ``padded`` puts anything around an image."""
        return any(map(any, self.edges))

    def padded(self, x: Tensor) -> Tensor:
        if not self.pads:
            return x
        return F.pad(x, _as_torch(self.edges), mode="constant" if self.mode == "zeros" else self.mode)

    def unpadded(self, x: Tensor) -> Tensor:
        """The transpose of ``padded``: a border of zeros is cut off, any other is added back where it came from."""
        if self.mode == "zeros":
            return _crop(x, [(before, n) for (before, _), n in zip(self.edges, self.wide[1:])])
        for axis, (before, after) in enumerate(self.edges):
            n = self.wide[1 + axis]
            if before or after:
                line = _line(n, before, after, self.mode).to(x.device)
                shape = (*x.shape[: 2 + axis], n, *x.shape[3 + axis :])
                x = x.new_zeros(shape).index_add(2 + axis, line, x)
        return x


def geometry_of(
    where: str,
    kernel: Sequence[int],
    input_shape: Sequence[int],
    *,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    padding_mode: str = "zeros",
    transposed: bool = False,
    output_padding=0,
) -> Geometry:
    """The geometry of torch's convolution with these arguments.

    Raises:
        ValueError: naming ``where``, for arguments that torch's convolution would not take, and for an empty output.
    """
    kernel, axes = tuple(kernel), len(kernel) - 2
    input_shape = tuple(input_shape) if isinstance(input_shape, Sequence) else (input_shape,)
    _check_shapes(where, kernel, input_shape, groups, transposed)
    stride, dilation = (_each(where, n, v, axes, 1) for n, v in (("stride", stride), ("dilation", dilation)))
    extra = _each(where, "output_padding", output_padding, axes, 0)
    if padding_mode not in MODES:
        raise ValueError(f"{where}: padding_mode must be one of {', '.join(MODES)}, got {padding_mode!r}.")
    spans = [d * (k - 1) for d, k in zip(dilation, kernel[2:])]
    sizes = input_shape[1:]
    if transposed:
        given = _transposed_padding(where, padding, padding_mode, stride, dilation, extra)
        other = [(n - 1) * s - a - b + q + 1 + e for n, s, (a, b), q, e in zip(sizes, stride, given, spans, extra)]
        narrow, wide = input_shape, (kernel[1] * groups, *other)
    else:
        given = _padding(where, padding, padding_mode, stride, spans, sizes, extra)
        other = [(n + a + b - q - 1) // s + 1 for n, (a, b), q, s in zip(sizes, given, spans, stride)]
        narrow, wide = (kernel[0], *other), input_shape
    _check_output(where, sizes, kernel, other)
    native = padding_mode == "zeros" and all(a == b for a, b in given)
    own, edges = (tuple(a for a, _ in given), ((0, 0),) * axes) if native else ((0,) * axes, given)
    return Geometry(wide, narrow, kernel, stride, dilation, own, edges, groups, padding_mode)


def _check_output(where, sizes, kernel, output) -> None:
    if min(output) < 1:
        raise ValueError(
            f"{where}: an image of {sizes} with kernel {kernel[2:]} gives an output of sizes {tuple(output)}, and "
            f"every size must be at least 1. Use a larger image or more padding."
        )


def _check_shapes(where, kernel, input_shape, groups, transposed) -> None:
    axes = len(kernel) - 2
    if axes not in _CONVOLVE or 0 in kernel:
        raise ValueError(
            f"{where}: the weight has shape {kernel}, and two axes of channels followed by 1, 2 or 3 of the kernel, "
            f"none of them empty, are needed."
        )
    if len(input_shape) != axes + 1 or not all(isinstance(n, int) and n > 0 for n in input_shape):
        raise ValueError(
            f"{where}: input_shape must be (channels, {axes} sizes) of one sample, all at least 1, got {input_shape}. "
            f"Leave the batch out."
        )
    if not isinstance(groups, int) or groups < 1 or kernel[0] % groups:
        raise ValueError(f"{where}: groups must divide {kernel[0]}, the weight's first axis, got {groups!r}.")
    channels = kernel[0] if transposed else kernel[1] * groups
    if input_shape[0] != channels:
        raise ValueError(
            f"{where}: the weight {kernel} with groups={groups} reads {channels} channels, and input_shape "
            f"{input_shape} has {input_shape[0]}."
        )


def _each(where: str, name: str, value, axes: int, least: int) -> tuple[int, ...]:
    values = (value,) * axes if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else ()
    values = values * axes if len(values) == 1 else values
    if len(values) != axes or not all(isinstance(v, int) and v >= least for v in values):
        raise ValueError(f"{where}: {name} must be an integer of at least {least} or {axes} of them, got {value!r}.")
    return values


def _padding(where, padding, mode, stride, spans, sizes, extra) -> tuple[tuple[int, int], ...]:
    if any(extra):
        raise ValueError(f"{where}: output_padding belongs to transposed convolutions. Leave it 0.")
    if padding == "valid":
        given = ((0, 0),) * len(spans)
    elif padding == "same":
        if any(s != 1 for s in stride):
            raise ValueError(f"{where}: padding='same' needs stride 1, got stride={stride}. Give numbers.")
        given = tuple((span // 2, span - span // 2) for span in spans)  # the odd pixel goes behind, as in torch
    else:
        numbers = _each(where, "padding, if not 'same' or 'valid',", padding, len(spans), 0)
        given = tuple((p, p) for p in numbers)
    _check_reach(where, given, sizes, mode)
    return given


def _transposed_padding(where, padding, mode, stride, dilation, extra) -> tuple[tuple[int, int], ...]:
    if isinstance(padding, str) or mode != "zeros":
        raise ValueError(
            f"{where}: a transposed convolution takes padding in numbers and padding_mode 'zeros', "
            f"got padding={padding!r}, padding_mode={mode!r}."
        )
    if any(e >= max(s, d) for e, s, d in zip(extra, stride, dilation)):
        raise ValueError(
            f"{where}: output_padding must be less than the stride or the dilation, got output_padding={extra}, "
            f"stride={stride}, dilation={dilation}."
        )
    return tuple((p, p) for p in _each(where, "padding", padding, len(stride), 0))


def _check_reach(where, given, sizes, mode) -> None:
    """Reflection needs padding below the size, wrapping around at most the size, as torch's padding does."""
    slack = {"reflect": 1, "circular": 0}.get(mode)
    if slack is not None and any(max(edge) > n - slack for edge, n in zip(given, sizes)):
        raise ValueError(
            f"{where}: {mode} padding of an image of {sizes} reaches at most {tuple(n - slack for n in sizes)} pixels, "
            f"got {given} as (before, after). Use a larger image or less padding."
        )


def _line(n: int, before: int, after: int, mode: str) -> Tensor:
    """Which pixel stands where in a padded line of n: torch's own padding of 0 ... n - 1; -1 is a zero."""
    pixels = torch.arange(n, dtype=torch.float64, device="cpu").reshape(1, 1, n)
    if mode == "zeros":
        return F.pad(pixels, (before, after), value=-1.0).flatten().long()
    return F.pad(pixels, (before, after), mode=mode).flatten().long()


def _as_torch(edges) -> list[int]:
    return [side for pair in reversed(edges) for side in pair]


def _crop(x: Tensor, spans) -> Tensor:
    for axis, (start, length) in enumerate(spans):
        if x.shape[2 + axis] != length:
            x = x.narrow(2 + axis, start, length)
    return x


def _outer(old: Tensor, new: Tensor, size: int) -> Tensor:
    return (old[:, None] * size + new).flatten()
