"""What it costs to keep every branch of a ResNet-18 below its bound: bound time over the time of a training step.

The CIFAR ResNet-18 with eight ``SpectrallyBoundedResidual`` blocks of plain convolutions and floored batch norm.
Three shares of one SGD step, in CPU seconds of the process over its threads, each the median over interleaved rounds:

* the bound in each step: check, scale, and the scale's backward pass, of all blocks;
* certificates: their cost over the steps between two of them, WAIT at the least once the run is under way; and, with
  ``--train N``, as many as N steps of training at this rate made, and how they fell, from 1 for each block at the start;
* the floored normalisation beside torch's own, which is no part of the bound.

    python tests/benchmarks/residual.py [--threads 1] [--batch 128 16] [--rounds 5] [--train 0] [--rate 0.1]
"""

import argparse
import statistics
import time

import torch
from torch import nn

import trainable_nn as tnn
from trainable_nn.modules.residual import WAIT


def block(c: int, d: int, stride: int, norm: type = tnn.FlooredBatchNorm2d) -> nn.Module:
    layers = (norm(c), nn.ReLU(), nn.Conv2d(c, d, 3, stride, 1, bias=False))
    layers += (norm(d), nn.ReLU(), nn.Conv2d(d, d, 3, 1, 1, bias=False))
    skip = None if stride == 1 else tnn.OrthogonalDownsample2d(c, d, stride)
    return tnn.SpectrallyBoundedResidual(nn.Sequential(*layers), skip)


def resnet18(width: int = 64) -> nn.Sequential:
    layers = [nn.Conv2d(3, width, 3, 1, 1, bias=False)]
    for stage in range(4):
        c, d = width * 2 ** max(stage - 1, 0), width * 2**stage
        layers += [block(c, d, 1 + (stage > 0)), block(d, d, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 10))


def blocks_of(model: nn.Module) -> list[tnn.SpectrallyBoundedResidual]:
    return [m for m in model.modules() if isinstance(m, tnn.SpectrallyBoundedResidual)]


def bound_pass(blocks: list[tnn.SpectrallyBoundedResidual], parameters: list[nn.Parameter]) -> None:
    """What the blocks add to a step: the eager check, the scale and its gradient."""
    total = 0.0
    for one in blocks:
        one._passes = -1  # no certificate here: they are counted by themselves
        total = total + one._scale(proof_shows=one._keep_certified() > 0.95)
    torch.autograd.grad(total, parameters, allow_unused=True)


def training_step(
    model: nn.Module, optimiser: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor
) -> None:
    optimiser.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    optimiser.step()


def norm_pass(norms: list[nn.Module], inputs: list[torch.Tensor]) -> None:
    for norm, x in zip(norms, inputs):
        norm(x).backward(x)


def seconds_of(f, *arguments) -> float:
    start = time.process_time()
    f(*arguments)
    return time.process_time() - start


def inputs_of(norms: list[nn.Module], model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    hooks = [
        n.register_forward_pre_hook(lambda _, x: found.append(x[0].detach().clone().requires_grad_())) for n in norms
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return found


def train(model: nn.Module, batch: int, steps: int, rate: float) -> None:
    """Certificates made while it trains on one random batch after another, and the least room that a block had."""
    optimiser, blocks = torch.optim.SGD(model.parameters(), lr=rate), blocks_of(model)
    before, spent, worst = sum(b._certificates for b in blocks), 0.0, 0.0
    marks = []
    for step in range(1, steps + 1):
        images, labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
        spent += seconds_of(training_step, model, optimiser, images, labels)
        worst = max(worst, *(b.certified_bound() / b.bound for b in blocks))
        if step & (step - 1) == 0 or step == steps:
            marks.append(f"{step}: {sum(b._certificates for b in blocks) - before}")
    print(f"{steps} steps at batch {batch}, rate {rate}: certificates of single blocks up to step " + ", ".join(marks))
    print(f"seconds a step with them {spent / steps:.2f}; largest certified bound over bound {worst:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--train", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = resnet18()
    blocks = blocks_of(model)
    inside = [p for one in blocks for p in one.branch.parameters()]
    certificate = seconds_of(lambda: [one.certify() for one in blocks])
    for batch in arguments.batch:
        optimiser = torch.optim.SGD(model.parameters(), lr=0.0)
        images, labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
        norms = [m for m in model.modules() if isinstance(m, tnn.FlooredBatchNorm2d)]
        plain = [nn.BatchNorm2d(n.num_features) for n in norms]
        values = inputs_of(norms, model, images)
        variants = {
            "step": (training_step, model, optimiser, images, labels),
            "bound": (bound_pass, blocks, inside),
            "floored": (norm_pass, norms, values),
            "plain": (norm_pass, plain, values),
        }
        rows = [{name: seconds_of(*call) for name, call in variants.items()} for _ in range(arguments.rounds + 1)][1:]
        share = lambda name, rows=rows: statistics.median(row[name] / row["step"] for row in rows)
        step = statistics.median(row["step"] for row in rows)
        print(f"batch {batch}: a step takes {step:.2f} s CPU, {arguments.threads} threads")
        print(f"  the bound in each step          {100 * share('bound'):6.2f} % of it")
        print(
            f"  a certificate every {WAIT} steps    {100 * certificate / WAIT / step:6.2f} %  ({certificate:.2f} s for all blocks)"
        )
        ratio = statistics.median(row["floored"] / row["plain"] for row in rows)
        print(
            f"  floored over torch's batch norm {100 * (share('floored') - share('plain')):6.2f} %, {ratio:.3f} times it",
            flush=True,
        )
    if arguments.train:
        train(model, min(arguments.batch), arguments.train, arguments.rate)


if __name__ == "__main__":
    main()
