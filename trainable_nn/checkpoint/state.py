"""The state of a model as dense tensors by key: what can be saved, what is shared, how it is filled."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import CheckpointError


def signature(value: Tensor) -> str:
    """Dtype and shape, as 'float32 (3, 4)'."""
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def dense(state: Mapping[str, Any], source: str | os.PathLike) -> dict[str, Tensor]:
    """The state itself, if every value is a dense tensor with memory behind it."""
    for name, value in state.items():
        found = _not_dense(value)
        if found:
            raise CheckpointError(
                f"{source}: the model's {name} is {found}, and only dense tensors with values are saved and loaded. "
                f"Give it values, or take it out of the state_dict."
            )
    return dict(state)


def _not_dense(value: Any) -> str | None:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if is_lazy(value) or value.is_meta:
        return "a tensor without values"
    if value.layout != torch.strided or value.is_quantized:
        return f"a tensor of layout {value.layout}, dtype {value.dtype}"
    return None


def aliases(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Later key -> first key, for keys that are the very same tensor; views that only overlap are saved apart."""
    first: dict[tuple, str] = {}
    later = {}
    for name, value in state.items():
        place = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() and place in first:
            later[name] = first[place]
        else:
            first[place] = name
    return later


def flat(value: Tensor) -> Tensor:
    """A copy on the CPU that owns its memory, in row-major order."""
    return value.detach().to("cpu", copy=True).contiguous()


def fill(model: nn.Module, tensors: Mapping[str, Tensor], source: str | os.PathLike) -> None:
    """Copy tensors into the model's state if all keys, shapes and dtypes agree; the model is unchanged if not.

    Keys that are one tensor in the model must be equal in ``tensors``.

    Raises:
        CheckpointError: something disagrees; ``source`` names the file in the message.
    """
    state = dense(model.state_dict(keep_vars=True), source)
    _check_keys(source, tensors, state)
    for name, value in state.items():
        if signature(tensors[name]) != signature(value):
            raise CheckpointError(_mismatch(source, name, tensors[name], value))
    for name, first in aliases(state).items():
        if not torch.equal(tensors[name], tensors[first]):
            raise CheckpointError(
                f"{source}: {name} and {first} differ in the file, and are one tensor in the model. "
                f"Untie them in the model, or load the file of a model that ties them."
            )
    _copy(model, state, tensors, source)


def _copy(model: nn.Module, state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source) -> None:
    before = {name: value.detach().clone() for name, value in state.items()}
    try:
        model.load_state_dict(dict(tensors), strict=True)
    except Exception as error:  # from a loading hook of the user's model
        with torch.no_grad():
            for name, value in state.items():
                value.copy_(before[name])
        raise CheckpointError(f"{source}: the model refuses the tensors: {error}. Look at its loading hooks.") from error


def _mismatch(source: str | os.PathLike, name: str, found: Tensor, needed: Tensor) -> str:
    advice = "Give the model that was saved."
    if found.shape == needed.shape:
        advice = f"Convert the model first, with model.to({found.dtype})."
    return f"{source}: {name} is {signature(found)}, where the model has {signature(needed)}. {advice}"


def _check_keys(source: str | os.PathLike, found: Mapping[str, Tensor], needed: Mapping[str, Tensor]) -> None:
    missing, unexpected = sorted(set(needed) - set(found)), sorted(set(found) - set(needed))
    if not missing and not unexpected:
        return
    advice = "Give the model that was saved."
    if {name.removeprefix("module.") for name in needed} == set(found):
        advice = "The model is wrapped, as by DistributedDataParallel: give model.module."
    elif {name.removeprefix("module.") for name in found} == set(needed):
        advice = "The saved model was wrapped, as by DistributedDataParallel: save model.module."
    sides = (("missing", missing), ("unexpected", unexpected))
    counts = " and ".join(f"{len(names)} {kind} ({_some(names)})" for kind, names in sides if names)
    raise CheckpointError(f"{source}: its keys are not the model's: {counts}. {advice}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
