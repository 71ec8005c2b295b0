"""What runs in a network: every layer without children, with the shapes that it sees and the work of a pass through it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .held import with_held_weights


@dataclass(frozen=True)
class Seen:
    """One layer with the shapes of one sample before and after it, and how often it runs."""

    path: str
    module: nn.Module
    before: tuple[int, ...]
    after: tuple[int, ...]
    calls: int

    @property
    def width(self) -> str:
        return f"{math.prod(self.before)} -> {math.prod(self.after)} numbers a sample"

    @property
    def work(self) -> float:
        """Multiplications of a forward pass for one sample; twice as many in a backward pass."""
        weight = getattr(self.module, "weight", None)
        if weight is None or weight.dim() < 2 or not self.after:
            return float(self.calls * math.prod(self.after))
        channels = self.after[-1] if weight.dim() == 2 else self.after[0]
        return float(self.calls * (math.prod(self.after) // max(channels, 1)) * weight.numel())


def see(model: nn.Module, inputs: Tensor) -> list[Seen]:
    """Every layer without children that runs, in the order of its first run, on at most two samples."""
    seen: dict[str, Seen] = {}
    handles = []

    def watch(path: str) -> Callable:
        def hook(module, arguments, output) -> None:
            first = next((a for a in arguments if isinstance(a, Tensor)), None)
            if first is None or not isinstance(output, Tensor):
                return
            calls = seen[path].calls + 1 if path in seen else 1
            seen[path] = Seen(path, module, tuple(first.shape[1:]), tuple(output.shape[1:]), calls)

        return hook

    leaves = [(path, m) for path, m in model.named_modules() if not any(m.children())]
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    try:
        handles += [module.register_forward_hook(watch(path)) for path, module in leaves]
        with torch.no_grad(), torch.random.fork_rng(devices=[]), with_held_weights(model):
            model(inputs[: min(2, len(inputs))])
    except Exception:  # noqa: BLE001, two samples may be too few for a layer; what ran is known
        return list(seen.values())
    finally:
        for handle in handles:
            handle.remove()
        for name, b in model.named_buffers():
            b.copy_(buffers[name])
    return list(seen.values())


def backward_work(layers: Iterable[Seen], names: Iterable[str]) -> float:
    """Multiplications of a backward pass for one sample, back to the first layer that holds one of these parameters."""
    layers, owners = list(layers), {name.rpartition(".")[0] for name in names}
    start = next((k for k, seen in enumerate(layers) if _owns(seen.path, owners)), len(layers))
    return 2.0 * sum(seen.work for seen in layers[start:])


def _owns(path: str, owners: set[str]) -> bool:
    """Whether a parameter stands in this layer, or in a module around it."""
    return any(owner == path or (owner and path.startswith(f"{owner}.")) or not owner for owner in owners)


def takes_batch_statistics(module: nn.Module) -> bool:
    """Whether it normalises by the batch's own mean and variance."""
    is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return is_norm and (module.training or module.running_mean is None)


def samples_meet(layers: Iterable[Seen]) -> bool:
    """Whether a layer takes statistics of the batch, so that each row of the Jacobian needs a pass of its own."""
    return any(takes_batch_statistics(seen.module) for seen in layers)
