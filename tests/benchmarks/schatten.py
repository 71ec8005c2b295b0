"""What Schatten normalisation costs over the 20 convolutions of the CIFAR ResNet-18, beside the layers and torch's spectral norm.

For each kind of layer, CPU seconds of forward + backward of the normalisation alone, over the forward + backward of the
plain convolution on a batch; then the sums, each layer as often as it occurs. The peer is
``torch.nn.utils.parametrizations.spectral_norm`` in training mode, one step of power iteration, which bounds nothing. ``L / norm``
is how far the smooth bound of random weights is above the proved norm for every size: a layer's norm reaches gain divided by it.

--network: one training step of the provable form of a small residual network (width 8, 28 x 28, batch 128, 12 such layers and
a dense first one) over one of the original, where the normalisations are calls rather than arithmetic.

All in one process; convolution times are taken at --images and scaled to --batch.

    python tests/benchmarks/schatten.py [--batch 128] [--images 8] [--rounds 3] [--power 16] [--widest 512] [--network]
"""

import argparse
import pathlib
import statistics
import sys
import time

import torch
from operator_norm import resnet18
from torch import nn

import trainable_nn as tnn
from trainable_nn.linop import operator_norm_at_most


def cpu_seconds(f, rounds: int) -> float:
    f()
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        f()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def normalisation(layer: nn.Module, parameter: nn.Parameter, weight, rounds: int) -> float:
    g = torch.randn_like(parameter)
    return cpu_seconds(lambda: torch.autograd.grad(weight(), parameter, g), rounds)


def tightness(layer: nn.Module, plain: nn.Module) -> float:
    """L(w) / norm of w, read off the scale of P(w) where eps is negligible."""
    index = int(plain.weight.abs().argmax())
    scale = plain.weight.flatten()[index] / layer.effective_weight().flatten()[index]
    return float(scale) / operator_norm_at_most(plain, None)


def network_table(batch: int, rounds: int) -> None:
    """Prints the time of a step of the small network, its provable form over the original, and what it is made of."""
    sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))
    from train_provable import SmallResNet

    original = SmallResNet(width=8, blocks=3)
    images, labels = torch.randn(batch, 1, 28, 28), torch.randint(10, (batch,))
    recipe = tnn.convert.provable(strength=0.95, leak=0.1)
    changed = tnn.convert_model(original, recipe, sample_input=images[:2])
    layers = [m for m in changed.modules() if hasattr(m, "effective_weight")]
    optimisers = {
        original: torch.optim.SGD(original.parameters(), 0.1, momentum=0.9),
        changed: torch.optim.AdamW(changed.parameters(), 3e-3, weight_decay=0.05),
    }

    def step(model: nn.Module) -> None:
        optimisers[model].zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimisers[model].step()

    def normalise() -> None:
        for layer in layers:
            torch.autograd.grad(layer.effective_weight().sum(), layer.weight)

    parts = {"original": lambda: step(original), "provable": lambda: step(changed), "normalisations": normalise}
    parts["AdamW"] = optimisers[changed].step
    rows = [{name: cpu_seconds(f, 1) for name, f in parts.items()} for _ in range(rounds)]
    print(f"\na step of the small network, batch {batch}: ms CPU, and times the original's")
    for name in parts:
        ratios = sorted(row[name] / row["original"] for row in rows)
        print(f"{name:16s} {1e3 * statistics.median(row[name] for row in rows):7.1f} {statistics.median(ratios):6.2f}"
              f"  ({ratios[0]:.2f}-{ratios[-1]:.2f})")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--power", type=int, default=16)
    parser.add_argument("--widest", type=int, default=512, help="leave out wider layers")
    parser.add_argument("--network", action="store_true", help="the small network instead")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.network:
        return network_table(arguments.batch, max(7, arguments.rounds))
    kinds, rounds = ("kernel", "symbol", "auto"), arguments.rounds
    total = dict.fromkeys(("convolution", "spectral_norm", "kernel", "auto"), 0.0)
    print(f"{'':16s} {'conv fb':>9s} | percent of it: torch's, ours (L / norm)")
    for inputs, outputs, k, stride, n, count in resnet18():
        if outputs > arguments.widest:
            continue
        geometry = (inputs, outputs, k, stride, k // 2)
        plain = nn.Conv2d(*geometry, bias=False)
        x = torch.randn(arguments.images, inputs, n, n, requires_grad=True)
        step = cpu_seconds(lambda f=plain, x=x: f(x).sum().backward(), rounds) / arguments.images * arguments.batch
        peer = nn.utils.parametrizations.spectral_norm(nn.Conv2d(*geometry, bias=False))
        seconds = {"convolution": step}
        seconds["spectral_norm"] = normalisation(
            peer, peer.parametrizations.weight.original, lambda f=peer: f.weight, rounds
        )
        cells = [f"spectral_norm {100 * seconds['spectral_norm'] / step:5.1f}"]
        for kind in kinds:
            options = {"eps": 1e-12, "power": arguments.power, "bound": kind}
            layer = tnn.SpectralNormConv2d(*geometry, bias=False, **options)
            if kind == "symbol" and (layer._grid is None or max(inputs, outputs) > 256):
                continue
            layer.weight.data.copy_(plain.weight.data)
            seconds[kind] = normalisation(layer, layer.weight, layer.effective_weight, rounds)
            name = kind if kind != "auto" else f"auto = {layer.bound}"
            loose = f" ({tightness(layer, plain):.2f})" if max(inputs, outputs) <= 128 else ""
            cells.append(f"{name} {100 * seconds[kind] / step:5.1f}{loose}")
        for name in total:
            total[name] += count * seconds[name]
        print(f"{count} x {inputs}-{outputs} {k}x{k}/{stride}".ljust(16), f"{1e3 * step:7.0f} ms |", ", ".join(cells), flush=True)
    print(f"\nall convolutions of a step at batch {arguments.batch}: {total['convolution']:.2f} s CPU, normalisations:")
    for name in ("spectral_norm", "kernel", "auto"):
        print(f"{name:14s} {total[name]:6.3f} s = {100 * total[name] / total['convolution']:5.1f} % of it, "
              f"{total[name] / total['spectral_norm']:5.1f} x torch's")  # fmt: skip


if __name__ == "__main__":
    main()
