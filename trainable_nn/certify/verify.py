"""``verify``: everything computed again, and the first row that does not agree named."""

from __future__ import annotations

import math
from dataclasses import fields

from torch import Tensor, nn

from ..errors import CertificateError
from ..theory.costs import Cost
from .certificate import Certificate, Hypothesis
from .entries import LOSS_ASSUMED, LOSS_PROVED
from .measure import Watch
from .path import walk
from .path_certificate import PathCertificate
from .problem import Problem, fingerprint_of, problem_of
from .prove import certify

RELATIVE = 1e-6  # two machines' float64 agree better than this on every number of a certificate
ABSOLUTE = 1e-12
NUMBERS = ("lambda_lower", "initial_loss", "infimum", "jacobian_upper", "samples", "outputs", "parameters")


def verify(
    certificate: Certificate | PathCertificate,
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor | None = None,
    *,
    loss: Cost | None = None,
    progress: Watch | None = None,
) -> None:
    """Raise unless the certificate is what ``certify`` (or ``certify_path``) finds for this model and these data today.

    Hashes first, then every row and every number against a new certificate; it is a check of honesty and freshness,
    and proves as much as ``certify`` does. ``loss`` is needed only for a certificate of a user's own Cost.

    Cost:
        That of ``certify``; of a path its steps again, and one ``certify`` at its end.
    Raises:
        CertificateError: weights or data changed since, or a row or a number is not what is found; its name is in
            the message.
    """
    found = fingerprint_of(model, inputs, targets)
    for name in ("weights", "inputs", "targets"):
        here, there = getattr(found, name), getattr(certificate.fingerprint, name)
        if here != there:
            raise CertificateError(
                f"verify: the {name} are not those that were certified (sha256 {_short(here)} here, {_short(there)} in the "
                f"certificate). Certify again, or give the {name} of that time."
            )
    if isinstance(certificate, PathCertificate):
        _verify_path(certificate, problem_of(model, inputs, targets, _loss(certificate.arrival, loss)), progress)
        return
    fresh = certify(model, inputs, targets, loss=_loss(certificate, loss), budget=certificate.budget, progress=progress)
    _compare_rows(certificate, fresh)
    _compare_numbers(certificate, fresh)


def _verify_path(claimed: PathCertificate, problem: Problem, progress: Watch | None) -> None:
    """The same steps again, and a ball at their end alone."""
    silent = lambda what, done, total: None
    fresh = walk(problem, claimed.tried, claimed.steps, claimed.arrival.budget, progress or silent, first=claimed.steps)
    if fresh.holds != claimed.holds:
        raise CertificateError(
            f"verify: row 'grade': {claimed.grade!r} is claimed, and the path found proves {'it' if fresh.holds else 'nothing'}"
            f"{f', since {fresh.reason}' if fresh.reason else '.'} Certify again."
        )
    if len(fresh.losses) != len(claimed.losses):
        raise CertificateError(
            f"verify: row 'losses': {claimed.steps} steps are claimed, and the loss falls in {fresh.steps}. Certify again."
        )
    pairs = {f"losses[{t}]": pair for t, pair in enumerate(zip(claimed.losses, fresh.losses))}
    pairs |= {name: (getattr(claimed, name), getattr(fresh, name)) for name in ("path_length", "distance", "end")}
    for name, (found, needed) in pairs.items():
        if not _agree(found, needed):
            raise CertificateError(
                f"verify: row {name!r}: {found!r} is claimed, and {needed!r} is found. Certify again."
            )
    if claimed.holds:
        _compare_rows(claimed.arrival, fresh.arrival)
        _compare_numbers(claimed.arrival, fresh.arrival)


def _loss(certificate: Certificate, loss: Cost | None) -> str | Cost:
    if loss is not None:
        if loss.name != certificate.loss:
            raise CertificateError(
                f"verify: row 'loss': the certificate is about {certificate.loss!r}, and {loss.name!r} was given. Give that cost."
            )
        return loss
    if certificate.loss not in ("mse", "cross_entropy"):
        raise CertificateError(
            f"verify: row 'loss': {certificate.loss!r} is a cost of its own, which no file holds. Give it as loss=."
        )
    return certificate.loss


def _compare_rows(claimed: Certificate, fresh: Certificate) -> None:
    there, here = claimed.hypotheses, fresh.hypotheses
    for row in here:
        if not any(_key(row) == _key(other) for other in there):
            if row.name in (LOSS_PROVED, LOSS_ASSUMED) and not any(r.name in (LOSS_PROVED, LOSS_ASSUMED) for r in there):
                raise CertificateError(
                    f"verify: row {_named(row)} is missing from the certificate: it was made (by {claimed.package or 'no release'}) "
                    f"when the loss was enclosed by an assumption, which fails where large values cancel. Certify again."
                )
            raise CertificateError(f"verify: row {_named(row)} is missing from the certificate. Certify again.")
    for row in there:
        if not any(_key(row) == _key(other) for other in here):
            raise CertificateError(f"verify: row {_named(row)} does not follow from this model. Certify again.")
    if len(there) != len(here):
        raise CertificateError(f"verify: {len(there)} rows were found where {len(here)} follow. Certify again.")
    for row, other in zip(there, here, strict=True):
        for field in fields(Hypothesis):
            found, needed = getattr(row, field.name), getattr(other, field.name)
            if field.name != "remedy" and not _agree(found, needed):
                raise CertificateError(
                    f"verify: row {_named(other)}: {field.name} is {found!r} in the certificate, and {needed!r} is found. "
                    f"Certify again."
                )


def _compare_numbers(claimed: Certificate, fresh: Certificate) -> None:
    if claimed.grade != fresh.grade:
        raise CertificateError(
            f"verify: row 'grade': {claimed.grade!r} is claimed, and {fresh.grade!r} is found. Certify again."
        )
    pairs = {name: (getattr(claimed, name), getattr(fresh, name)) for name in NUMBERS}
    if (claimed.descent is None) != (fresh.descent is None):
        raise CertificateError("verify: row 'descent': it is claimed or missing against what is found. Certify again.")
    if claimed.descent is not None:
        both = (claimed.descent, fresh.descent)
        pairs |= {f.name: tuple(getattr(d, f.name) for d in both) for f in fields(claimed.descent)}
    for name, (found, needed) in pairs.items():
        if not _agree(found, needed):
            raise CertificateError(
                f"verify: row {name!r}: {found!r} is claimed, and {needed!r} is found. Certify again."
            )


def _agree(found, needed) -> bool:
    if not isinstance(found, float) or not isinstance(needed, float):
        return type(found) is type(needed) and found == needed
    return found == needed or math.isclose(found, needed, rel_tol=RELATIVE, abs_tol=ABSOLUTE * abs(needed))


def _key(row: Hypothesis) -> tuple[str, str, str]:
    return row.name, row.path, row.source


def _named(row: Hypothesis) -> str:
    return f"{row.name!r}" + (f" of {row.path}" if row.path else "")


def _short(digest: str) -> str:
    return f"{digest[:12]}..." if digest else "none"
