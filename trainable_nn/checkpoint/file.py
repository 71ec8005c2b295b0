"""The file format: safetensors whose metadata have one entry, ``trainable_nn``, a JSON object with a hash.

Any reader of safetensors opens such a file. The hash finds damage and edits. Whoever can write the file
can also write a new hash, so it is no signature.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..errors import CheckpointError
from .state import signature

FORMAT_VERSION = 1
ENTRY = "trainable_nn"
FIELDS = {
    "format": int,
    "package": str,
    "model": str,
    "hash": str,
    "constants": dict,
    "aliases": dict,
    "conversion": dict | None,
    "origin": dict | None,
}
OPTIONAL = {"certificate": str}  # left out where there is none, as in files from before it existed
ANOTHER_COPY = "Take another copy of the file."


def write(target: pathlib.Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write beside the target, then rename, so that nobody ever sees half a file."""
    metadata = {"format": FORMAT_VERSION, **metadata}
    entry = json.dumps(metadata | {"hash": content_hash(tensors, metadata)}, sort_keys=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "xb") as file:
            mode = os.stat(file.fileno()).st_mode  # the user's own; safetensors would let nobody else read
        safetensors.torch.save_file(dict(tensors), temporary, {ENTRY: entry})
        os.chmod(temporary, mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{target}: cannot be written ({error}). Check the folder and the free space.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read(path: pathlib.Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors under all their keys, and the metadata, after every check that needs no model."""
    _check_start(path)
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            entry = (file.metadata() or {}).get(ENTRY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
    except Exception as error:  # the parser's own errors differ between its releases
        raise CheckpointError(f"{path}: is damaged ({error}). {ANOTHER_COPY}") from error
    if entry is None:
        raise CheckpointError(
            f"{path}: has no entry {ENTRY!r} in its metadata, so it is not from trainable_nn.save and cannot be "
            f"checked. Read it with safetensors.torch.load_file, then model.load_state_dict."
        )
    metadata = _parse(path, entry)
    if metadata["hash"] != content_hash(tensors, metadata):
        raise CheckpointError(f"{path}: its bytes do not fit its hash, so it was edited or damaged. {ANOTHER_COPY}")
    aliases = metadata["aliases"]
    if any(first not in tensors or name in tensors for name, first in aliases.items()):
        raise CheckpointError(f"{path}: names shared tensors that it does not hold. Save the model again.")
    return tensors | {name: tensors[first] for name, first in aliases.items()}, metadata


def _check_start(path: pathlib.Path) -> None:
    """Refuse by its first bytes what is no safetensors file, so that the error can say what it is."""
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError as error:
        kind = "is a folder" if path.is_dir() else f"cannot be read ({error.strerror})"
        raise CheckpointError(
            f"{path}: {kind}, where a file of trainable_nn.save is needed. Name such a file."
        ) from None
    if head[8:] == b"{":  # after the eight bytes of the header's length
        return
    if head[:1] == b"\x80" or head[:2] == b"PK":
        raise CheckpointError(
            f"{path}: is a pickle or a file of torch.save, which can hold code, and was not opened. Read it with "
            f"torch.load(path, weights_only=True), and save the model with trainable_nn.save."
        )
    found = "is no safetensors file" if head else "is empty"
    raise CheckpointError(f"{path}: {found}, where a file of trainable_nn.save is needed. {ANOTHER_COPY}")


def _parse(path: pathlib.Path, entry: str) -> dict[str, Any]:
    """The metadata, each field of the type that the code relies on."""
    try:
        metadata = json.loads(entry)
        version = metadata["format"]
        good = all(isinstance(metadata[key], kind) for key, kind in FIELDS.items())
        good = good and all(isinstance(metadata.get(key, kind()), kind) for key, kind in OPTIONAL.items())
        good = good and all(isinstance(first, str) for first in metadata["aliases"].values())
    except (ValueError, KeyError, TypeError, RecursionError):
        version, good = FORMAT_VERSION, False
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: has format {version!r}, and this release reads format {FORMAT_VERSION}. "
            f"Use the release of trainable_nn that wrote it."
        )
    if not good:
        raise CheckpointError(f"{path}: its entry {ENTRY!r} is not what trainable_nn.save writes. {ANOTHER_COPY}")
    return metadata


def content_hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """SHA-256 of the metadata without ``hash``, then of name, signature and bytes of each tensor, names in order."""
    digest = hashlib.sha256()
    for part in _parts(tensors, metadata):
        digest.update(len(part).to_bytes(8, "little"))  # so that no two lists of parts read the same
        digest.update(part)
    return digest.hexdigest()


def _parts(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Iterator[bytes | memoryview]:
    yield json.dumps({key: value for key, value in metadata.items() if key != "hash"}, sort_keys=True).encode()
    for name in sorted(tensors):
        yield name.encode()
        yield signature(tensors[name]).encode()
        yield memoryview(tensors[name].contiguous().flatten().view(torch.uint8).numpy())
