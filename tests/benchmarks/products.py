"""What a product with the Jacobian of a normalised convolution costs, in multiples of one forward convolution.

For the 20 convolutions of the CIFAR ResNet-18 (11 shapes), float32, kernel P(w):

* joint: y and its tangent for (dw, dx), ``ConvParameterJacobian.joint_mv``; floor 3 convolutions;
* tangent alone, ``joint_tangent``; floor 2;
* transpose: the gradients in w and x, ``joint_rmv``; floor 2;
* Gram: J^T J v with the Jacobian in x, ``ToeplitzConv.gram_mv``; floor 2;

beside ``torch.func.jvp`` and ``torch.func.vjp`` of the layer and the products written by hand with torch's own
operations. One forward convolution is ``conv2d(x, P)`` with the normalised kernel ready. Times are CPU seconds of the
process, every variant once in each round; the ratio is that of the sums over the convolutions, the median over rounds,
with the quartiles beside it.

A block of HEAP bytes is freed before anything is measured: glibc then keeps freed memory for the next call. In a process
that has freed nothing larger than one output it returns the top of the heap again and again, and the page faults of
fresh outputs take up to half of a convolution's time, by chance more in one variant than in another (--cold shows it).

    python tests/benchmarks/products.py [--rounds 15] [--batch 8] [--norm weight|entry] [--shapes] [--cold]
"""

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from normalise import cpu_seconds
from torch import Tensor
from torch.func import functional_call, jvp, vjp

from trainable_nn.linop import ConvParameterJacobian, ToeplitzConv
from trainable_nn.modules import EntryNormConv2d, WeightNormConv2d
from trainable_nn.ops import native

LAYERS = {"weight": WeightNormConv2d, "entry": EntryNormConv2d}
HEAP = 31 * 2**20  # the largest that moves glibc's threshold is below 32 MiB
Variants = dict[str, Callable[[], object]]


def resnet18_convolutions() -> list[tuple[int, tuple[int, int, int, int], int]]:
    """(how many, (in, out, taps, stride), image size) of the CIFAR ResNet-18's 11 shapes."""
    shapes, width, size = [(1, (3, 64, 3, 1), 32), (4, (64, 64, 3, 1), 32)], 64, 32
    while width < 512:
        shapes += [(1, (width, 2 * width, 3, 2), size), (3, (2 * width, 2 * width, 3, 1), size // 2)]
        shapes += [(1, (width, 2 * width, 1, 2), size)]
        width, size = 2 * width, size // 2
    return shapes


def eager_kernel(norm: str, w: Tensor, dw: Tensor) -> tuple[Tensor, Tensor]:
    """P(w) and DP(w) dw in plain PyTorch, eps = 1."""
    if norm == "entry":
        r = torch.rsqrt(1.0 + w * w)
        return w * r, dw * r**3
    rho = torch.rsqrt(1.0 + w.square().sum((1, 2, 3), keepdim=True))
    n = w * rho
    return n, rho * (dw - n * (n * dw).sum((1, 2, 3), keepdim=True))


def variants(norm: str, shape: tuple[int, int, int, int], size: int, batch: int) -> Variants:
    inputs, outputs, taps, stride = shape
    layer = LAYERS[norm](inputs, outputs, taps, stride, taps // 2, bias=False).requires_grad_(False)
    w, x = layer.weight, torch.randn(batch, inputs, size, size)
    dw, dx = torch.randn_like(w), torch.randn_like(x)
    kernel = layer.effective_weight()
    y = F.conv2d(x, kernel, None, stride, taps // 2)
    u = torch.randn_like(y)
    own, toeplitz = ConvParameterJacobian(layer, x), ToeplitzConv(layer, x.shape[1:])
    run = lambda w, x: functional_call(layer, {"weight": w}, (x,))
    conv = lambda x, k: F.conv2d(x, k, None, stride, taps // 2)
    flat_w, flat_x, flat_u, columns = dw.flatten(), dx.flatten(), u.flatten(), x.flatten(1).T

    def tangent_by_hand():
        p, dp = eager_kernel(norm, w, dw)
        return conv(x, dp) + conv(dx, p)

    def joint_by_hand():
        p, dp = eager_kernel(norm, w, dw)
        return conv(x, p), conv(x, dp) + conv(dx, p)

    def transpose_by_hand():
        p = eager_kernel(norm, w, w)[0]
        dk = torch.nn.grad.conv2d_weight(x, w.shape, u, stride, taps // 2)
        return eager_kernel(norm, w, dk)[1], torch.nn.grad.conv2d_input(x.shape, p, u, stride, taps // 2)

    def gram_by_hand():
        return torch.nn.grad.conv2d_input(x.shape, kernel, conv(x, kernel), stride, taps // 2)

    check(own.joint_mv(flat_w, flat_x), joint_by_hand())
    check(own.joint_tangent(flat_w, flat_x), tangent_by_hand())
    check(own.joint_rmv(flat_u), transpose_by_hand())
    check(toeplitz.gram_mv(columns).T, gram_by_hand())
    return {
        "conv": lambda: conv(x, kernel),
        "joint, ours": lambda: own.joint_mv(flat_w, flat_x),
        "joint, by hand": joint_by_hand,
        "joint, torch.func.jvp": lambda: jvp(run, (w, x), (dw, dx)),
        "tangent alone, ours": lambda: own.joint_tangent(flat_w, flat_x),
        "tangent alone, by hand": tangent_by_hand,
        "transpose, ours": lambda: own.joint_rmv(flat_u),
        "transpose, by hand": transpose_by_hand,
        "transpose, torch.func.vjp": lambda: vjp(run, w, x)[1](u),
        "J^T J v, ours": lambda: toeplitz.gram_mv(columns),
        "J^T J v, by hand": gram_by_hand,
    }


def check(found, expected) -> None:
    """A fast wrong answer has no speed."""
    for a, b in zip(*((r if isinstance(r, tuple) else (r,)) for r in (found, expected))):
        torch.testing.assert_close(a.flatten(), b.flatten(), rtol=1e-3, atol=1e-3 * float(b.abs().max()))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--norm", choices=LAYERS, default="weight")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", action="store_true", help="the ratios of each shape, too")
    parser.add_argument("--cold", action="store_true", help="leave the heap as a fresh process has it")
    arguments = parser.parse_args()
    if not arguments.cold:
        torch.empty(HEAP, dtype=torch.uint8)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(native.report())
    sums: dict[str, list[float]] = {}
    for count, shape, size in resnet18_convolutions():
        seconds = cpu_seconds(variants(arguments.norm, shape, size, arguments.batch), arguments.rounds)
        for name, times in seconds.items():
            old = sums.get(name, [0.0] * len(times))
            sums[name] = [a + count * b for a, b in zip(old, times)]
        if arguments.shapes:
            print(count, shape, size, *(f"{name} {ratio(seconds, name):.2f};" for name in seconds), flush=True)
    print(f"\none convolution over all layers, batch {arguments.batch}: {1e3 * min(sums['conv']):.1f} ms CPU")
    print(f"{arguments.norm} normalisation, multiples of it:")
    for name, times in sums.items():
        low, _, high = statistics.quantiles(a / b for a, b in zip(times, sums["conv"]))
        print(f"  {name:28s} {ratio(sums, name):6.2f}  ({low:.2f}-{high:.2f})")


def ratio(seconds: dict[str, list[float]], name: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[name], seconds["conv"]))


if __name__ == "__main__":
    main()
