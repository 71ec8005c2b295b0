"""What a product with the Jacobian of a normalised convolution costs, in multiples of one forward convolution.

For the 20 convolutions of the CIFAR ResNet-18 (11 shapes), float32, kernel P(w):

* joint: y and its tangent for (dw, dx), ``ConvParameterJacobian.joint_mv``; floor 3 convolutions;
* tangent alone, ``joint_tangent``; floor 2;
* transpose: the gradients in w and x, ``joint_rmv``; floor 2;
* Gram: J^T J v with the Jacobian in x, ``ToeplitzConv.gram_mv``; floor 2;

beside ``torch.func.jvp`` and ``torch.func.vjp`` of the layer and the products written by hand with torch's own
operations. One forward convolution is ``conv2d(x, P)`` with the normalised kernel ready. Times are CPU seconds of the
process. In each round every variant passes through the 20 convolutions once, one after the other, as a network does: each
has weights of its own, and finds them out of cache. The ratio is that of the passes, the median over rounds, with the
quartiles beside it. --alone repeats all variants of one convolution before it goes to the next one, which leaves that
one's kernel in cache for whichever variant follows another that has read it.

A block of HEAP bytes is freed before anything is measured: glibc then keeps freed memory for the next call. In a process
that has freed nothing larger than one output it returns the top of the heap again and again, and the page faults of
fresh outputs take up to half of a convolution's time, by chance more in one variant than in another (--cold shows it).

    python tests/benchmarks/products.py [--rounds 15] [--batch 8] [--norm weight|entry] [--shapes] [--cold] [--alone]
"""

import argparse
import statistics
import time
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


def times_of(layers: list[Variants], rounds: int, alone: bool) -> list[dict[str, list[float]]]:
    """CPU seconds of each layer's variants, round by round, after a first round that nothing counts."""
    if alone:
        return [cpu_seconds(layer, rounds) for layer in layers]
    seconds = [{name: [] for name in layer} for layer in layers]
    for _ in range(1 + rounds):
        for name in layers[0]:
            for layer, times in zip(layers, seconds):
                start = time.process_time()
                layer[name]()
                times[name].append(time.process_time() - start)
    return [{name: times[1:] for name, times in layer.items()} for layer in seconds]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--norm", choices=LAYERS, default="weight")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", action="store_true", help="the ratios of each convolution, too")
    parser.add_argument("--cold", action="store_true", help="leave the heap as a fresh process has it")
    parser.add_argument("--alone", action="store_true", help="one convolution after the other, each again and again")
    arguments = parser.parse_args()
    if not arguments.cold:
        torch.empty(HEAP, dtype=torch.uint8)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(native.report())
    shapes = [(shape, size) for count, shape, size in resnet18_convolutions() for _ in range(count)]
    layers = [variants(arguments.norm, *shape, arguments.batch) for shape in shapes]
    seconds = times_of(layers, arguments.rounds, arguments.alone)
    if arguments.shapes:
        for shape, of_layer in zip(shapes, seconds):
            print(*shape, *(f"{name} {ratio(of_layer, name):.2f};" for name in of_layer), flush=True)
    sums = {name: [sum(parts) for parts in zip(*(layer[name] for layer in seconds))] for name in layers[0]}
    print(f"\none convolution over all layers, batch {arguments.batch}: {1e3 * min(sums['conv']):.1f} ms CPU")
    print(f"{arguments.norm} normalisation, multiples of it:")
    for name, times in sums.items():
        low, _, high = statistics.quantiles(a / b for a, b in zip(times, sums["conv"]))
        print(f"  {name:28s} {ratio(sums, name):6.2f}  ({low:.2f}-{high:.2f})")


def ratio(seconds: dict[str, list[float]], name: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[name], seconds["conv"]))


if __name__ == "__main__":
    main()
