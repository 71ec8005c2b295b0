"""Proved operator norms of every linear layer of a network, each on the image sizes that it really sees."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UnboundedError
from .layers import CONVOLUTIONS, TRANSPOSED, read_layer
from .operator_norm import Prepared, equal_bounds, operator_norm_at_most, shape_of_matrix
from .without_autocast import without_autocast

LINEAR = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
MOST_NUMBERS = 2**14  # of a layer's weight and of its input, if it is read to see whether others are like it


@dataclass(frozen=True)
class LayerBound:
    """A module with parameters, and a float that is at least its operator norm on one sample of ``input_shape``.

    norm_at_most is None where nothing is proved, and ``reason`` says why. input_shape: of a convolution's image, with its
    channels. also: other paths of the same module.
    """

    path: str
    kind: str
    input_shape: tuple[int, ...] | None
    norm_at_most: float | None
    reason: str = ""
    also: tuple[str, ...] = ()


@without_autocast
def operator_norms_at_most(
    model: nn.Module, sample_input: Tensor | Sequence[int], *, rtol: float = 0.05, progress: bool = False
) -> list[LayerBound]:
    """``operator_norm_at_most`` of every linear layer and convolution, at the sizes that a sample gives it.

    One run of the network in evaluation mode tells the sizes; modes, buffers and gradients are left as they were. A layer
    that runs at several sizes has one row for each, a module at several paths is bounded once, and a module with parameters
    of its own that is no linear layer, or that the sample never reached, has a row that says so.

    Shape:
        sample_input: what the model is called with, or a shape with a batch, for which a normal sample is drawn.
    Cost:
        One forward pass, and the layers' bounds. Small convolutions of equal shape and geometry are bounded together, which
        gives the same numbers about twice as fast (``dense_norm.FEW_ROWS``).
    Raises:
        Nothing of the single layers; what the model itself raises. ValueError: rtol is not above 0.
    """
    seen = _sizes(model, sample_input)
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if any(True for _ in module.parameters(recurse=False)) or isinstance(module, LINEAR):
            paths.setdefault(module, []).append(path)
    owners = {id(m.parametrizations): m for m in model.modules() if hasattr(m, "parametrizations")}
    inner = {part for owner in owners.values() for part in owner.parametrizations.modules()}
    work = [(module, shape) for module in paths if module not in inner for shape in seen.get(module, [None])]
    rows, together = [], _Together(work, rtol)
    with _watched(progress, len(work)) as advance:
        for module, shape in work:
            path, *also = paths[module]
            advance(path)
            bound, reason = together.bound(module, shape), ""
            if bound is None:
                bound, reason = _bounded(module, shape, rtol)
            rows.append(LayerBound(path, type(module).__name__, shape, bound, reason, tuple(also)))
    return rows


class _Together:
    """Bounds of layers that are bounded with others like them, once the first of them is asked for."""

    def __init__(self, work: list[tuple[nn.Module, tuple[int, ...] | None]], rtol: float) -> None:
        self.rtol, self.found, self.members, self.key = rtol, {}, {}, {}
        for module, shape in work:
            one = _prepared(module, shape)
            key = None if one is None else shape_of_matrix(one)
            if key is not None:
                self.members.setdefault(key, {})[module, shape] = one
                self.key[module, shape] = key

    def bound(self, module: nn.Module, shape: tuple[int, ...] | None) -> float | None:
        members = self.members.get(self.key.get((module, shape)), {})
        if len(members) > 1 and (module, shape) not in self.found:
            self.found.update(zip(members, equal_bounds(list(members.values()), self.rtol)))
        return self.found.get((module, shape))


def _prepared(module: nn.Module, shape: tuple[int, ...] | None) -> Prepared | None:
    if not isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)) or shape is None:
        return None
    try:
        if max(module.weight.numel(), math.prod(shape)) <= MOST_NUMBERS:
            return Prepared.of(read_layer(module, shape))
    except (UnboundedError, ValueError, TypeError, AttributeError):
        pass  # the row of this layer says why
    return None


def _bounded(module: nn.Module, shape: tuple[int, ...] | None, rtol: float) -> tuple[float | None, str]:
    if not isinstance(module, LINEAR):
        return None, "no linear layer or convolution"
    if shape is None:
        return None, "the sample never reached it"
    try:
        image = None if isinstance(module, nn.Linear) else shape
        return operator_norm_at_most(module, image, rtol=rtol), ""
    except (UnboundedError, ValueError, TypeError) as error:
        if "rtol" in str(error):
            raise
        return None, str(error)


def _sizes(model: nn.Module, sample_input: Tensor | Sequence[int]) -> dict[nn.Module, list[tuple[int, ...]]]:
    """The distinct shapes, without the batch, of what each linear layer read."""
    if not isinstance(sample_input, Tensor):
        some = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        sample_input = torch.randn(tuple(sample_input), generator=torch.Generator().manual_seed(0)).to(some)
    seen: dict[nn.Module, list[tuple[int, ...]]] = {}

    def keep(module: nn.Module, inputs: tuple) -> None:
        axes = 1 if isinstance(module, nn.Linear) else len(module.kernel_size) + 1
        shape = tuple(inputs[0].shape[-axes:])
        if shape not in seen.setdefault(module, []):
            seen[module].append(shape)

    modes = {module: module.training for module in model.modules()}
    hooks = [m.register_forward_pre_hook(keep) for m in modes if isinstance(m, LINEAR)]
    try:
        with torch.no_grad():
            model.eval()(sample_input)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return seen


@contextlib.contextmanager
def _watched(wanted: bool, total: int) -> Iterator:
    """Gives ``advance(path)``, called before each layer."""
    if not wanted:
        yield lambda path: None
        return
    import sys

    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    console = Console(file=sys.stderr)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("bounds", total=total + 1)
        yield lambda path: bar.update(task, advance=1, description=f"bound of {escape(path)}")
