"""What normalising every weight of ResNet-18 costs, beside its peers and beside a plain copy of the same bytes.

Three tables, each of ratios taken in one run:

1. the normalisation of all convolution weights, forward and forward + backward through autograd, over the
   time of ``out.copy_(w)`` of the same tensors. The floor by traffic: 1.0 forward (read w, write y) and 2.5
   forward + backward (read w, write y; read w and g, write the gradient);
2. its share of a training step of the CIFAR ResNet-18, kernel time over step time: whole steps scatter by more;
3. the overhead of a call on a tiny weight, over that of ``torch._weight_norm``, and of a whole layer over
   torch's own weight-normalised layer.

Times are CPU seconds of the process, summed over its threads; variants are interleaved and each ratio is the
median over the rounds of ratios within one round, so a machine that drifts does not move it.

    python tests/benchmarks/normalise.py [--threads 2] [--rounds 30] [--compile] [--step]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from trainable_nn import ops
from trainable_nn.functional import entry_norm, weight_norm
from trainable_nn.modules import WeightNormLinear

Variant = Callable[[], object]


def resnet18_shapes() -> list[tuple[int, ...]]:
    """The 20 convolutions of the CIFAR ResNet-18, 11.16 million weights."""
    shapes, width = [(64, 3, 3, 3)] + [(64, 64, 3, 3)] * 4, 64
    while width < 512:
        shapes += [(2 * width, width, 3, 3)] + [(2 * width, 2 * width, 3, 3)] * 3 + [(2 * width, width, 1, 1)]
        width *= 2
    return shapes


def eager_entry(w: Tensor) -> Tensor:
    return w / (1.0 + w * w).sqrt()


def eager_row(w: Tensor) -> Tensor:
    return w / (1.0 + w.square().sum((1, 2, 3), keepdim=True)).sqrt()


def torch_weight_norm(w: Tensor) -> Tensor:
    return torch._weight_norm(w, w.new_ones(w.shape[0], 1, 1, 1), 0)


def normalisations(compiled: bool) -> dict[str, Callable[[list[Tensor]], list[Tensor]]]:
    each = {
        "entry_norm (ours)": entry_norm,
        "weight_norm (ours)": weight_norm,
        "torch._weight_norm": torch_weight_norm,
        "entry norm, eager": eager_entry,
        "row norm, eager": eager_row,
    }
    every = {name: lambda ws, f=f: [f(w) for w in ws] for name, f in each.items()}
    if compiled:
        for name in ("entry norm, eager", "row norm, eager"):
            every[name.replace("eager", "torch.compile")] = torch.compile(every[name], dynamic=False)
    return every


def cpu_seconds(variants: dict[str, Variant], rounds: int) -> dict[str, list[float]]:
    """Interleaved: every round runs each variant once."""
    for variant in variants.values():
        for _ in range(3):
            variant()
    seconds = {name: [] for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items():
            start = time.process_time()
            variant()
            seconds[name].append(time.process_time() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, to: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[to]))


def traffic_table(rounds: int, compiled: bool) -> dict[str, float]:
    """Prints the first table; returns the median CPU seconds of forward + backward."""
    weights = [0.05 * torch.randn(s) for s in resnet18_shapes()]
    targets = [torch.empty_like(w) for w in weights]
    gradients = [torch.randn_like(w) for w in weights]
    leaves = [w.clone().requires_grad_() for w in weights]
    variants = {"copy": lambda: [t.copy_(w) for t, w in zip(targets, weights)]}
    every = normalisations(compiled)
    for name, f in every.items():
        variants[f"{name} f"] = lambda f=f: f(weights)
        variants[f"{name} fb"] = lambda f=f: torch.autograd.grad(f(leaves), leaves, gradients)
    seconds = cpu_seconds(variants, rounds)
    print(f"copy of {sum(w.numel() for w in weights) * 4 / 1e6:.1f} MB: "
          f"{1e3 * statistics.median(seconds['copy']):.2f} ms CPU, {torch.get_num_threads()} threads")
    print(f"{'times the copy':28s} {'forward':>8s} {'forward + backward':>20s}")
    print(f"{'floor by traffic':28s} {1.0:8.2f} {2.5:20.2f}")
    for name in every:
        print(f"{name:28s} {ratio(seconds, name + ' f', 'copy'):8.2f} {ratio(seconds, name + ' fb', 'copy'):20.2f}")
    return {name: statistics.median(seconds[f"{name} fb"]) for name in every}


def step_table(normalise: dict[str, float], rounds: int) -> None:
    """Prints the second table: kernel time over the time of one training step."""
    from trainable_nn.demo.resnet import PreActResNet18

    model = PreActResNet18(in_channels=3, num_classes=10, width=64)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images, labels = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))

    def step() -> None:
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimiser.step()

    seconds = statistics.median(cpu_seconds({"step": step}, rounds)["step"])
    print(f"\none training step, CIFAR ResNet-18, batch 32: {seconds:.2f} s CPU")
    for name, cost in normalise.items():
        print(f"{name:28s} {100 * cost / seconds:7.1f} % of it")


def call_table(rounds: int) -> None:
    """Prints the third table: microseconds of a call on 4 x 4 entries, and of a layer of that size."""
    w, g, x = torch.randn(4, 4), torch.randn(4, 4), torch.randn(1, 4)
    leaf, ones, length = w.clone().requires_grad_(), torch.ones(4, 1), torch.ones(4, 1, requires_grad=True)
    ours, theirs = WeightNormLinear(4, 4), torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 4))
    calls = {
        "no gradient": {
            "torch._weight_norm": lambda: torch._weight_norm(w, ones, 0),
            "entry_norm": lambda: ops.entry_norm(w, 1.0, 1.0, 0.0),
            "weight_norm": lambda: ops.weight_norm(w, 1.0, 1.0),
            "row norm, eager": lambda: w / (1.0 + w.square().sum(1, keepdim=True)).sqrt(),
        },
        "forward + backward": {
            "torch._weight_norm": lambda: torch.autograd.grad(torch._weight_norm(leaf, length, 0), (leaf, length), g),
            "entry_norm": lambda: torch.autograd.grad(ops.entry_norm(leaf, 1.0, 1.0, 0.0), leaf, g),
            "weight_norm": lambda: torch.autograd.grad(ops.weight_norm(leaf, 1.0, 1.0), leaf, g),
            "row norm, eager": lambda: torch.autograd.grad(
                leaf / (1.0 + leaf.square().sum(1, keepdim=True)).sqrt(), leaf, g
            ),
        },
        "a whole layer, forward": {
            "parametrizations.weight_norm": lambda: theirs(x),
            "WeightNormLinear": lambda: ours(x),
        },
        "a whole layer, forward + backward": {
            "parametrizations.weight_norm": lambda: theirs(x).sum().backward(),
            "WeightNormLinear": lambda: ours(x).sum().backward(),
        },
    }
    for kind, variants in calls.items():
        peer = next(iter(variants))
        many = {name: (lambda f=f: [f() for _ in range(200)]) for name, f in variants.items()}
        seconds = cpu_seconds(many, rounds)
        print(f"\n4 x 4 entries, {kind}: us, and times the first")
        for name in variants:
            print(f"{name:28s} {min(seconds[name]) / 200 * 1e6:7.2f} {ratio(seconds, name, peer):7.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--compile", action="store_true", help="with torch.compile, which takes minutes to start")
    parser.add_argument("--step", action="store_true", help="with the share of a training step, a minute more")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(ops.native.report())
    w = torch.randn(64, 64, 3, 3)
    torch.testing.assert_close(entry_norm(w), eager_entry(w))  # a fast wrong answer has no speed
    torch.testing.assert_close(weight_norm(w), eager_row(w))
    normalise = traffic_table(arguments.rounds, arguments.compile)
    if arguments.step:
        step_table(normalise, max(3, arguments.rounds // 6))
    call_table(arguments.rounds)


if __name__ == "__main__":
    main()
