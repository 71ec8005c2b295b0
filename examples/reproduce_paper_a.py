"""Tables 1 and 2 of "On skip connections and normalisation layers in deep optimisation": original against modified.

    python examples/reproduce_paper_a.py --data fashion-mnist --short           # 15 minutes on two cores
    python examples/reproduce_paper_a.py --data cifar10 --folder ~/data         # the paper's protocol, for a GPU
    torchrun --nproc_per_node=2 examples/reproduce_paper_a.py --data cifar100 --folder ~/data

The protocol is that of appendix A.1: a pre-activation ResNet-18 and its conversion from the same initial weights, on
the same batches; SGD without momentum or weight decay, batch 128, 90 epochs, learning rate times 0.2 every 30; images
standardised, cropped at random from a black border and flipped; 10 trials at 0.2, 0.1, 0.05 and 0.02. The released
code trains all four rows of CIFAR-100 at 0.1, by a slip; --released-cifar100 does the same, and is off.

Every run leaves a JSON and a CSV in --output. A command that was killed goes on where it stopped, with the same result,
and several processes under torchrun divide the runs. --variants adds `provable`, the form that provably trains.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
import os
import pathlib
import statistics
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, pad

import trainable_nn as tnn
from trainable_nn import datasets, plotting
from trainable_nn.demo.resnet import PreActResNet18

# Appendix A.1, Tables 1 and 2: test accuracy in percent and final loss, each mean and standard deviation over 10 trials.
PAPER = {
    "cifar10": {
        0.2: {"original": (48.14, 19.95, 1.3883, 0.5503), "paper": (62.71, 6.14, 0.9495, 0.2150)},
        0.1: {"original": (91.64, 0.24, 0.0032, 0.0002), "paper": (91.42, 0.61, 0.0022, 0.0002)},
        0.05: {"original": (91.22, 0.25, 0.0043, 0.0003), "paper": (91.14, 0.25, 0.0041, 0.0001)},
        0.02: {"original": (89.50, 0.32, 0.0112, 0.0004), "paper": (88.94, 0.35, 0.0125, 0.0004)},
    },
    "cifar100": {
        0.2: {"original": (69.67, 0.58, 0.0150, 0.0005), "paper": (70.07, 0.53, 0.0115, 0.0005)},
        0.1: {"original": (70.05, 0.43, 0.0147, 0.0004), "paper": (70.87, 0.42, 0.0116, 0.0003)},
        0.05: {"original": (70.04, 0.48, 0.0145, 0.0003), "paper": (70.34, 0.56, 0.0116, 0.0003)},
        0.02: {"original": (69.75, 0.56, 0.0145, 0.0003), "paper": (70.13, 0.55, 0.0116, 0.0004)},
    },
}
NAMES = {"original": "original", "paper": "modified", "provable": "provable"}
SHORT = {"width": 8, "epochs": 6, "trials": 5, "images": 12800, "test_images": 2000, "downscale": 2}
GRID = 8  # the network halves an image three times
DECAY, DECAYS = 0.2, 3  # the learning rate times 0.2 after each third of the epochs
EVALUATION_BATCH = 500


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What all runs of one folder share; a folder made by another protocol is refused."""

    data: str
    width: int
    epochs: int
    batch_size: int
    images: int | None
    test_images: int | None
    downscale: int
    flip: bool
    released_cifar100: bool
    seed: int


@dataclasses.dataclass(frozen=True)
class Job:
    """One training run."""

    variant: str
    lr: float
    trial: int

    @property
    def name(self) -> str:
        return f"{self.variant}-lr{self.lr:g}-trial{self.trial:02d}"


class Images:
    """Standardised images on the network's grid, with random crops and flips that a generator decides."""

    def __init__(self, data: datasets.ImageData, protocol: Protocol, device: torch.device) -> None:
        black = (-data.mean / data.std)[:, None, None]
        parts = (data.train_images[: protocol.images], data.test_images[: protocol.test_images])
        train, test = (self._on_grid(part, black, protocol.downscale) for part in parts)
        self.border = max(1, train.shape[-1] // 8)  # 4 pixels at the paper's 32
        self.bordered = ((pad(train - black, (self.border,) * 4)) + black).to(device)
        self.size, self.flip = train.shape[-2:], protocol.flip
        self.labels = data.train_labels[: protocol.images].to(device)
        self.test = test.to(device), data.test_labels[: protocol.test_images].to(device)
        self.channels, self.classes = train.shape[1], len(data.classes)

    @staticmethod
    def _on_grid(images: Tensor, black: Tensor, downscale: int) -> Tensor:
        small = avg_pool2d(images - black, downscale) if downscale > 1 else images - black
        rows, columns = (-side % GRID for side in small.shape[-2:])
        return pad(small, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)) + black

    def epoch(self, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images once, in random order, each cropped and perhaps flipped; the seed alone decides."""
        generator = torch.Generator().manual_seed(seed)
        rows, columns = (torch.arange(side) for side in self.size)
        for batch in torch.randperm(len(self.labels), generator=generator).split(batch_size):
            top, left = torch.randint(0, 2 * self.border + 1, (2, len(batch), 1), generator=generator)
            flipped = torch.rand(len(batch), 1, generator=generator) < (0.5 if self.flip else 0.0)
            down = (top + rows)[:, :, None]
            across = (left + torch.where(flipped, columns.flip(0), columns))[:, None, :]
            yield self.bordered[batch[:, None, None], :, down, across].movedim(-1, 1), self.labels[batch]


def build(job: Job, protocol: Protocol, images: Images) -> nn.Module:
    """The network of one variant; all variants of one trial start from the same plain network."""
    torch.manual_seed(1000 * protocol.seed + job.trial)
    plain = PreActResNet18(protocol.width, images.channels, images.classes)
    if job.variant == "original":
        return plain
    return tnn.convert_model(plain, recipe=job.variant, sample_input=images.test[0][:2].cpu())


def train(job: Job, protocol: Protocol, images: Images, folder: pathlib.Path, on_step, device: torch.device) -> dict:
    """Train one variant, leaving its state after each epoch, and return its history."""
    model = build(job, protocol, images).to(device, memory_format=torch.channels_last)
    lr = 0.1 if protocol.released_cifar100 and protocol.data == "cifar100" else job.lr
    optimizer = torch.optim.SGD(model.parameters(), lr)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, max(1, protocol.epochs // DECAYS), DECAY)
    state = folder / f"{job.name}.state"
    history: dict = {"loss": [], "accuracy": [], "diverged": False}
    if state.is_file():
        saved = torch.load(state, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        scheduler.load_state_dict(saved["scheduler"])
        optimizer.load_state_dict(saved["optimizer"])
        history = saved["history"]
    for epoch in range(len(history["loss"]), protocol.epochs):
        if history["diverged"]:
            break
        total, model = 0.0, model.train()
        for batch, labels in images.epoch(protocol.batch_size, 10**6 * protocol.seed + 1000 * job.trial + epoch):
            loss = cross_entropy(model(batch.contiguous(memory_format=torch.channels_last)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(labels)
            on_step()
            if not math.isfinite(total):
                break
        scheduler.step()
        history["loss"].append(total / len(images.labels))
        history["accuracy"].append(accuracy(model, *images.test))
        history["diverged"] = not math.isfinite(total)
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        whole = {name: part.state_dict() for name, part in parts.items()} | {"history": history}
        torch.save(whole, state.with_suffix(".part"))
        os.replace(state.with_suffix(".part"), state)
    return history


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right = [model(batch).argmax(1) for batch in images.split(EVALUATION_BATCH)]
    return float((torch.cat(right) == labels).double().mean())


def write_run(folder: pathlib.Path, job: Job, protocol: Protocol, history: dict) -> None:
    with (folder / f"{job.name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("epoch", "training loss", "test accuracy"))
        writer.writerows(zip(range(1, len(history["loss"]) + 1), history["loss"], history["accuracy"], strict=True))
    record = {"protocol": dataclasses.asdict(protocol), "run": dataclasses.asdict(job), **history}
    (folder / f"{job.name}.part").write_text(json.dumps(record, indent=1))
    os.replace(folder / f"{job.name}.part", folder / f"{job.name}.json")
    (folder / f"{job.name}.state").unlink(missing_ok=True)


def finished(folder: pathlib.Path) -> dict[Job, dict]:
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*-trial*.json"))]
    return {Job(**record["run"]): record for record in records}


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation, NaN of nothing."""
    if not values:
        return math.nan, math.nan
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def summary(runs: dict[Job, dict]) -> list[dict]:
    """One row for each learning rate and variant, over the trials that did not diverge."""
    rows = []
    for lr, variant in sorted({(-job.lr, job.variant) for job in runs}, key=lambda key: (key[0], list(NAMES).index(key[1]))):
        mine = [record for job, record in runs.items() if (job.lr, job.variant) == (-lr, variant)]
        kept = [record for record in mine if not record["diverged"]]
        rows.append({
            "lr": -lr, "variant": variant, "trials": len(mine), "diverged": len(mine) - len(kept),
            "accuracy": spread([100 * record["accuracy"][-1] for record in kept]),
            "loss": spread([record["loss"][-1] for record in kept]),
        })  # fmt: skip
    return rows


def lower_per_epoch(runs: dict[Job, dict], lr: float, variant: str) -> list[tuple[int, int, float]]:
    """For each epoch: trials where the variant's loss is the lower one, trials, and the mean difference to the original."""
    pairs = [
        (runs[Job("original", lr, job.trial)]["loss"], record["loss"])
        for job, record in runs.items()
        if (job.lr, job.variant) == (lr, variant) and Job("original", lr, job.trial) in runs
    ]
    rows = []
    for epoch in range(max((len(other) for _, other in pairs), default=0)):
        both = [(a[epoch], b[epoch]) for a, b in pairs if epoch < min(len(a), len(b))]
        finite = [(a, b) for a, b in both if math.isfinite(a) and math.isfinite(b)]
        mean = statistics.fmean(b - a for a, b in finite) if finite else math.nan
        rows.append((sum(b < a for a, b in finite), len(finite), mean))
    return rows


def print_tables(console: Console, protocol: dict, runs: dict[Job, dict], folder: pathlib.Path) -> None:
    table = Table(title=f"ResNet-18 of width {protocol['width']} on {protocol['data']}, {protocol['epochs']} epochs")
    known = PAPER.get(protocol["data"], {})
    for heading in ("rate", "network", "test accuracy (%)", "final loss", "diverged", *(("paper", "its loss") if known else ())):
        table.add_column(heading, justify="left" if heading == "network" else "right", no_wrap=True)
    rows = summary(runs)
    for row in rows:
        cells = [f"{row['lr']:g}", NAMES[row["variant"]], _spread(row["accuracy"], 2), _spread(row["loss"], 4)]
        cells.append(f"{row['diverged']} of {row['trials']}")
        theirs = known.get(row["lr"], {}).get(row["variant"])
        table.add_row(*cells, *((_spread(theirs[:2], 2), _spread(theirs[2:], 4)) if theirs else ()))
    console.print(table)
    lines = []
    for lr, variant in sorted({(job.lr, job.variant) for job in runs if job.variant != "original"}, reverse=True):
        counts = lower_per_epoch(runs, lr, variant)
        told = ", ".join(f"{lower}/{trials} ({difference:+.4f})" for lower, trials, difference in counts)
        lines.append(f"lr {lr:g}, {NAMES[variant]} below original, epoch by epoch (mean difference): {told}")
    console.print(*lines, sep="\n", highlight=False, soft_wrap=True)
    (folder / "table.json").write_text(json.dumps({"protocol": protocol, "rows": rows, "pairs": lines}, indent=1))


def _spread(pair: tuple[float, float], digits: int) -> str:
    return f"{pair[0]:.{digits}f} ± {pair[1]:.{digits}f}"


def draw(runs: dict[Job, dict], protocol: dict, path: pathlib.Path) -> None:
    rates = sorted({job.lr for job in runs}, reverse=True)
    figure = plotting.new_figure(3.6 * len(rates), 3.4)
    for column, lr in enumerate(rates):
        variants = [name for name in NAMES if any((job.lr, job.variant) == (lr, name) for job in runs)]
        losses = {
            NAMES[name]: [r["loss"] for job, r in runs.items() if (job.lr, job.variant) == (lr, name) and not r["diverged"]]
            for name in variants
        }
        axes = figure.add_subplot(1, len(rates), column + 1)
        plotting.loss_bands(axes, losses)
        axes.set_title(f"learning rate {lr:g}")
    figure.suptitle(f"Training loss, ResNet-18 of width {protocol['width']} on {protocol['data']}: mean and deviation of trials")
    figure.savefig(path)


def load(arguments: argparse.Namespace) -> datasets.ImageData:
    if arguments.data == "digits":
        return datasets.digits(size=32)
    folder = arguments.folder or pathlib.Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist
    reader = {"fashion-mnist": datasets.idx, "cifar10": datasets.cifar10, "cifar100": datasets.cifar100}
    return reader[arguments.data](folder)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("cifar10", "cifar100", "fashion-mnist", "digits"), default="cifar10")
    parser.add_argument("--folder", type=pathlib.Path, help="of the data set, in torchvision's layout")
    parser.add_argument("--variants", nargs="+", choices=tuple(NAMES), default=["original", "paper"])
    parser.add_argument("--lrs", nargs="+", type=float, default=[0.2, 0.1, 0.05, 0.02])
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--images", type=int, help="train on the first so many images (default: all)")
    parser.add_argument("--test-images", type=int, help="test on the first so many images (default: all)")
    parser.add_argument("--downscale", type=int, default=1, help="average squares of so many pixels")
    parser.add_argument("--released-cifar100", action="store_true", help="train CIFAR-100 at 0.1 whatever --lrs says")
    parser.add_argument("--short", action="store_true", help=" ".join(f"{k.replace('_', '-')} {v}" for k, v in SHORT.items()))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("paper-a"))
    parser.add_argument("--table", action="store_true", help="train nothing, only show what --output holds")
    first, _ = parser.parse_known_args()
    if first.short:
        parser.set_defaults(**SHORT)
    arguments = parser.parse_args()
    if min(arguments.trials, arguments.epochs, arguments.batch_size, arguments.width, arguments.downscale) < 1:
        parser.error("trials, epochs, batch size, width and downscale must be at least 1")
    return arguments


def check_folder(folder: pathlib.Path, protocol: Protocol) -> None:
    """Refuse to mix runs of two protocols in one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "protocol.json"
    if path.is_file():
        found = json.loads(path.read_text())
        if found != dataclasses.asdict(protocol):
            raise SystemExit(f"{folder}: holds runs of another protocol, {found}. Name another folder with --output.")
    else:
        path.write_text(json.dumps(dataclasses.asdict(protocol), indent=1))


def main() -> None:
    arguments = parse_arguments()
    console, device = Console(), torch.device(arguments.device)
    names = [field.name for field in dataclasses.fields(Protocol)]
    options = {"flip": arguments.data != "digits", **vars(arguments)}  # a digit mirrored is no digit
    protocol = Protocol(**{name: options[name] for name in names})
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    folder = arguments.output
    if not arguments.table:
        check_folder(folder, protocol)
        jobs = [Job(v, lr, trial) for trial in range(arguments.trials) for lr in arguments.lrs for v in arguments.variants]
        mine = [job for job in jobs[rank::world] if not (folder / f"{job.name}.json").is_file()]
        images = Images(load(arguments), protocol, device)
        steps = math.ceil(len(images.labels) / protocol.batch_size) * protocol.epochs
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, disable=rank > 0) as progress:
            task = progress.add_task("steps", total=steps * len(mine))
            for number, job in enumerate(mine):
                progress.update(task, description=job.name, completed=steps * number)
                history = train(job, protocol, images, folder, lambda: progress.advance(task), device)
                write_run(folder, job, protocol, history)
            progress.update(task, completed=steps * len(mine))
        if any(not (folder / f"{job.name}.json").is_file() for job in jobs):
            return  # another process is still at work, and will show the table
    runs = finished(folder)
    if not runs:
        raise SystemExit(f"{folder}: holds no finished run.")
    recorded = json.loads((folder / "protocol.json").read_text())
    print_tables(console, recorded, runs, folder)
    draw(runs, recorded, folder / "loss.png")
    console.print(f"Written: {folder / 'table.json'}, {folder / 'loss.png'}")


if __name__ == "__main__":
    main()
