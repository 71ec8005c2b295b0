"""What a report says, as plain values; a part that could not be had says why."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..certify import Certificate
from ..convert import Plan
from ..linop import KernelExtremes, LayerBound
from ..spectra import Spectrum
from ..theory import TrainingPrediction


@dataclass(frozen=True)
class Missing:
    """Why a part of the report is not there, in a sentence."""

    reason: str


@dataclass(frozen=True)
class Kernel:
    """The tangent kernel at the present weights: its eigenvalues, their ends with bounds, and an estimate of its noise."""

    extremes: KernelExtremes
    prediction: TrainingPrediction
    noise_floor: float


@dataclass(frozen=True)
class Losses:
    """Losses of gradient descent, from step 0 on, measured beside what was said of them before."""

    step_size: float
    said: tuple[float, ...]
    measured: tuple[float, ...]


@dataclass(frozen=True)
class Findings:
    """All that the page shows.

    ``facts`` name the run: pairs of a name and a text. ``conversion`` is the plan that was applied. ``spectra`` holds
    those of the residual blocks by "before" and "after", or by "now" where nothing was converted. ``prediction``
    compares with the kernel's first-order prediction, ``descent`` with the certificate's proved bound.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    conversion: Plan | Missing
    certificate: Certificate | Missing
    spectra: dict[str, list[Spectrum]] | Missing
    kernel: Kernel | Missing
    prediction: Losses | Missing
    descent: Losses | Missing
    norms: list[LayerBound] | Missing

    def missing(self) -> dict[str, str]:
        """The parts that are not there, and why."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: part.reason for name, part in parts.items() if isinstance(part, Missing)}

    def summary(self) -> dict:
        """The chief numbers, by name; None where a part is missing."""
        certificate = None if isinstance(self.certificate, Missing) else self.certificate
        kernel = None if isinstance(self.kernel, Missing) else self.kernel
        names = ("grade", "lambda_lower", "step_size", "rate", "radius")
        last = {
            name: None if isinstance(part, Missing) else {"said": part.said[-1], "measured": part.measured[-1]}
            for name, part in (("prediction", self.prediction), ("descent", self.descent))
        }
        bounded = [] if isinstance(self.norms, Missing) else [row for row in self.norms if row.norm_at_most is not None]
        return {
            **{name: getattr(certificate, name, None) for name in names},
            "failing": None if certificate is None else len(certificate.failing),
            "smallest_eigenvalue": kernel and kernel.extremes.smallest,
            "largest_eigenvalue": kernel and kernel.extremes.largest,
            "last_losses": last,
            "largest_norm_at_most": max((row.norm_at_most for row in bounded), default=None),
            "missing": self.missing(),
        }
