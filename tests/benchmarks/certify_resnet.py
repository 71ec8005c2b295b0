"""certify of ResNet-18 at CIFAR size, stock and converted: seconds of CPU, memory, grade. Run by certify.py --resnet18 N."""

import resource
import sys
import time

import torch
from real_models import torchvision_model
from rich.console import Console
from torch import nn
from torch.nn.functional import one_hot

import trainable_nn as tnn

CASES = ("stock", "paper", "provable")
CLASSES = 10


def network(case: str, images: torch.Tensor) -> nn.Module:
    """torchvision's ResNet-18 as it is, in recipe "paper", or in recipe "provable" of full width; in training mode."""
    torch.manual_seed(0)
    model = torchvision_model("resnet18", num_classes=CLASSES)
    if case == "stock":
        return model
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return tnn.convert_model(model, recipe=case, sample_input=images[:2])


class Watch:
    """A line for each kind of work, and one every five seconds of it."""

    def __init__(self, case: str, console: Console) -> None:
        self.case, self.console, self.start, self.last = case, console, time.process_time(), ("", 0.0)

    @property
    def seconds(self) -> float:
        return time.process_time() - self.start

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self.last[0] or self.seconds > self.last[1] + 5.0:
            self.console.print(f"{self.case}: {self.seconds:6.1f} CPU s  {what} {done}/{total}", markup=False)
            self.last = (what, self.seconds)


def certify_resnet18(images: int, cases: tuple[str, ...] = CASES) -> None:
    """A line for each case; progress goes to stderr, with the CPU seconds spent so far."""
    console = Console(stderr=True)
    row = "{:10} {:>6} {:>9} {:>9} {:>10} {:>9} {:>12} {:>8}"
    print(row.format("ResNet-18", "images", "weights", "CPU s", "peak GiB", "grade", "lambda >=", "failing"))
    for case in cases:
        x = torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        y = torch.randint(0, CLASSES, (images,), generator=torch.Generator().manual_seed(2))
        model = network(case, x)
        watch = Watch(case, console)
        found = tnn.certify(model, x, one_hot(y, CLASSES).float(), progress=watch)
        seconds, peak = watch.seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        weights = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M"
        numbers = (f"{seconds:.1f}", f"{peak:.2f}", found.grade, f"{found.lambda_lower:.3g}", len(found.failing))
        print(row.format(case, images, weights, *numbers), flush=True)
        print(found.explain(), flush=True)


if __name__ == "__main__":
    sys.exit("Run python tests/benchmarks/certify.py --resnet18 128.")
