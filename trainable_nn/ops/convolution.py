r"""Products of a convolution whose kernel is K = P(w), as one operator each: forward mode, its transpose, Gram.

With P a map of this package and DP its derivative, which is symmetric,

    forward mode    y = conv(x, P(w)),   t = conv(x, DP(w) dw) + conv(dx, P(w))
    its transpose   (DP(w) dk, dx),      dk and dx the gradients of <u, conv(x, k)> at k = P(w)
    Gram            J^T J v, for J = d conv(x, K) / dx

The derivative of the normalisation is fused with its value, one pass over the weights (``csrc/weight_norm.h``). A
convolution copies its kernel into blocks before it starts, so where the kernel is larger than the image x and dx go
through P(w) as one batch; and where there are fewer pixels than filters the convolution is the matrix product of the
kernel with the patches of x, which copies no kernel, if this machine's products keep pace (``pace``). Where the image is
small beside the kernel, forward mode goes through blocks of filters: P and DP stay in cache until they are multiplied; and
a weight-normalised filter, a number times the filter itself, is not written at all (``csrc/cpu/conv_rows.h``).

The operators differentiate nothing: callers take another way where something does.
Source: paper A, equations (18), (20) and (21).
"""

import math

import torch
from torch import Tensor

from .eager import may_look_at
from .entry_norm import kernels as entry_norm
from .pace import channels_last_pays, matrices_beat_convolutions
from .registry import define
from .weight_norm import kernels as weight_norm

GEOMETRY = "int[] stride, int[] padding, int[] dilation, bool transposed, int[] output_padding, int groups"
NORMALISED = f"str normalisation, float[] constants, {GEOMETRY}"
_PAIRS = {"entry_norm": entry_norm.pair, "weight_norm": weight_norm.pair}
IDENTITY = "identity"  # P(w) = w
_BLOCK = 2**21  # bytes of the kernel's rows that one thread normalises at once
_LANES = 64  # rows, of which a block is a multiple: oneDNN's own blocks divide it
_IMAGES_PER_KERNEL = 8  # or more, where blocks pay; measured


def _pair(name: str, dw: Tensor, w: Tensor, constants) -> tuple[Tensor, Tensor]:
    return (w, dw) if name == IDENTITY else _PAIRS[name](dw, w, *constants)


def _convolve(x: Tensor, kernel: Tensor, bias: Tensor | None, geometry) -> Tensor:
    return torch.convolution(x, kernel, bias, *geometry)


def _gradient(u: Tensor, x: Tensor, kernel: Tensor, geometry, of_kernel: bool) -> Tensor:
    """Of <u, conv(x, kernel)> in the kernel or in x."""
    mask = [not of_kernel, of_kernel, False]
    return torch.ops.aten.convolution_backward.default(u, x, kernel, None, *geometry, mask)[of_kernel]


def _pixels(x: Tensor, kernel: Tensor, geometry) -> list[int]:
    """Sizes of the output of a convolution that is not transposed."""
    stride, padding, dilation = geometry[:3]
    sizes = zip(x.shape[2:], kernel.shape[2:], stride, padding, dilation)
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]


def _few_pixels(x: Tensor, kernel: Tensor, geometry) -> bool:
    """Whether the outputs are so few that the patches cost little beside the kernel."""
    transposed, groups = geometry[3], geometry[5]
    if transposed or groups != 1 or x.device.type != "cpu":
        return False
    return 2 * len(x) * math.prod(_pixels(x, kernel, geometry)) <= len(kernel)


def _as_matrices(x: Tensor, kernel: Tensor, geometry) -> bool:
    """Whether the product with patches is the faster convolution."""
    return x.is_cpu and matrices_beat_convolutions() and _few_pixels(x, kernel, geometry)


def _patches(images: list[Tensor], kernel: Tensor, geometry) -> Tensor:
    """(inputs of one pixel, images, pixels * batch): what each output pixel reads; the batch is innermost."""
    stride, padding, dilation = geometry[:3]
    axes = len(stride)
    out = None
    for i, x in enumerate(images):
        x = torch.nn.functional.pad(x, [p for size in reversed(padding) for p in (size, size)])
        x = x.movedim(0, -1).contiguous()  # so that runs of memory are long
        for axis, (k, s, d) in enumerate(zip(kernel.shape[2:], stride, dilation)):
            x = x.unfold(1 + axis, d * (k - 1) + 1, s)[..., ::d]
        x = x.permute(0, *range(2 + axes, 2 + 2 * axes), *range(1, 2 + axes))  # channel, taps, pixels, batch
        out = x.new_empty(*x.shape[: 1 + axes], len(images), *x.shape[1 + axes :]) if out is None else out
        out.select(1 + axes, i).copy_(x)
    return out.reshape(kernel[0].numel(), len(images), -1)


def _image(matrix: Tensor, pixels: list[int]) -> Tensor:
    """(filters, pixels * batch) -> (batch, filters, pixels...)."""
    return matrix.reshape(len(matrix), *pixels, -1).movedim(-1, 0).contiguous()


def _add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias.reshape(-1, *(1,) * (y.dim() - 2))


def _rows_at_once(x: Tensor, w: Tensor, normalisation: str, geometry) -> int:
    """Rows of the kernel for which P and DP stay in cache from the pass that writes them to the convolutions that read them.

    Each block reads the images again, so that this pays only where they are small beside the kernel.
    """
    filters, entries = len(w), w.numel()
    if _IMAGES_PER_KERNEL * x.numel() > entries:
        return filters
    transposed, groups = geometry[3], geometry[5]
    if normalisation == IDENTITY or transposed or groups != 1 or not x.is_cpu:
        return filters
    rows = _BLOCK // (w.element_size() * entries // filters) * torch.get_num_threads()
    return max(round(rows / _LANES), 1) * _LANES


def _in_blocks(g, w, x, images, rows, pair, geometry) -> tuple[Tensor, Tensor]:
    """conv(images, P(w)) on the first images, and its sum with conv(x, DP(w) g) on the last, as many as x has."""
    values, tangents = [], []
    for block in zip(g.split(rows), w.split(rows)):
        kernel, along = pair(*block)
        product, n = _convolve(images, kernel, None, geometry), len(images) - len(x)
        values.append(product[:n])
        tangents.append(_convolve(x, along, None, geometry).add_(product[n:]))
    return torch.cat(values, 1).contiguous(), torch.cat(tangents, 1).contiguous()


def _weight_norm_rows(g, w, x, images, rows, eps, gain, stride, padding, dilation, groups):
    geometry = stride, padding, dilation, False, [0] * len(stride), groups
    rows = rows if groups == 1 else len(w)  # a group's rows stay together
    return _in_blocks(g, w, x, images, rows, lambda *block: weight_norm.pair(*block, eps, gain), geometry)


def _by_rows(g, w, x, images, normalisation, constants, geometry) -> tuple[Tensor, Tensor] | None:
    """``_in_blocks``, by one compiled operator where there is one; None: the whole kernel at once is as fast."""
    rows = _rows_at_once(x, w, normalisation, geometry)
    stride, padding, dilation, transposed, _, groups = geometry
    if normalisation == "weight_norm" and x.is_cpu and not transposed and w.dtype in (torch.float32, torch.float64):
        return weight_norm_rows(g, w, x, images, rows, *constants, stride, padding, dilation, groups)
    if rows >= len(w):
        return None
    return _in_blocks(g, w, x, images, rows, lambda *block: _pair(normalisation, *block, constants), geometry)


def _jvp(dw, dx, w, x, bias, normalisation, constants, *geometry):
    if w.numel() < x.numel():
        kernel, along = _pair(normalisation, dw, w, constants)
        y, t = _convolve(x, kernel, bias, geometry), _convolve(x, along, None, geometry)
        return y.contiguous(), t.add_(_convolve(dx, kernel, None, geometry)).contiguous()
    if _as_matrices(x, w, geometry):
        kernel, along = _pair(normalisation, dw, w, constants)
        patches, pixels = _patches([x, dx], kernel, geometry), _pixels(x, kernel, geometry)
        n = patches.shape[2]
        both = kernel.flatten(1) @ patches.flatten(1)
        t = both[:, n:].addmm_(along.flatten(1), patches[:, 0])
        return _add_bias(_image(both[:, :n], pixels), bias), _image(t, pixels)
    images = torch.cat((x, dx))
    results = _by_rows(dw, w, x, images, normalisation, constants, geometry)
    if results is not None:
        return _add_bias(results[0], bias), results[1]
    kernel, along = _pair(normalisation, dw, w, constants)
    both, t = _convolve(images, kernel, None, geometry), _convolve(x, along, None, geometry)
    return _add_bias(both[: len(x)].clone(), bias).contiguous(), t.add_(both[len(x) :]).contiguous()


def _tangent(dw, dx, w, x, normalisation, constants, *geometry):
    if w.numel() >= x.numel() and _as_matrices(x, w, geometry):
        kernel, along = _pair(normalisation, dw, w, constants)
        patches = _patches([x, dx], kernel, geometry)
        t = (along.flatten(1) @ patches[:, 0]).addmm_(kernel.flatten(1), patches[:, 1])
        return _image(t, _pixels(x, kernel, geometry))
    results = _by_rows(dw, w, x, dx, normalisation, constants, geometry)
    if results is not None:
        return results[1]
    kernel, along = _pair(normalisation, dw, w, constants)
    return _convolve(x, along, None, geometry).add_(_convolve(dx, kernel, None, geometry)).contiguous()


def _vjp(u, w, x, normalisation, constants, *geometry):
    if _few_pixels(x, w, geometry):  # faster than oneDNN's gradient of the kernel wherever it was measured
        dk = (u.transpose(0, 1).movedim(1, -1).flatten(1) @ _patches([x], w, geometry)[:, 0].mT).reshape(w.shape)
    else:
        dk = _gradient(u, x, w, geometry, of_kernel=True)
    kernel, dw = _pair(normalisation, dk, w, constants)
    if normalisation == IDENTITY:
        dw = torch.empty_like(w).copy_(dw)  # the layout that every kernel gives
    return dw, _gradient(u, x, kernel, geometry, of_kernel=False).contiguous()


def _gram(v, kernel, *geometry):
    if v.dim() == 4 and v.device.type == "cpu" and v.numel() > kernel.numel() and channels_last_pays():
        v = v.contiguous(memory_format=torch.channels_last)  # then oneDNN keeps the image as it is between the two
    return _gradient(_convolve(v, kernel, None, geometry), v, kernel, geometry, of_kernel=False).contiguous()


def _directly(operator, implementation):
    """The operator, without the dispatcher where nothing watches it: the way there and back costs 20 us."""

    def run(*arguments):
        return (implementation if may_look_at(arguments[0]) else operator)(*arguments)

    return run


def _fake_output(x, kernel, geometry) -> Tensor:
    return x.new_empty(_convolve(x, kernel, None, geometry).shape)


def _fake_rows(w, x, images, stride, padding, dilation, groups) -> tuple[Tensor, Tensor]:
    t = _fake_output(x, w, (stride, padding, dilation, False, [0] * len(stride), groups))
    return t.new_empty(len(images) - len(x), *t.shape[1:]), t


weight_norm_rows = define(
    "weight_norm_conv_rows(Tensor g, Tensor w, Tensor x, Tensor images, int rows, float eps, float gain, "
    "int[] stride, int[] padding, int[] dilation, int groups) -> (Tensor, Tensor)",
    _weight_norm_rows,
    lambda g, w, x, images, rows, eps, gain, *geometry: _fake_rows(w, x, images, *geometry),
    equal_operands=False,
)
jvp = _directly(
    define(
        f"normalised_conv_jvp(Tensor dw, Tensor dx, Tensor w, Tensor x, Tensor? bias, {NORMALISED}) -> (Tensor, Tensor)",
        _jvp,
        lambda dw, dx, w, x, bias, name, c, *g: (_fake_output(x, w, g), _fake_output(x, w, g)),
        equal_operands=False,
    ),
    _jvp,
)
tangent = _directly(
    define(
        f"normalised_conv_tangent(Tensor dw, Tensor dx, Tensor w, Tensor x, {NORMALISED}) -> Tensor",
        _tangent,
        lambda dw, dx, w, x, name, c, *g: _fake_output(x, w, g),
        equal_operands=False,
    ),
    _tangent,
)
vjp = _directly(
    define(
        f"normalised_conv_vjp(Tensor u, Tensor w, Tensor x, {NORMALISED}) -> (Tensor, Tensor)",
        _vjp,
        lambda u, w, x, name, c, *g: (torch.empty_like(w), x.new_empty(x.shape)),
        equal_operands=False,
    ),
    _vjp,
)
gram = _directly(
    define(
        f"conv_gram(Tensor v, Tensor kernel, {GEOMETRY}) -> Tensor",
        _gram,
        lambda v, kernel, *g: v.new_empty(v.shape),
        equal_operands=False,
    ),
    _gram,
)
