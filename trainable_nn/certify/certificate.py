"""What was proved of one network on one set of data, as plain values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..theory.pl import Descent

GRADES = ("none", "measured", "ball", "global")  # from weakest to strongest


@dataclass(frozen=True)
class Hypothesis:
    """One condition of a theorem, checked.

    ``source`` is the statement that asks for it, ``path`` the module that it is about ("" for the whole network, or
    the data), ``value`` what was found and ``bound`` what it was compared with (None where there is no number),
    ``kind`` "proved" (a bound with rounding on the safe side) or "measured" (a computed number), ``remedy`` what to
    do where it does not hold, and ``grade`` the weakest grade that needs it: "measured" (so every grade), "ball"
    (and "global"), "global", or "" for a fact that no grade needs.
    """

    name: str
    source: str
    path: str
    holds: bool
    value: float | None = None
    bound: float | None = None
    kind: str = "proved"
    remedy: str = ""
    grade: str = ""

    def __str__(self) -> str:
        where = f" at {self.path}" if self.path else ""
        numbers = "" if self.value is None else f", found {self.value:.4g}"
        numbers += "" if self.bound is None else f" against {self.bound:.4g}"
        remedy = f". {self.remedy}" if self.remedy and not self.holds else "."
        return (
            f"{'holds' if self.holds else 'FAILS'} ({self.kind}): {self.name}{where}{numbers} [{self.source}]{remedy}"
        )


@dataclass(frozen=True)
class Fingerprint:
    """SHA-256 of the weights (with constants and structure), the inputs and the targets; "" without targets."""

    weights: str
    inputs: str
    targets: str


@dataclass(frozen=True)
class Certificate:
    """The strongest grade that holds of gradient descent on one network, data and loss; see ``certify``.

    ``grade``: "global", plain gradient descent with ``step_size`` converges as stated whatever it does on the way;
    "ball", the same because its path provably stays within ``radius``; "measured", numbers at this point support it
    and nothing is proved; "none".

    ``lambda_lower`` bounds lambda_min(DF DF^T) from below, on the ball where there is one, else at this point.
    ``smoothness_upper`` bounds the Lipschitz constant of the loss's gradient on the ball. ``radius`` bounds
    \\|theta_t - theta_0\\|, ``rate`` is q with loss_t - infimum <= q^t (loss_0 - infimum); it is None for a cost without
    a minimum (cross-entropy), where ``predicted_loss`` falls like 1 / t down to ``goal`` and no further.
    Numbers that were not proved are None. All speak of exact arithmetic and of every sample in every step.
    """

    grade: str
    hypotheses: tuple[Hypothesis, ...]
    loss: str
    initial_loss: float | None
    infimum: float
    lambda_lower: float
    lambda_source: str
    jacobian_upper: float | None
    descent: Descent | None
    fingerprint: Fingerprint
    samples: int
    outputs: int
    parameters: int
    budget: int
    notes: tuple[str, ...] = ()
    package: str = field(default="")

    @property
    def smoothness_upper(self) -> float | None:
        return None if self.descent is None else self.descent.smoothness

    @property
    def radius(self) -> float | None:
        return None if self.descent is None else self.descent.radius

    @property
    def step_size(self) -> float | None:
        return None if self.descent is None else self.descent.step_size

    @property
    def rate(self) -> float | None:
        return None if self.descent is None else self.descent.rate

    @property
    def goal(self) -> float | None:
        """The loss down to which the descent is proved: the infimum, or above it where that lies at infinity."""
        return None if self.descent is None else self.infimum + self.descent.goal

    @property
    def failing(self) -> tuple[Hypothesis, ...]:
        """The rows that do not hold and that some grade above this one needs."""
        higher = GRADES[GRADES.index(self.grade) + 1 :]
        return tuple(row for row in self.hypotheses if not row.holds and row.grade in higher)

    def steps_to(self, loss: float) -> int | None:
        """Steps after which the loss is proved to be at most ``loss``; None where that is not proved."""
        return None if self.descent is None else self.descent.steps_to(loss - self.infimum)

    def predicted_loss(self, step: int) -> float | None:
        """An upper bound of the loss after so many steps of ``step_size``; None where nothing is proved."""
        return None if self.descent is None else self.infimum + self.descent.excess_after(step)

    def loss_curve(self, steps: Sequence[int]) -> list[float | None]:
        """``predicted_loss`` at each of the steps."""
        return [self.predicted_loss(step) for step in steps]

    def explain(self) -> str:
        """The certificate in words: what is proved, why no more, and what repairs it."""
        from .words import explain  # words read certificates

        return explain(self)

    def to_json(self) -> str:
        """The certificate as JSON, versioned; infinities are written as text."""
        from .text import to_json

        return to_json(self)

    @classmethod
    def from_json(cls, text: str) -> Certificate:
        """The certificate that ``to_json`` wrote; only ``verify`` says whether it is true.

        Raises:
            CertificateError: the text is no certificate, or of another version.
        """
        from .text import from_json

        return from_json(text)

    def __str__(self) -> str:
        return self.explain()

    def __rich__(self):
        from .tables import certificate_rich

        return certificate_rich(self)

    def _repr_html_(self) -> str:
        from .tables import certificate_html

        return certificate_html(self)


def is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
