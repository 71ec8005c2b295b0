"""Path certificates as JSON text, and back, every field checked; and certificates of either kind from the text of one."""

from __future__ import annotations

import json
from dataclasses import asdict, fields

from ..errors import CertificateError
from .certificate import Certificate, Fingerprint
from .path_certificate import PathCertificate
from .text import checked, written

FORMAT = 1
ENTRY = "trainable_nn path certificate"


def to_json(path: PathCertificate) -> str:
    own = {f.name: getattr(path, f.name) for f in fields(path) if f.name != "arrival"}
    own["fingerprint"] = asdict(path.fingerprint)
    body = written({ENTRY: FORMAT, **own})
    return json.dumps({**body, "arrival": json.loads(path.arrival.to_json())}, indent=1, allow_nan=False)


def certificate_of(text: str) -> Certificate | PathCertificate:
    """The certificate of either kind that its ``to_json`` wrote.

    Raises:
        CertificateError: as ``from_json`` of the kind that the text says it is.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None  # the reader says what is wrong
    is_path = isinstance(found, dict) and ENTRY in found
    return (PathCertificate if is_path else Certificate).from_json(text)


def from_json(text: str) -> PathCertificate:
    try:
        found = json.loads(text, parse_constant=_no_number)
        if not isinstance(found, dict) or found.get(ENTRY) != FORMAT:
            raise CertificateError(
                f"PathCertificate.from_json: no entry {ENTRY!r} with version {FORMAT} was found. Give what to_json wrote."
            )
        values = checked(PathCertificate, {key: value for key, value in found.items() if key != ENTRY})
        values["arrival"] = Certificate.from_json(json.dumps(values["arrival"]))
        values["fingerprint"] = Fingerprint(**checked(Fingerprint, values["fingerprint"]))
        values["losses"] = tuple(map(float, values["losses"]))
        if not values["losses"]:
            raise ValueError("losses is empty")
        return PathCertificate(**values)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CertificateError(f"PathCertificate.from_json: the text is damaged ({error}). Certify again.") from error


def _no_number(name: str):
    raise ValueError(f"{name} is no number that to_json writes")
