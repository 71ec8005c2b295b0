"""Extreme singular values of the CIFAR ResNet-18's convolutions: CPU seconds against scipy and a dense SVD, in one run.

The largest of all 20 layers against scipy's svds (float64, tol 1e-6); the smallest at 512 channels of 4 x 4 (8,192 unknowns)
against torch's dense SVD, which takes a minute, with --dense; at 64 channels of 32 x 32 (65,536 unknowns) with
--large, and the most memory that the process had.

    python tests/benchmarks/spectrum.py [--threads 1] [--dense] [--large] [--layers 20]
"""

import argparse
import resource

import torch
from operator_norm import cpu_seconds, fill, resnet18, truth
from torch import nn

from trainable_nn.linop import ToeplitzConv, extreme_singular_values


def layer(c: int, d: int, k: int, s: int, kind: str = "random") -> nn.Conv2d:
    torch.manual_seed(0)
    conv = nn.Conv2d(c, d, k, s, k // 2, bias=False)
    fill(conv.weight, kind)
    return conv


def largest(kinds: int) -> None:
    totals = [0.0, 0.0]
    print(f"{'largest':28s} {'off svds by':>12s} {'s':>8s} {'s, svds':>8s}")
    for c, d, k, s, n, times in resnet18()[:kinds]:
        conv = layer(c, d, k, s)
        found, seconds = cpu_seconds(lambda c=c, n=n, conv=conv: extreme_singular_values(ToeplitzConv(conv, (c, n, n)), which="largest"))
        value, peer = cpu_seconds(truth, conv, n)
        totals = [totals[0] + times * seconds, totals[1] + times * peer]
        flag = "" if found.largest_converged else "  not converged"
        name = f"{times} x {c:3d} -> {d:3d} {k}x{k}/{s} n={n}"
        print(f"{name:28s} {abs(found.largest / value - 1):12.1e} {seconds:8.3f} {peer:8.3f}{flag}", flush=True)
    print(f"{'the network':28s} {'':12s} {totals[0]:8.2f} {totals[1]:8.2f}  svds / ours {totals[1] / totals[0]:.1f}\n")


def smallest(c: int, n: int, dense: bool) -> None:
    operator = ToeplitzConv(layer(c, c, 3, 1), (c, n, n))
    found, seconds = cpu_seconds(lambda: extreme_singular_values(operator, which="smallest"))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"smallest of {c} channels at {n} x {n}: {found.smallest:.9g}, residual {found.residuals[0]:.1e}, "
        f"converged {found.smallest_converged}, {found.method}, {seconds:.2f} s, {memory:.2f} GiB in all",
        flush=True,
    )
    if dense:
        matrix = operator.to(torch.float64).dense().detach()
        values, peer = cpu_seconds(torch.linalg.svdvals, matrix)
        print(f"    dense SVD: off by {abs(found.smallest / float(values[-1]) - 1):.1e}, {peer:.2f} s, dense / ours {peer / seconds:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dense", action="store_true", help="the dense SVD of 8,192 unknowns: a minute, 2 GiB")
    parser.add_argument("--large", action="store_true", help="65,536 unknowns: a minute, 2 GiB")
    parser.add_argument("--layers", type=int, default=11, help="of the network's 11 kinds")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    extreme_singular_values(ToeplitzConv(nn.Conv2d(8, 8, 3, padding=1), (8, 9, 9)))  # loads the libraries
    if arguments.large:
        smallest(64, 32, False)  # first, so that the memory is its own
    smallest(64, 8, False)
    if arguments.dense:
        smallest(512, 4, True)
    largest(arguments.layers)


if __name__ == "__main__":
    main()
