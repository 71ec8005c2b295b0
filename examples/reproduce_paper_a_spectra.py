"""Paper A's singular-value experiment: what a skip does to the Jacobian of a small network, step by step.

    python examples/reproduce_paper_a_spectra.py                     # Fashion-MNIST of Debian's dataset-fashion-mnist
    python examples/reproduce_paper_a_spectra.py --folder ~/mnist --trials 10 --steps 30

32 images in one batch, gradient descent at 0.1 on the cross-entropy. A convolution of 5 channels, mean pooling by 2, two
pre-activation blocks (5 -> 5 on 12 x 12, and 5 -> 20 down to 4 x 4, 320 features in all), normalisation, ReLU and a
linear layer. Three variants start from the same weights: without skips; with skips, the second a 1x1 convolution; and that convolution plus 3 * AvgPool_3, its
channels in the middle. All 320 singular values of the Jacobian of the logits of all images, in what leaves the stem, with
the batch's own statistics, at each of the first steps; means over trials and steps as in the paper's figures. About 4 s for each step and variant.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, relu

from trainable_nn import datasets, plotting

VARIANTS = ("no skips", "projection", "projection + 3 AvgPool_3")


class Block(nn.Module):
    """x -> conv(relu(bn(conv(relu(bn(x)))))), with the skip that the variant has."""

    def __init__(self, in_channels: int, out_channels: int, variant: str) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(in_channels), nn.BatchNorm2d(out_channels)
        self.grows, self.variant = in_channels != out_channels, variant
        first, second = ((3, 2, 1), (3, 1, 0)) if self.grows else ((5, 1, 2), (5, 1, 2))  # kernel, stride, padding
        self.conv1 = nn.Conv2d(in_channels, out_channels, *first, bias=False)
        self.conv2 = nn.Conv2d(out_channels, out_channels, *second, bias=False)
        if self.grows:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, 3, bias=False)  # all variants draw the same weights

    def forward(self, x: Tensor) -> Tensor:
        out = relu(self.bn1(x))
        y = self.conv2(relu(self.bn2(self.conv1(out))))
        if self.variant == VARIANTS[0]:
            return y
        if not self.grows:
            return y + x
        y = y + self.shortcut(out)
        return y if self.variant == VARIANTS[1] else y + pooled(out, y.shape[1], 3)


def pooled(x: Tensor, channels: int, stride: int) -> Tensor:
    """stride * AvgPool, its channels in the middle of ``channels``."""
    more = channels - x.shape[1]
    return nn.functional.pad(stride * avg_pool2d(x, stride), (0, 0, 0, 0, (more + 1) // 2, more // 2))


class Network(nn.Module):
    """The paper's small network for 28 x 28 images; ``stem`` ends where the Jacobian begins."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 5, 5), nn.AvgPool2d(2))
        blocks = (Block(5, 5, variant), Block(5, 20, variant))
        self.body = nn.Sequential(*blocks, nn.Flatten(), nn.BatchNorm1d(320), nn.ReLU(), nn.Linear(320, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x))


def singular_values(network: Network, images: Tensor) -> list[float]:
    """All singular values of d logits / d stem, over the whole batch, which batch normalisation couples."""
    point = network.stem(images).detach().requires_grad_()
    logits = network.body(point).flatten()
    rows = torch.autograd.grad(logits, point, torch.eye(len(logits)), is_grads_batched=True)[0]
    return torch.linalg.svdvals(rows.flatten(1).double()).tolist()


def trial(seed: int, data: datasets.ImageData, arguments: argparse.Namespace) -> dict[str, list[dict]]:
    """Loss and singular values at each step, for each variant."""
    chosen = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(seed))[: arguments.images]
    images, labels = data.train_images[chosen], data.train_labels[chosen]
    histories: dict[str, list[dict]] = {}
    for variant in VARIANTS:
        torch.manual_seed(seed)
        network = Network(variant)
        optimizer = torch.optim.SGD(network.parameters(), arguments.lr)
        histories[variant] = []
        for step in range(arguments.steps):
            row = {"values": singular_values(network, images) if step < arguments.early else []}
            loss = cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            histories[variant].append(row | {"loss": loss.item()})
    return histories


def draw(trials: list[dict[str, list[dict]]], arguments: argparse.Namespace, path: pathlib.Path) -> None:
    figure = plotting.new_figure(11.0, 3.8)
    left, right = figure.subplots(1, 2)
    plotting.loss_bands(left, {v: [[row["loss"] for row in t[v]] for t in trials] for v in VARIANTS})
    left.set_xlabel("step")
    left.set_title("Training loss")
    early = {v: [x for t in trials for row in t[v][: arguments.early] for x in row["values"]] for v in VARIANTS}
    plotting.singular_value_histogram(right, early, title=f"Singular values, first {arguments.early} steps")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--early", type=int, default=10, help="steps whose singular values are drawn together")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("paper-a-spectra"))
    arguments = parser.parse_args()
    if min(arguments.images, arguments.trials, arguments.steps, arguments.early) < 1 or arguments.images < 2:
        parser.error("trials, steps and early must be at least 1, and images at least 2")

    data = datasets.idx(arguments.folder)
    trials = [trial(seed, data, arguments) for seed in track(range(arguments.trials), "trials")]
    table = Table(title=f"{arguments.images} images of {data.name}, {arguments.trials} trials, first {arguments.early} steps")
    for heading in ("skips", "mean singular value", "smallest", "largest", "loss at the last step"):
        table.add_column(heading, justify="left" if heading == "skips" else "right", no_wrap=heading == "skips")
    rows = {}
    for variant in VARIANTS:
        early = [row["values"] for t in trials for row in t[variant][: arguments.early]]
        mean = statistics.fmean(x for values in early for x in values)
        smallest, largest = statistics.fmean(v[-1] for v in early), statistics.fmean(v[0] for v in early)
        last = statistics.fmean(t[variant][-1]["loss"] for t in trials)
        rows[variant] = {"mean": mean, "smallest": smallest, "largest": largest, "loss": last}
        table.add_row(variant, f"{mean:.4f}", f"{smallest:.2e}", f"{largest:.3f}", f"{last:.4f}")
    Console().print(table)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "spectra.json").write_text(json.dumps({"rows": rows, "trials": trials}))
    draw(trials, arguments, arguments.output / "spectra.png")
    print(f"Written: {arguments.output / 'spectra.json'}, {arguments.output / 'spectra.png'}")


if __name__ == "__main__":
    main()
