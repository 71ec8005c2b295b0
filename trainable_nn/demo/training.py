"""Several models through one plain training loop: the same batches, the same order, one optimiser each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .optimizers import Choice, learning_rate

EVALUATION_BATCH = 512


@dataclass(frozen=True)
class Epoch:
    """Mean training loss over the batches of one epoch, and accuracy on the test images after it."""

    train_loss: float
    test_accuracy: float


@dataclass
class Run:
    """The history of one model; ``diverged_at`` is the step, from 1, whose loss was not finite."""

    learning_rate: float | None = None
    step_losses: list[float] = field(default_factory=list)
    epochs: list[Epoch] = field(default_factory=list)
    diverged_at: int | None = None
    seconds: float = 0.0


def train_side_by_side(
    models: Mapping[str, nn.Module],
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    choice: Choice,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    on_step: Callable[[str, Run], None] = lambda name, run: None,
    on_epoch: Callable[[Mapping[str, Run]], None] = lambda runs: None,
) -> dict[str, Run]:
    """Train all models on the same shuffled batches; one that diverges stops, and when all have, so does the training."""
    optimizers = {name: choice.build(model.parameters()) for name, model in models.items()}
    runs = {name: Run(learning_rate(optimizer)) for name, optimizer in optimizers.items()}
    shuffle = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        sums = dict.fromkeys(models, 0.0)
        for batch in torch.randperm(len(train[1]), generator=shuffle).to(train[1].device).split(batch_size):
            images, labels = train[0][batch], train[1][batch]
            for name, model in models.items():
                sums[name] += len(batch) * _one_step(model, images, labels, choice, optimizers[name], runs[name])
                on_step(name, runs[name])
        for name, model in models.items():
            accuracy = math.nan if runs[name].diverged_at else accuracy_on(model, *test)
            runs[name].epochs.append(Epoch(sums[name] / len(train[1]), accuracy))
        on_epoch(runs)
        if all(run.diverged_at for run in runs.values()):
            break
    return runs


def steps_per_epoch(images: int, batch_size: int) -> int:
    return math.ceil(images / batch_size)


@torch.no_grad()
def accuracy_on(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images whose largest output is the label, with the model in evaluation mode."""
    was_training = model.training
    model.eval()
    outputs = torch.cat([model(batch) for batch in images.split(EVALUATION_BATCH)])
    model.train(was_training)
    if not outputs.isfinite().all():
        return math.nan
    return float((outputs.argmax(1) == labels).double().mean())


def _one_step(model: nn.Module, images: Tensor, labels: Tensor, choice: Choice, optimizer, run: Run) -> float:
    if run.diverged_at is not None:
        return math.nan
    start = time.perf_counter()
    loss = choice.step(optimizer, lambda: cross_entropy(model(images), labels))
    run.seconds += time.perf_counter() - start
    run.step_losses.append(loss)
    if not math.isfinite(loss):
        run.diverged_at = len(run.step_losses)
    return loss
