"""Proved bound over the truth, and seconds, for the 20 convolutions of the CIFAR ResNet-18.

The truth of a layer is ARPACK's largest singular value (scipy svds, tol 1e-6) of the zero-padded convolution in
float64, an estimate from below, which is also the peer in time; ``--truth N`` leaves it out above N
inputs. Seconds are CPU seconds of the process, over its threads. All 20 layers, each with weights of its own, are bounded
before any peer runs, after one network that loads the libraries; a row has the largest ratio of the layers of its shape, and
their mean seconds.

    python tests/benchmarks/operator_norm.py [--threads 1] [--truth 20000] [--weights random spiked heavy] [--none]

At the end, networks of 32 equal layers: all at once by ``operator_norms_at_most`` against one by one.
"""

import argparse
import math
import time

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, svds
from torch import nn

from trainable_nn.linop import operator_norm_at_most, operator_norms_at_most


def resnet18() -> list[tuple[int, int, int, int, int, int]]:
    """(in, out, kernel, stride, n, how often)"""
    layers, width, n = [(3, 64, 3, 1, 32, 1), (64, 64, 3, 1, 32, 4)], 64, 32
    while width < 512:
        layers += [(width, 2 * width, 3, 2, n, 1), (width, 2 * width, 1, 2, n, 1)]
        width, n = 2 * width, n // 2
        layers.append((width, width, 3, 1, n, 3))
    return layers


def fill(weight: torch.Tensor, kind: str) -> None:
    """He's random weights; the same under a rank-one spike with a random pattern; or Student's t with 2.1 degrees."""
    nn.init.kaiming_normal_(weight)
    if kind == "heavy":
        weight.data = torch.distributions.StudentT(2.1).sample(weight.shape) * 0.02
    if kind == "spiked":
        rows, columns = (nn.functional.normalize(torch.randn(n), dim=0) for n in weight.shape[:2])
        pattern = nn.functional.normalize(torch.randn(weight[0, 0].numel()), dim=0).reshape(weight.shape[2:])
        weight.data += 2 * torch.einsum("o,i,yx->oiyx", rows, columns, pattern)


def truth(conv: nn.Conv2d, n: int) -> float:
    weight, shape, options = conv.weight.detach().double(), (1, conv.in_channels, n, n), (conv.stride, conv.padding)
    out = (1, conv.out_channels, *(2 * [(n - 1) // conv.stride[0] + 1]))
    forth = lambda v: nn.functional.conv2d(torch.from_numpy(v).reshape(shape), weight, None, *options).numpy().ravel()
    back = lambda v: nn.grad.conv2d_input(shape, weight, torch.from_numpy(v).reshape(out), *options).numpy().ravel()
    operator = LinearOperator((math.prod(out), math.prod(shape)), matvec=forth, rmatvec=back, dtype=np.float64)
    return float(svds(operator, 1, tol=1e-6, return_singular_vectors=False, random_state=0)[0])


def cpu_seconds(f, *arguments) -> tuple[float, float]:
    start = time.process_time()
    value = f(*arguments)
    return value, time.process_time() - start


def bounds_of(kind: str) -> list[list[tuple[nn.Conv2d, float, float]]]:
    """For each shape its layers, all of different weights, with their bounds and CPU seconds, in the network's order."""
    found = []
    for c, d, k, s, n, times in resnet18():
        layers = []
        for seed in range(times):
            torch.manual_seed(seed)
            layers.append(nn.Conv2d(c, d, k, s, k // 2, bias=False))
            fill(layers[-1].weight, kind)
        found.append([(conv, *cpu_seconds(operator_norm_at_most, conv, (n, n))) for conv in layers])
    return found


def equal_layers(channels: int, n: int) -> tuple[float, float]:
    """CPU seconds of 32 layers at once and one by one, each the least of three."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(channels, channels, 3, 1, 1, bias=False) for _ in range(32)]
    network = nn.Sequential(*layers)
    together = min(cpu_seconds(operator_norms_at_most, network, (1, channels, n, n))[1] for _ in range(3))
    alone = min(cpu_seconds(lambda: [operator_norm_at_most(layer, (n, n)) for layer in layers])[1] for _ in range(3))
    return together, alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--truth", type=int, default=20_000, help="most inputs of a layer whose truth is found")
    parser.add_argument("--weights", nargs="+", default=["random", "spiked", "heavy"])
    parser.add_argument("--none", action="store_true", help="the bound for every size too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bounds_of("random")  # loads the libraries
    found = {kind: bounds_of(kind) for kind in arguments.weights}  # before a peer fills caches and heap
    for kind in arguments.weights:
        print(f"{kind + ' weights':28s} {'bound/truth':>12s} {'s':>8s} {'s, svds':>8s}")
        total = total_peer = 0.0
        for (c, d, k, s, n, times), of_shape in zip(resnet18(), found[kind]):
            seconds = sum(each for _, _, each in of_shape)
            known = c * n * n <= arguments.truth
            truths = [cpu_seconds(truth, conv, n) if known else (math.nan, math.nan) for conv, _, _ in of_shape]
            ratio = max(bound / norm for (_, bound, _), (norm, _) in zip(of_shape, truths))
            peer = sum(each for _, each in truths)
            total, total_peer = total + seconds, total_peer + peer
            name = f"{times} x {c:3d} -> {d:3d} {k}x{k}/{s} n={n}"
            every = ""
            if arguments.none:
                bound_every, seconds_every = cpu_seconds(operator_norm_at_most, of_shape[0][0], None)
                every = f"   every size: {bound_every / truths[0][0]:7.4f} {seconds_every:6.2f} s"
            print(f"{name:28s} {ratio:12.4f} {seconds / times:8.3f} {peer / times:8.3f}{every}", flush=True)
        print(f"{'the network':28s} {'':12s} {total:8.2f} {total_peer:8.2f}\n")
    for channels, n in ((2, 4), (16, 2), (8, 4), (16, 4), (16, 32)):
        together, alone = equal_layers(channels, n)
        name = f"32 x {channels:2d} -> {channels:2d} 3x3 n={n}"
        print(f"{name:28s} together {together:.3f} s, one by one {alone:.3f} s, {alone / together:.2f}x")


if __name__ == "__main__":
    main()
