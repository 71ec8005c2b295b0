"""What was proved of a constant step along a path, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..theory.rounding import up
from .certificate import Certificate, Fingerprint
from .words import NOT_COVERED


@dataclass(frozen=True)
class PathCertificate:
    """A constant step of gradient descent: T steps that were run, and what is proved from there; see ``certify_path``.

    ``losses``: an upper bound of the loss at each of theta_0, ..., theta_T, falling. ``path_length`` bounds the sum of
    the T steps' lengths, ``distance`` the farthest of these weights from theta_0, ``end`` the last. ``arrival`` is the
    certificate at theta_T of gradient descent with the step ``tried``, or the last one that was looked for.
    ``fingerprint`` is of theta_0. ``reason`` says why nothing is proved, "" where the proof is complete; ``too_long``
    that it is for the step's length.
    """

    tried: float
    losses: tuple[float, ...]
    path_length: float
    distance: float
    end: float
    arrival: Certificate
    fingerprint: Fingerprint
    reason: str = ""
    too_long: bool = False

    @property
    def holds(self) -> bool:
        return self.reason == "" and self.arrival.descent is not None

    @property
    def grade(self) -> str:
        """ "ball" where the proof is complete, else at most "measured"."""
        if self.holds:
            return "ball"
        return "none" if self.arrival.grade == "none" else "measured"

    @property
    def steps(self) -> int:
        """T, the steps that were run."""
        return len(self.losses) - 1

    @property
    def step_size(self) -> float | None:
        return self.tried if self.holds else None

    @property
    def rate(self) -> float | None:
        """q with loss_{T+t} - infimum <= q^t (loss_T - infimum); as in ``Certificate``."""
        return self.arrival.rate if self.holds else None

    @property
    def radius(self) -> float | None:
        """No weights of the path, to its end at the minimum, are farther from theta_0."""
        return max(self.distance, up(self.end + self.arrival.radius)) if self.holds else None

    @property
    def lambda_lower(self) -> float:
        """A lower bound of lambda_min(DF DF^T) on the ball around theta_T."""
        return self.arrival.lambda_lower

    @property
    def infimum(self) -> float:
        return self.arrival.infimum

    def predicted_loss(self, step: int) -> float | None:
        """An upper bound of the loss after so many steps from the start; None where nothing is proved.

        Raises:
            ValueError: a negative step.
        """
        if step < 0:
            raise ValueError(
                f"predicted_loss: the step must be at least 0, got {step}. Count from the start of the path."
            )
        if not self.holds:
            return None
        return self.losses[step] if step <= self.steps else self.arrival.predicted_loss(step - self.steps)

    def steps_to(self, loss: float) -> int | None:
        """Steps after which the loss is proved to be at most ``loss``; None where that is not proved."""
        if not self.holds:
            return None
        reached = next((t for t, bound in enumerate(self.losses) if bound <= loss), None)
        if reached is not None:
            return reached
        more = self.arrival.steps_to(loss)
        return None if more is None else self.steps + more

    def loss_curve(self, steps: Sequence[int]) -> list[float | None]:
        """``predicted_loss`` at each of the steps."""
        return [self.predicted_loss(step) for step in steps]

    def explain(self) -> str:
        """The certificate in words: what was run, what is proved, or why nothing is."""
        ran = (
            f"{self.steps} steps of {self.tried:.4g} were run in float64; the loss fell at each, from {self.losses[0]:.6g} to "
            f"{self.losses[-1]:.4g}, on a path of length {self.path_length:.4g}."
        )
        if not self.holds:
            rows = [str(row) for row in self.arrival.failing if row.grade != "global"]
            return "\n".join([f"Grade {self.grade}: no constant step is proved, since {self.reason}", ran, *rows])
        there = self.arrival.descent
        ball = (
            f"There lambda_min(DF DF^T) >= {self.lambda_lower:.4g} within {there.radius:.4g}, eta L is at most "
            f"{there.share:.4g} where 2 is allowed, and each further step multiplies the loss by at most 1 - {there.gain:.4g}."
        )
        grade = (
            "Grade ball: a constant step of gradient descent ends in a ball that it never leaves, at a global minimum."
        )
        far = f"No weights of the path are farther than {self.radius:.4g} from those at its start."
        notes = [f"Where it ends: {note}" for note in self.arrival.notes]
        return "\n".join([grade, ran, ball, far, *notes, NOT_COVERED])

    def to_json(self) -> str:
        """The certificate as JSON, versioned."""
        from .path_text import to_json  # texts read certificates

        return to_json(self)

    @classmethod
    def from_json(cls, text: str) -> PathCertificate:
        """The certificate that ``to_json`` wrote; only ``verify`` says whether it is true.

        Raises:
            CertificateError: the text is no certificate, or of another version.
        """
        from .path_text import from_json

        return from_json(text)

    def __str__(self) -> str:
        return self.explain()
