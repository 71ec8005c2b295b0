"""The chain of residual blocks in a network: their order, and the shapes that go in and out, found by one run."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ConversionError
from .walk import Found


@dataclass(frozen=True)
class Link:
    """One block of the chain: its first path, what was found, and the shapes of one sample before and after it."""

    path: str
    found: Found
    before: tuple[int, int, int]
    after: tuple[int, int, int]


@dataclass(frozen=True)
class Chain:
    """Blocks that follow one another from the stem to the head, and the number of outputs of the network."""

    links: tuple[Link, ...]
    outputs: int


def chain_of_blocks(model: nn.Module, blocks: list[Found], input_shape: tuple[int, ...]) -> Chain:
    """Run a copy of the model without values on one sample and see how its blocks follow one another.

    Raises:
        ConversionError: the model does not run on such an input, its blocks are no chain of images, or its output is
            no vector for each sample.
    """
    outer = [f for f in blocks if not any(o is not f and _is_below(f, o) for o in blocks)]
    calls: list[tuple[str, Tensor, Tensor]] = []
    shadow = _shadow(model)
    for found in outer:
        shadow.get_submodule(found.paths[0]).register_forward_hook(_recorder(found.paths[0], calls))
    name = type(model).__name__
    try:
        with torch.no_grad():
            output = shadow(torch.empty(2, *input_shape, device="meta", dtype=_dtype(shadow)))
    except Exception as error:  # whatever the user's model raises
        raise ConversionError(
            f"{name}: it does not run on an input of shape {(2, *input_shape)} ({type(error).__name__}: {error}). "
            f"Give input_shape, or a sample_input, that it takes."
        ) from error
    if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != 2:
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ConversionError(f"{name}: its output must be (N, classes), got {found}. A head for images is not covered.")
    _check_order(name, calls, len(outer))
    by_path = {found.paths[0]: found for found in outer}
    links = [Link(path, by_path[path], tuple(x.shape[1:]), tuple(y.shape[1:])) for path, x, y in calls]
    return Chain(tuple(links), output.shape[1])


def _is_below(inner: Found, outer: Found) -> bool:
    prefix = f"{outer.paths[0]}." if outer.paths[0] else ""
    return inner.paths[0] != outer.paths[0] and inner.paths[0].startswith(prefix)


def _shadow(model: nn.Module) -> nn.Module:
    """A copy on the meta device, in evaluation mode, without the user's hooks."""
    shadow = copy.deepcopy(model).to("meta").eval()
    for module in shadow.modules():
        for name, hooks in vars(module).items():
            if "hook" in name and hasattr(hooks, "clear"):
                hooks.clear()
    return shadow


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


def _recorder(path: str, calls: list) -> Callable:
    return lambda module, inputs, output: calls.append((path, inputs[0], output))


def _check_order(name: str, calls: list[tuple[str, Tensor, Tensor]], count: int) -> None:
    paths = [path for path, _, _ in calls]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None or len(paths) != count:
        what = f"{twice} runs more than once" if twice is not None else f"only {len(paths)} of {count} blocks run"
        raise ConversionError(f"{name}: {what}, and a provable network is a chain in which each block runs once.")
    for path, x, y in calls:
        if x.dim() != 4 or y.dim() != 4:
            raise ConversionError(f"{path}: an image (N, C, H, W) was needed, got shapes {tuple(x.shape)} -> {tuple(y.shape)}.")
    for (path, _, y), (following, x, _) in itertools.pairwise(calls):
        if x is not y:
            raise ConversionError(
                f"{following}: its input is not the output of {path}, and a provable network is a chain of blocks. "
                f"Remove what stands between them, or convert with recipe='paper'."
            )
