"""The inputs, a few samples at a time: a tensor, a data set, a loader, or a sequence of batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, SequentialSampler, default_collate

WHERE = "ntk"


@dataclass(frozen=True)
class Samples:
    """``count`` samples, of which ``take(slice)`` gives some as one batch; nothing else is held."""

    count: int
    take: Callable[[slice], Tensor]


def read_samples(inputs, device) -> Samples:
    """Raises TypeError for what cannot be read twice or is no tensor, ValueError for no samples or NaN."""
    if isinstance(inputs, Tensor):
        found = _of_tensor(inputs)
    elif isinstance(inputs, DataLoader):
        found = _of_loader(inputs)
    elif isinstance(inputs, Dataset):
        found = _of_dataset(inputs, default_collate)
    elif isinstance(inputs, Sequence) and not isinstance(inputs, str):
        found = _of_batches(inputs)
    else:
        raise TypeError(
            f"{WHERE}: inputs must be a tensor, a Dataset, a DataLoader or a list of batches, got "
            f"{type(inputs).__name__}. A generator can be read only once, and every pair of samples is needed: make a "
            f"list of it, or a Dataset."
        )
    if found.count == 0:
        raise ValueError(f"{WHERE}: there are no samples. Give at least one.")

    def take(which: slice) -> Tensor:
        batch = found.take(which)
        if batch.is_floating_point() and not bool(torch.isfinite(batch).all()):
            raise ValueError(
                f"{WHERE}: samples {which.start} to {which.stop - 1} have entries that are NaN or infinite. Mend them."
            )
        return batch.detach().to(device)

    return Samples(found.count, take)


def _of_tensor(inputs: Tensor) -> Samples:
    if inputs.is_meta:
        raise ValueError(f"{WHERE}: the inputs are on the meta device, and their values are needed.")
    if inputs.dim() == 0:
        raise ValueError(f"{WHERE}: inputs must have samples on their first axis, got a single number.")
    return Samples(len(inputs), lambda which: inputs[which])


def _of_dataset(dataset: Dataset, collate: Callable) -> Samples:
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"{WHERE}: {type(dataset).__name__} has no length or no items by number, and every pair of samples is "
            f"needed. Give a Dataset with __len__ and __getitem__."
        )

    def take(which: slice) -> Tensor:
        return _input_of(collate([dataset[i] for i in range(which.start, which.stop)]))

    return Samples(len(dataset), take)


def _of_loader(loader: DataLoader) -> Samples:
    if not isinstance(loader.sampler, SequentialSampler):
        raise TypeError(
            f"{WHERE}: the DataLoader shuffles or samples, so a sample has no place of its own. Make one with "
            f"shuffle=False, or give its dataset."
        )
    samples = _of_dataset(loader.dataset, loader.collate_fn or default_collate)
    count = len(loader) * (loader.batch_size or 1) if loader.drop_last else samples.count
    return Samples(count, samples.take)


def _of_batches(batches: Sequence) -> Samples:
    sizes = [len(_input_of(batch)) for batch in batches]

    def take(which: slice) -> Tensor:
        parts, start = [], 0
        for batch, size in zip(batches, sizes):
            low, high = max(which.start - start, 0), min(which.stop - start, size)
            if low < high:
                parts.append(_input_of(batch)[low:high])
            start += size
        return torch.cat(parts)

    return Samples(sum(sizes), take)


def _input_of(batch) -> Tensor:
    """The first entry of (input, target)."""
    while isinstance(batch, list | tuple) and batch:
        batch = batch[0]
    if not isinstance(batch, Tensor):
        raise TypeError(f"{WHERE}: a batch must be a tensor or begin with one, got {type(batch).__name__}.")
    return batch

