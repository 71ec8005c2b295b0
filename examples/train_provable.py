"""Train a network in provable form on Fashion-MNIST, beside the original, each with the optimiser that suits it.

    python examples/train_provable.py                 # both, on all 60,000 images
    python examples/train_provable.py --networks provable --epochs 20
    python examples/train_provable.py --networks provable --loosen stem norm     # what do the theorem's demands cost?

The original is a pre-activation ResNet whose stem halves the image. `convert_model(recipe="provable")` turns it into a
dense first layer, residual blocks whose branches are contractions for every weight, skips with all singular values 1 and
an orthogonal readout. The original trains by SGD (0.1, momentum 0.9), the provable one by AdamW (0.003), both in one
cycle of the learning rate, batch 128, half of the images flipped (--shift moves them as well). --average takes a running
mean of the weights to the test. --loosen drops demands of the theorem, and every guarantee with them, to see what each
costs in accuracy.
"""

from __future__ import annotations

import argparse
import copy
import json
import pathlib
import time

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

import trainable_nn as tnn
from trainable_nn import datasets
from trainable_nn.convert import provable
from trainable_nn.demo.resnet import PreActBlock

LOOSENED = {
    "bound": "plain layers in the place of normalised ones, so nothing holds the branches below 1",
    "norm": "batch normalisation, floored, stays in the branches",
    "stem": "the original's convolution in the place of the dense first layer",
    "head": "the original's mean and linear layer in the place of the orthogonal readout",
}


class SmallResNet(nn.Module):
    """A stem of stride 2, two stages of pre-activation blocks of widths w and 2w, the mean and a linear layer."""

    def __init__(self, width: int = 16, blocks: int = 3, in_channels: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, 2, padding=1, bias=False)
        self.layer1 = nn.Sequential(*[PreActBlock(width, width) for _ in range(blocks)])
        narrow = [PreActBlock(2 * width, 2 * width) for _ in range(blocks - 1)]
        self.layer2 = nn.Sequential(PreActBlock(width, 2 * width, 2), *narrow)
        self.fc = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(self.conv1(x))).mean((2, 3)))


def provable_network(original: SmallResNet, sample: Tensor, arguments: argparse.Namespace) -> nn.Module:
    """The original in provable form, less the demands that are loosened."""
    loosen = arguments.loosen
    norm = "floored" if "norm" in loosen else "none"
    recipe = provable(strength=arguments.strength, leak=arguments.leak, norm=norm, eps=arguments.eps, power=arguments.power)
    network = tnn.convert_model(original, recipe, sample_input=sample)
    print(network.conversion_report)
    for name in loosen:
        print(f"Loosened, so that nothing is proved of it: {name}, {LOOSENED[name]}.")
    if "bound" in loosen:
        network = tnn.fold(network.eval()).train()
    if "stem" in loosen:
        network.first = copy.deepcopy(original.conv1)
    if "head" in loosen:
        network.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), copy.deepcopy(original.fc))
    return network


def moved(images: Tensor, black: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Flip half of the images and shift each by up to ``shift`` pixels, black coming in from the side."""
    size, count = images.shape[-1], len(images)
    bordered = pad(images - black, (shift,) * 4) + black
    place = torch.arange(size)
    top, left = torch.randint(0, 2 * shift + 1, (2, count, 1), generator=generator)
    flip = torch.rand(count, 1, generator=generator) < 0.5
    across = left + torch.where(flip, place.flip(0), place)
    rows = (top + place)[:, :, None]
    return bordered[torch.arange(count)[:, None, None], :, rows, across[:, None, :]].movedim(-1, 1).contiguous()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right = torch.cat([model(batch).argmax(1) for batch in images.split(500)]) == labels
    model.train()
    return float(right.double().mean())


def train(model: nn.Module, optimizer, data: datasets.ImageData, arguments: argparse.Namespace, name: str) -> list[dict]:
    images, labels = data.train_images[: arguments.images], data.train_labels[: arguments.images]
    black = (-data.mean / data.std)[:, None, None]
    steps = -(-len(labels) // arguments.batch_size)
    peak = optimizer.param_groups[0]["lr"]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, arguments.epochs * steps)
    history, generator, start = [], torch.Generator().manual_seed(arguments.seed), time.perf_counter()
    mean = running_mean(model, arguments.average) if arguments.average else None
    for epoch in range(1, arguments.epochs + 1):
        total = 0.0
        batches = torch.randperm(len(labels), generator=generator).split(arguments.batch_size)
        for batch in track(batches, f"{name}, epoch {epoch}", transient=True):
            loss = cross_entropy(model(moved(images[batch], black, arguments.shift, generator)), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if mean is not None:
                mean.update_parameters(model)
            total += loss.item() * len(batch)
        tested = accuracy(mean or model, data.test_images, data.test_labels)
        row = {"epoch": epoch, "loss": total / len(labels), "accuracy": tested}
        history.append(row | {"seconds": time.perf_counter() - start})
        print(f"{name}: epoch {epoch}, loss {row['loss']:.4f}, test accuracy {100 * row['accuracy']:.2f}%", flush=True)
    if mean is not None:
        model.load_state_dict(mean.module.state_dict())
    return history


def running_mean(model: nn.Module, decay: float) -> torch.optim.swa_utils.AveragedModel:
    """Of the free weights; a mean of weights is a weight, so every bound holds for it as well."""
    return torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay), use_buffers=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--networks", nargs="+", choices=("original", "provable"), default=["original", "provable"])
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=3, help="in each of the two stages")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--images", type=int, help="train on the first so many images (default: all)")
    parser.add_argument("--shift", type=int, default=0, help="shift images by up to so many pixels")
    parser.add_argument("--strength", type=float, default=0.95)
    parser.add_argument("--leak", type=float, default=0.1)
    parser.add_argument("--eps", type=float, default=1.0, help="of the branches' normalisation; smaller holds them at their bound")
    parser.add_argument("--power", type=int, default=16, help="of the branches' normalisation; larger is tighter")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak of AdamW")
    parser.add_argument("--weight-decay", type=float, default=0.05, help="of AdamW")
    parser.add_argument("--swap-optimizers", action="store_true", help="AdamW for the original, SGD for the provable network")
    parser.add_argument("--average", type=float, help="decay of a running mean of the weights, for example 0.998")
    parser.add_argument("--loosen", nargs="+", choices=tuple(LOOSENED), default=[], help="demands to drop from the provable network")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("provable"))
    arguments = parser.parse_args()

    data = datasets.idx(arguments.folder)
    torch.manual_seed(arguments.seed)
    original = SmallResNet(arguments.width, arguments.blocks)
    changed = provable_network(original, data.train_images[:2], arguments)
    by_adamw, by_sgd = (original, changed) if arguments.swap_optimizers else (changed, original)
    adamw = torch.optim.AdamW(by_adamw.parameters(), arguments.lr, weight_decay=arguments.weight_decay)
    sgd = torch.optim.SGD(by_sgd.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    pairs = {"original": (original, by_sgd is original), "provable": (changed, by_sgd is changed)}
    pairs = {name: (network, sgd if plain else adamw) for name, (network, plain) in pairs.items()}
    arguments.output.mkdir(parents=True, exist_ok=True)
    histories = {}
    for name in arguments.networks:
        histories[name] = train(*pairs[name], data, arguments, name)
        tnn.save(pairs[name][0], arguments.output / f"{name}.safetensors")
        options = {key: str(value) for key, value in vars(arguments).items()}
        (arguments.output / f"{name}.json").write_text(json.dumps({"options": options, "history": histories[name]}, indent=1))
    table = Table("network", "parameters", "final loss", "test accuracy", "minutes", title="Fashion-MNIST")
    for name, history in histories.items():
        size = sum(parameter.numel() for parameter in pairs[name][0].parameters())
        last = history[-1]
        cells = (name, f"{size:,}", f"{last['loss']:.4f}", f"{100 * last['accuracy']:.2f}%", f"{last['seconds'] / 60:.1f}")
        table.add_row(*cells)
    Console().print(table)


if __name__ == "__main__":
    main()
