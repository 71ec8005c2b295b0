"""On a machine with a GPU: build, test, measure, in under ten minutes; one table with the GPU's name.

    python tests/benchmarks/gpu.py [--quick] [--no-build] [--no-tests] [--output FILE]

``--quick`` runs every measurement small, on the GPU or, without one, on the CPU, so that the script is known to work.
Ratios are taken in one run:

* ``entry_norm`` and ``weight_norm``, forward and forward + backward, over a device-to-device copy of the bytes that
  must move (8 and 20 for each entry of float32), beside ``torch._weight_norm``, eager and ``torch.compile``;
* a training step of a ResNet with every convolution weight-normalised, over the plain network's.
"""

import argparse
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

ROOT = pathlib.Path(__file__).resolve().parents[2]


def seconds(f: Callable[[], object], device: str, rounds: int) -> float:
    """Median over the rounds; on the GPU between two events on the stream."""
    for _ in range(3):
        f()
    times = []
    for _ in range(rounds):
        if device == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            f()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            f()
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def eager_row(w: Tensor) -> Tensor:
    return w / (1.0 + w.square().sum(1, keepdim=True)).sqrt()


def eager_entry(w: Tensor) -> Tensor:
    return w / (1.0 + w * w).sqrt()


def normalisation_table(device: str, quick: bool) -> list[str]:
    from trainable_nn.functional import entry_norm, weight_norm

    rows, columns, rounds = (500, 2304, 5) if quick else (43_403, 2304, 20)  # 100 million entries
    w = torch.randn(rows, columns, device=device)
    g, target, leaf = torch.randn_like(w), torch.empty_like(w), w.clone().requires_grad_()
    torch.testing.assert_close(entry_norm(w), eager_entry(w))
    torch.testing.assert_close(weight_norm(w), eager_row(w))
    copy = seconds(lambda: target.copy_(w), device, rounds)
    functions = {
        "entry_norm": entry_norm,
        "weight_norm": weight_norm,
        "torch._weight_norm": lambda w: torch._weight_norm(w, w.new_ones(w.shape[0], 1), 0),
        "entry norm, eager": eager_entry,
        "row norm, eager": eager_row,
        "entry norm, torch.compile": torch.compile(eager_entry),
        "row norm, torch.compile": torch.compile(eager_row),
    }
    lines = [
        f"{rows * columns / 1e6:.1f} million float32 entries",
        f"a copy of them: {1e3 * copy:.3f} ms, {8 * rows * columns / copy / 1e9:.0f} GB/s read and written",
        f"{'times the copy':28s} {'forward':>8s} {'forward + backward':>20s}   (floor 1.00 and 2.50)",
    ]
    for name, f in functions.items():
        forward = seconds(lambda f=f: f(w), device, rounds) / copy
        both = seconds(lambda f=f: torch.autograd.grad(f(leaf), leaf, g), device, rounds) / copy
        lines.append(f"{name:28s} {forward:8.2f} {both:20.2f}")
    return lines


def weight_normalised(model: nn.Module) -> nn.Module:
    """Every plain convolution becomes a WeightNormConv2d with the same free weight."""
    import trainable_nn as tnn

    for name, child in model.named_children():
        if type(child) is nn.Conv2d:
            with torch.device(child.weight.device):
                layer = tnn.WeightNormConv2d(
                    child.in_channels, child.out_channels, child.kernel_size, child.stride, child.padding,
                    child.dilation, child.groups, child.bias is not None, child.padding_mode, gain=4.0,
                )  # fmt: skip
            layer.load_state_dict(child.state_dict())
            setattr(model, name, layer)
        else:
            weight_normalised(child)
    return model


def step_table(device: str, quick: bool) -> list[str]:
    from trainable_nn.demo.resnet import PreActResNet18

    size, batch, width, rounds = (32, 4, 8, 3) if quick else (32, 256, 64, 20)
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), device=device)
    times = {}
    for name, change in (("plain", lambda m: m), ("weight-normalised", weight_normalised)):
        torch.manual_seed(0)
        model = change(PreActResNet18(width).to(device)).to(memory_format=torch.channels_last)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

        def step(model=model, optimiser=optimiser) -> None:
            optimiser.zero_grad()
            with torch.autocast(device, torch.bfloat16):
                loss = cross_entropy(model(images), labels)
            loss.backward()
            optimiser.step()

        times[name] = seconds(step, device, rounds)
    return [
        f"training step, ResNet-18 of width {width}, batch {batch}, bfloat16 autocast, channels_last",
        f"plain {1e3 * times['plain']:.2f} ms, weight-normalised {times['weight-normalised'] / times['plain']:.3f} times it",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-build", action="store_true")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    if not arguments.no_build:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", str(ROOT)]
        subprocess.run(pip, check=True)
    if not arguments.no_tests:
        tests = ["tests/test_ops.py", "tests/test_native.py", "tests/test_laws.py"]
        subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], check=True, cwd=ROOT)
    from trainable_nn.ops import native

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.quick:
        sys.exit("gpu.py: torch sees no GPU. Use --quick to try the script on the CPU.")
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU, quick: no figure of a GPU"
    lines = [name, native.report(), "", *normalisation_table(device, arguments.quick), ""]
    lines += step_table(device, arguments.quick)
    print("\n".join(lines))
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
