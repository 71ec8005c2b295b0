"""``save`` and ``load``: a model to a file, and a file to a model that agrees with it in every respect."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..certify import Certificate, PathCertificate
from ..certify.path_text import certificate_of
from ..certify.problem import weights_hash
from ..errors import CertificateError, CheckpointError
from . import file, identity, state


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds: every tensor under every key of the state_dict, and the metadata."""

    path: pathlib.Path
    tensors: dict[str, Tensor] = field(repr=False)
    metadata: dict[str, Any] = field(repr=False)

    @property
    def conversion(self) -> dict[str, Any] | None:
        """The plan by which the saved model was converted, as ``Plan.to_dict`` gives it; None for a plain model."""
        return self.metadata["conversion"]

    @property
    def origin(self) -> dict[str, Any] | None:
        """How the model is built, as its saver noted it."""
        return self.metadata["origin"]

    @property
    def certificate(self) -> Certificate | PathCertificate | None:
        """The certificate of either kind that was saved with the weights, or None; ``verify`` says whether it is true.

        Raises:
            CheckpointError: the entry is no certificate of this release.
        """
        text = self.metadata.get("certificate")
        try:
            return None if text is None else certificate_of(text)
        except CertificateError as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    @property
    def hash(self) -> str:
        """SHA-256 of tensors and metadata, in hexadecimal digits."""
        return self.metadata["hash"]


def save(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    origin: Mapping[str, Any] | None = None,
    certificate: Certificate | PathCertificate | None = None,
) -> None:
    """Write the parameters and buffers of ``model`` and its conversion; the file appears whole or not at all.

    ``origin`` is a note of JSON values on how the model is built; it is kept and never acted on. ``certificate``
    must be of these weights, one of a path of those at its start; ``load(path).certificate`` gives it back.

    Raises:
        CheckpointError: the state holds something other than dense tensors with values, the certificate is of other
            weights, or the path cannot be written.
    """
    target = pathlib.Path(os.path.realpath(path))
    if target.is_dir() or not target.parent.is_dir():
        found = "is a folder" if target.is_dir() else "is in a folder that does not exist"
        raise CheckpointError(f"{path}: {found}, and a file is written here. Name a file in a folder that exists.")
    values = state.dense(model.state_dict(keep_vars=True), path)
    aliases = state.aliases(values)
    tensors = {name: state.flat(value) for name, value in values.items() if name not in aliases}
    metadata = identity.describe(model) | {"aliases": aliases, "origin": _plain(origin, path)}
    file.write(target, tensors, metadata | _certified(certificate, model, path))


def load(path: str | os.PathLike, model: nn.Module | None = None) -> Checkpoint | nn.Module:
    """Read a file of ``save``: as a ``Checkpoint`` without a model, else into the model, which is returned.

    A file of a converted model, given the plain model, goes into a copy that the recorded recipe converts:
    use the model that is returned. Keys, shapes, dtypes, conversion and the constants of this package's
    layers must agree. The hash is checked first, nothing in the file is ever executed, and on an error the
    given model is as it was.

    Raises:
        CheckpointError: the file is damaged, edited, of another format, or made for another model.
    """
    path = pathlib.Path(path)
    tensors, metadata = file.read(path)
    checkpoint = Checkpoint(path, tensors, metadata)
    if model is None:
        return checkpoint
    model = identity.converted_as(path, metadata, model)
    identity.check_constants(path, metadata, model)
    state.fill(model, tensors, path)
    return model


def _plain(origin: Mapping[str, Any] | None, path: str | os.PathLike) -> dict[str, Any] | None:
    try:
        return None if origin is None else json.loads(json.dumps(dict(origin)))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: origin must hold JSON values ({error}). Write them as text.") from error


def _certified(
    certificate: Certificate | PathCertificate | None, model: nn.Module, path: str | os.PathLike
) -> dict[str, str]:
    if certificate is None:
        return {}
    if certificate.fingerprint.weights != weights_hash(model):
        raise CheckpointError(
            f"{path}: the certificate is of other weights, or of another mode or structure, than the model has now. "
            f"Certify the model again, or save the one that was certified{_place(certificate)}."
        )
    return {"certificate": certificate.to_json()}


def _place(certificate: Certificate | PathCertificate) -> str:
    """Of a path, which of its weights are certified: nobody expects those before the run."""
    return ", with the weights before the first step" if isinstance(certificate, PathCertificate) else ""
