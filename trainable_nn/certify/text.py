"""Certificates as JSON text, and back; every field is checked, none is trusted."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields
from typing import Any, get_type_hints

from ..errors import CertificateError
from ..theory.pl import Descent
from .certificate import GRADES, Certificate, Fingerprint, Hypothesis

FORMAT = 1
ENTRY = "trainable_nn certificate"
KINDS = ("proved", "measured")
INFINITIES = {"inf": math.inf, "-inf": -math.inf}


def to_json(certificate: Certificate) -> str:
    """JSON with every stored field, and the numbers that follow from them for readers of other languages."""
    derived = {name: getattr(certificate, name) for name in ("smoothness_upper", "radius", "step_size", "rate", "goal")}
    return json.dumps(written({ENTRY: FORMAT, **asdict(certificate), "derived": derived}), indent=1, allow_nan=False)


def from_json(text: str) -> Certificate:
    try:
        found = json.loads(text)
        if not isinstance(found, dict) or ENTRY not in found:
            raise CertificateError(f"Certificate.from_json: the text has no entry {ENTRY!r}. Give what to_json wrote.")
        if found[ENTRY] != FORMAT:
            raise CertificateError(
                f"Certificate.from_json: version {found[ENTRY]!r} was found, and this release reads {FORMAT}. "
                f"Certify again, or use the release that wrote it ({found.get('package', 'unknown')})."
            )
        certificate = _certificate({key: value for key, value in found.items() if key not in (ENTRY, "derived")})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CertificateError(f"Certificate.from_json: the text is damaged ({error}). Certify again.") from error
    for name, value in found.get("derived", {}).items():
        if _read(value) != getattr(certificate, name, None):
            raise CertificateError(
                f"Certificate.from_json: {name} is {value}, and {getattr(certificate, name, None)} follows from the other "
                f"fields. The text was edited; certify again."
            )
    return certificate


def _certificate(found: dict[str, Any]) -> Certificate:
    values = checked(Certificate, found)
    if values["grade"] not in GRADES:
        raise ValueError(f"grade {values['grade']!r} is none of {', '.join(GRADES)}")
    values["hypotheses"] = tuple(Hypothesis(**checked(Hypothesis, row)) for row in values["hypotheses"])
    if any(row.kind not in KINDS or row.grade not in ("", *GRADES) for row in values["hypotheses"]):
        raise ValueError("a row is of no known kind or grade")
    values["fingerprint"] = Fingerprint(**checked(Fingerprint, values["fingerprint"]))
    values["notes"] = tuple(map(str, values["notes"]))
    if values["descent"] is not None:
        values["descent"] = Descent(**checked(Descent, values["descent"]))
    return Certificate(**values)


def checked(kind: type, found: Any) -> dict[str, Any]:
    """The fields of a data class, all of them and no others, numbers where numbers belong."""
    names = {f.name for f in fields(kind)}
    if not isinstance(found, dict) or set(found) != names:
        raise ValueError(f"a {kind.__name__} needs the fields {', '.join(sorted(names))}")
    values = {name: _read(value) for name, value in found.items()}
    hints = get_type_hints(kind)
    for name, value in values.items():
        _check_type(kind, name, value, hints[name])
    return values


def _check_type(kind: type, name: str, value: Any, hint: Any) -> None:
    wanted = {float: float, int: int, str: str, bool: bool}
    options = [t for t in (float, int, str, bool) if hint is t or hint == (t | None)]
    if not options or (value is None and hint == (options[0] | None)):
        return
    if type(value) is not wanted[options[0]]:
        raise ValueError(f"{kind.__name__}.{name} is {value!r}, where {options[0].__name__} is needed")


def written(value: Any) -> Any:
    if isinstance(value, float):
        if math.isnan(value):
            raise CertificateError("Certificate.to_json: a number is NaN, which no bound may be. Report this model.")
        return value if math.isfinite(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, dict):
        return {key: written(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [written(entry) for entry in value]
    return value


def _read(value: Any) -> Any:
    return INFINITIES.get(value, value) if isinstance(value, str) else value
