"""A model from an import path, and weights from a file, without running code from the file."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pathlib
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from .. import checkpoint
from ..errors import CheckpointError, OptionError


def build(spec: str, arguments: Sequence[str] = ()) -> nn.Module:
    """Call ``module:callable`` or ``file.py:callable`` with ``key=value`` arguments; it must give an nn.Module."""
    factory = _factory(spec)
    options = dict(_keyword(argument) for argument in arguments)
    try:
        model = factory(**options)
    except Exception as error:  # the user's code raises what it likes
        raise OptionError(f"{spec}: calling it with {options} raised {type(error).__name__}: {error}.") from error
    if not isinstance(model, nn.Module):
        raise OptionError(f"{spec}: gave a {type(model).__name__}, where a torch.nn.Module is needed. Name what makes one.")
    return model


def load_weights(model: nn.Module, path: pathlib.Path) -> None:
    """Fill ``model`` strictly from safetensors or from a file of torch.save that holds tensors only."""
    checkpoint.fill(model, _tensors(path), path)


def _tensors(path: pathlib.Path) -> dict[str, Tensor]:
    with _opened(path) as file:
        looks_safe = file.read(9)[8:] == b"{"
    if not looks_safe:
        return _state_dict(path, _read_torch_file(path))
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            ours = "trainable_nn" in (file.metadata() or {})
        if not ours:
            return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: is damaged ({error}). Take another copy of the file.") from error
    saved = checkpoint.load(path)
    if saved.conversion is not None:
        raise CheckpointError(
            f"{path}: holds a model that is converted already. Give the weights of the plain model, or read this "
            f"file with trainable_nn.load(path, model)."
        )
    return saved.tensors


def _opened(path: pathlib.Path):
    try:
        return open(path, "rb")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). Name a file with weights.") from error


def _read_torch_file(path: pathlib.Path) -> Any:
    with _opened(path) as file:
        head = file.read(2)
    if head[:1] != b"\x80" and head != b"PK":  # the starts of a pickle and of a zip archive
        raise CheckpointError(f"{path}: is neither safetensors nor a file of torch.save. Name a file with weights.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it asks to file an issue about files that are not its own
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive fails in many ways
        raise CheckpointError(
            f"{path}: holds more than tensors, or is damaged; reading it further could run code, so it was left. "
            f"Save model.state_dict() alone."
        ) from error


def _state_dict(path: pathlib.Path, found: Any) -> dict[str, Tensor]:
    """The state_dict in a training checkpoint: itself or under a usual key, without DDP's prefix."""
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError(f"{path}: holds a {type(found).__name__} that is no state_dict. Save model.state_dict().")
    if all(name.startswith("module.") for name in found):
        return {name.removeprefix("module."): value for name, value in found.items()}
    return found


def _factory(spec: str) -> Callable[..., Any]:
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise OptionError(f"{spec}: needs the form module:callable, such as torchvision.models:resnet18.")
    found = _module(place, spec)
    for part in name.split("."):
        if not hasattr(found, part):
            raise OptionError(f"{spec}: {place} has no {name}. Check the name after the colon.")
        found = getattr(found, part)
    if not callable(found):
        raise OptionError(f"{spec}: {name} is a {type(found).__name__}, where a class or function is needed.")
    return found


def _module(place: str, spec: str) -> Any:
    if "" not in sys.path and str(pathlib.Path.cwd()) not in sys.path:
        sys.path.insert(0, str(pathlib.Path.cwd()))  # as `python -m` does, so that a user's own file is found
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        file_spec = importlib.util.spec_from_file_location(pathlib.Path(place).stem, place)
        module = importlib.util.module_from_spec(file_spec)
        sys.modules[file_spec.name] = module  # so that its classes can be copied and pickled
        file_spec.loader.exec_module(module)
        return module
    except Exception as error:  # the module may raise anything while it loads
        missing = isinstance(error, ModuleNotFoundError)
        way_out = "Install it, or run where it is" if missing else "Check that it fits the installed torch, or mend it"
        raise OptionError(
            f"{spec}: importing {place} raised {type(error).__name__}: {error}. {way_out}."
        ) from error


def _keyword(argument: str) -> tuple[str, Any]:
    key, equals, text = argument.partition("=")
    if not equals or not key.isidentifier():
        raise OptionError(f"--model-arg {argument}: needs the form key=value.")
    try:
        return key, ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return key, text
