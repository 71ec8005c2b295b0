"""Train on ImageNet with DistributedDataParallel, the model plain or converted.

    torchrun --nproc_per_node=8 examples/imagenet.py /data/imagenet --convert paper
    python examples/imagenet.py --synthetic 64 --epochs 1     # one process, made-up images

The folder holds train/<class>/<image> and val/<class>/<image>; Pillow decodes the images. The recipe is that of
PyTorch's reference: SGD, momentum 0.9, weight decay 1e-4, batch 256, step size 0.1 times 0.1 every 30 epochs.
Each epoch is saved in --output, and --resume goes on from there as if nothing had happened.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pathlib

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

import trainable_nn as tnn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGES = (".jpeg", ".jpg", ".png", ".webp", ".bmp")


class SyntheticImages(Dataset):
    """Noise around one mean image for each class: made from the index alone, so every process has the same."""

    def __init__(self, count: int, classes: int, size: int, offset: int = 0) -> None:
        self.count, self.classes, self.size, self.offset = count, classes, size, offset
        self.means = torch.randn(classes, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        label = index % self.classes
        noise = torch.randn(3, self.size, self.size, generator=torch.Generator().manual_seed(1 + self.offset + index))
        return interpolate(self.means[None, label], size=self.size)[0] + 0.5 * noise, label


class ImageFolder(Dataset):
    """Images in one folder for each class, cropped at random for training and in the middle for validation."""

    def __init__(self, root: pathlib.Path, size: int, training: bool, seed: int = 0) -> None:
        self.size, self.training, self.seed, self.epoch = size, training, seed, 0
        names = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        files = [(path, label) for label, name in enumerate(names) for path in sorted((root / name).iterdir())]
        self.files = [(path, label) for path, label in files if path.suffix.lower() in IMAGES]
        self.classes = len(names)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        path, label = self.files[index]
        with Image.open(path) as file:
            image = file.convert("RGB")
        mix = (self.seed * 1_000_003 + self.epoch) * 100_000_007 + index  # the same crop after a resume
        box, flip = self._box(image.size, torch.Generator().manual_seed(mix % 2**63))
        image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(self.size, self.size, 3)
        pixels = (pixels.permute(2, 0, 1) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        return (pixels.flip(-1) if flip else pixels), label

    def _box(self, size: tuple[int, int], generator: torch.Generator) -> tuple[tuple[float, ...], bool]:
        """Training: 8% to 100% of the area, sides in a ratio of 3/4 to 4/3. Validation: the middle 7/8 of the short side."""
        width, height = size
        if not self.training:
            side = min(size) * 224 / 256
            return ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2), False
        area, ratio, across, down, flip = torch.rand(5, generator=generator).tolist()
        area, ratio = width * height * (0.08 + 0.92 * area), (3 / 4) ** (1 - 2 * ratio)
        w, h = min(width, (area * ratio) ** 0.5), min(height, (area / ratio) ** 0.5)
        left, top = across * (width - w), down * (height - h)
        return (left, top, left + w, top + h), flip < 0.5


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=pathlib.Path, nargs="?", help="folder with train/ and val/")
    parser.add_argument("--synthetic", type=int, default=0, metavar="N", help="N made-up images instead of a folder")
    parser.add_argument("--arch", default="torchvision.models:resnet50", help="module:callable that takes num_classes")
    parser.add_argument("--width", type=int, help="passed to --arch, where it takes a width")
    parser.add_argument("--classes", type=int, default=10, help="of the synthetic images")
    parser.add_argument("--convert", metavar="RECIPE", help="convert the model, for example by paper")
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--batch-size", type=int, default=256, help="of all processes together")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("imagenet-run"))
    parser.add_argument("--resume", action="store_true", help="go on from what --output holds")
    arguments = parser.parse_args()
    if not arguments.synthetic and arguments.data is None:
        parser.error("name a folder with train/ and val/, or give --synthetic N")
    return arguments


def build_model(arguments: argparse.Namespace, classes: int) -> nn.Module:
    module, _, name = arguments.arch.partition(":")
    factory = getattr(importlib.import_module(module), name)
    torch.manual_seed(arguments.seed)  # every process starts from the same weights
    options = {} if arguments.width is None else {"width": arguments.width}
    model = factory(num_classes=classes, **options)
    return tnn.convert_model(model, recipe=arguments.convert) if arguments.convert else model


def build_data(arguments: argparse.Namespace, rank: int, world: int) -> tuple[DataLoader, DataLoader, int]:
    if arguments.synthetic:
        train = SyntheticImages(arguments.synthetic, arguments.classes, arguments.image_size)
        val = SyntheticImages(arguments.synthetic // 4, arguments.classes, arguments.image_size, offset=10**6)
    else:
        train = ImageFolder(arguments.data / "train", arguments.image_size, True, arguments.seed)
        val = ImageFolder(arguments.data / "val", arguments.image_size, False)
    own_val = Subset(val, range(rank, len(val), world))  # every image once, where a sampler would repeat some
    options = {"batch_size": max(1, arguments.batch_size // world), "num_workers": arguments.workers}
    sampler = DistributedSampler(train, world, rank, shuffle=True, seed=arguments.seed)
    return DataLoader(train, sampler=sampler, **options), DataLoader(own_val, **options), train.classes


def train_one_epoch(model: nn.Module, loader: DataLoader, optimizer, epoch: int, device, bf16: bool) -> float:
    """Mean loss over the images that this process saw."""
    model.train()
    loader.sampler.set_epoch(epoch)
    loader.dataset.epoch = epoch
    total = torch.zeros(2, device=device)
    for images, labels in loader:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += torch.stack([loss.detach().float() * len(labels), total.new_tensor(float(len(labels)))])
    return _share(total)


@torch.no_grad()
def validate(model: nn.Module, loader: DataLoader, device) -> float:
    """Top-1 accuracy over all images of all processes."""
    model.eval()
    total = torch.zeros(2, device=device)
    for images, labels in loader:
        right = model(images.to(device)).argmax(1) == labels.to(device)
        total += torch.stack([right.sum().float(), total.new_tensor(float(len(labels)))])
    return _share(total)


def same_statistics(model: nn.Module) -> None:
    """Give every process the running statistics of the first, which are those that are saved."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def _share(total: Tensor) -> float:
    if dist.is_initialized():
        dist.all_reduce(total)
    return float(total[0] / total[1])


def save_state(folder: pathlib.Path, model: nn.Module, optimizer, scheduler, epoch: int, best: float) -> None:
    """Weights first, then the small file that points to them, so that a crash leaves a whole pair."""
    name = f"epoch_{epoch:03d}.safetensors"
    tnn.save(model, folder / name)
    state = {"weights": name, "epoch": epoch, "best": best}
    state |= {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    torch.save(state, folder / "state.part")
    os.replace(folder / "state.part", folder / "state.pt")
    (folder / f"epoch_{epoch - 2:03d}.safetensors").unlink(missing_ok=True)


def load_state(folder: pathlib.Path, model: nn.Module, optimizer, scheduler, device) -> tuple[int, float]:
    state = torch.load(folder / "state.pt", map_location=device, weights_only=True)
    tnn.load(folder / state["weights"], model)
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    return state["epoch"], state["best"]


def set_up() -> tuple[int, int, torch.device]:
    """Rank, number of processes and device; torchrun sets the variables, without it there is one process."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    return rank, world, device


def main() -> None:
    arguments = parse_arguments()
    rank, world, device = set_up()
    train_loader, val_loader, classes = build_data(arguments, rank, world)
    model = build_model(arguments, classes).to(device)
    optimizer = torch.optim.SGD(model.parameters(), arguments.lr, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=30, gamma=0.1)
    start, best = 0, 0.0
    if rank == 0:
        arguments.output.mkdir(parents=True, exist_ok=True)
        if arguments.convert:
            print(model.conversion_report)
    if arguments.resume:
        start, best = load_state(arguments.output, model, optimizer, scheduler, device)
    parallel = DistributedDataParallel(model, [device.index] if device.index is not None else None) if world > 1 else model
    for epoch in range(start, arguments.epochs):
        loss = train_one_epoch(parallel, train_loader, optimizer, epoch, device, arguments.bf16)
        same_statistics(model)
        accuracy = validate(model, val_loader, device)
        scheduler.step()
        best = max(best, accuracy)
        if rank == 0:
            print(f"epoch {epoch + 1}/{arguments.epochs}: loss {loss:.4f}, top-1 {accuracy:.4f}, best {best:.4f}")
            save_state(arguments.output, model, optimizer, scheduler, epoch + 1, best)
        if world > 1:
            dist.barrier()
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
