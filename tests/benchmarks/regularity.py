"""Proved constants over what is found: per layer, per random network, and on BASELINES' reference problems.

Found is the largest that autograd in float64 gives: ||DF|| from the dense Jacobian now, Lip(DF) as ||D2F[v, v]|| by ascent in
v, ||J|| from the layer's dense Jacobian in its input; the second is a lower bound of the truth, so its ratio is an upper
bound of the bound's looseness. A ratio below 1 would be a violation.

    python tests/benchmarks/regularity.py [--networks 40] [--steps 30] [--reference 4,0.5 8,0.9] [--radius 1e-6]
"""

import argparse
import pathlib
import sys
import time
import warnings

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from provable_nets import reference_problem
from regularity_networks import F64, Truth, network

import trainable_nn as tnn
from trainable_nn import modules
from trainable_nn.certify.regularity import network_regularity
from trainable_nn.modules.floored import FlooredBatchNorm1d

LAYERS = {
    "Linear": lambda: nn.Linear(6, 5),
    "EntryNormLinear": lambda: tnn.EntryNormLinear(6, 5),
    "EntryNormLinear, leak": lambda: tnn.EntryNormLinear(6, 5, leak=0.2),
    "WeightNormLinear": lambda: tnn.WeightNormLinear(6, 5),
    "SpectralNormLinear, p = 1": lambda: modules.SpectralNormLinear(6, 5, power=1),
    "SpectralNormLinear, p = 16": lambda: modules.SpectralNormLinear(6, 5, power=16),
    "BatchNorm1d": lambda: nn.BatchNorm1d(6, track_running_stats=False),
    "FlooredBatchNorm1d": lambda: FlooredBatchNorm1d(6, track_running_stats=False, smooth=True),
    "Conv2d": lambda: nn.Conv2d(2, 3, 3, padding=1),
    "EntryNormConv2d": lambda: tnn.EntryNormConv2d(2, 3, 3, padding=1),
    "WeightNormConv2d": lambda: tnn.WeightNormConv2d(2, 3, 3, padding=1),
    "SpectralNormConv2d": lambda: modules.SpectralNormConv2d(2, 3, 3, padding=1, power=4),
}


def ratio(bound: float, found: float) -> str:
    return f"{bound / found:9.3f}" if found > 1e-9 else ("        =" if bound < 1e-6 else "        -")


def found(model: nn.Module, inputs: torch.Tensor, steps: int) -> tuple[float, float, float]:
    truth, generator = Truth(model, inputs), torch.Generator().manual_seed(0)
    jacobian = float(torch.linalg.matrix_norm(truth.jacobian(truth.theta), 2))
    lipschitz = max(truth.largest(truth.second, 0.0, generator, steps) for _ in range(2))
    return jacobian, lipschitz, float(truth(truth.theta).norm())


def per_layer(steps: int) -> None:
    """Each layer alone, at radius 0: attained where the ratio is 1."""
    print(f"{'layer':28} {'||J||':>9} {'||DF||':>9} {'Lip(DF)':>9}")
    for name, build in LAYERS.items():
        torch.manual_seed(0)
        layer = build().double()
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        inputs = torch.randn((4, 2, 5, 5) if "Conv" in name else (4, 6), dtype=F64)
        proved = network_regularity(nn.Sequential(layer), inputs, radius=0.0)
        dense = torch.func.jacrev(lambda x, layer=layer: layer(x).flatten())(inputs).reshape(-1, inputs.numel())
        jacobian, lipschitz, _ = found(nn.Sequential(layer), inputs, steps)
        norm = float(torch.linalg.matrix_norm(dense, 2))
        J = proved.layers[0].regularity.J
        print(f"{name:28} {ratio(J, norm)} {ratio(proved.jacobian, jacobian)} {ratio(proved.jacobian_lipschitz, lipschitz)}")


def per_network(count: int, steps: int) -> None:
    """The tests' random networks, at radius 0."""
    ratios = []
    for seed in range(count):
        model, inputs = network(seed)
        proved = network_regularity(model, inputs, radius=0.0)
        jacobian, lipschitz, value = found(model, inputs, steps)
        bounds = (proved.jacobian, proved.jacobian_lipschitz, proved.value)
        ratios.append([b / f if f > 1e-9 else np.nan for b, f in zip(bounds, (jacobian, lipschitz, value))])
    for name, column in zip(("||DF||", "Lip(DF)", "||F||"), np.array(ratios).T):
        kept = column[np.isfinite(column)]
        print(f"{count} random networks, {name:8} bound / found: min {kept.min():.3f}, median {np.median(kept):.2f}, max {kept.max():.1f}")


def per_reference(problems: list[str], radius: float, steps: int) -> None:
    """Blocks, strength: ratios, and the term of Lip(DF) in the loss's smoothness over that of ||DF||^2."""
    print(f"{'blocks, strength':18} {'||DF||':>9} {'Lip(DF)':>9} {'|r| Lip / |DF|^2':>17} {'CPU s':>7}")
    for problem in problems:
        blocks, strength = problem.split(",")
        net, inputs, targets = reference_problem(int(blocks), float(strength))
        start = time.process_time()
        proved = network_regularity(net, inputs, radius=radius)
        seconds = time.process_time() - start
        jacobian, lipschitz, _ = found(net, inputs, steps)
        share = float((net(inputs) - targets).detach().norm()) * proved.jacobian_lipschitz / jacobian**2
        ratios = f"{ratio(proved.jacobian, jacobian)} {ratio(proved.jacobian_lipschitz, lipschitz)}"
        print(f"{problem:18} {ratios} {share:17.2f} {seconds:7.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=40)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--reference", nargs="*", default=["2,0.5", "4,0.5", "8,0.9"])
    parser.add_argument("--radius", type=float, default=1e-6)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print("bound / found\n")
    per_layer(arguments.steps)
    print()
    per_network(arguments.networks, arguments.steps)
    print()
    per_reference(arguments.reference, arguments.radius, arguments.steps)


if __name__ == "__main__":
    main()
