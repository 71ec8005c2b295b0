"""A certificate as tables: its rows, and its numbers."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from ..tables import MARKS, Cell, Table, numeral
from .certificate import Certificate, Hypothesis
from .words import MEANINGS

if TYPE_CHECKING:
    from rich.console import Group

GRADE_MARKS = {"global": "good", "ball": "good", "measured": "doubt", "none": "bad"}
COLUMNS = ("holds", "hypothesis", "where", "how", "found", "against", "source", "remedy")


def rows_table(rows: tuple[Hypothesis, ...], title: str = "Hypotheses") -> Table:
    """One row a hypothesis: whether it holds, the numbers, and what to do where it does not."""
    return Table(title, COLUMNS, tuple(_row(row) for row in rows), left=4)


def _row(row: Hypothesis) -> tuple[Cell | str, ...]:
    fails = Cell("fails", "bad") if row.grade else Cell("fails, and no grade needs it", "doubt")
    holds = Cell("holds", "good") if row.holds else fails
    remedy = "" if row.holds else row.remedy
    path = row.path or "whole network or data"
    return holds, row.name, path, row.kind, numeral(row.value, ".3g"), numeral(row.bound, ".3g"), row.source, remedy


def numbers_table(certificate: Certificate) -> Table:
    """The certificate's numbers, each with what it means; those that nothing proves are left out."""
    rate = None if certificate.rate is None else Cell(f"1 - {certificate.descent.gain:.4g}", value=certificate.rate)
    facts = (
        ("loss now", certificate.initial_loss, "at most, rounding of float64 included"),
        ("lambda_min(DF DF^T) at least", certificate.lambda_lower, f"from the {certificate.lambda_source}"),
        ("norm of DF at most", certificate.jacobian_upper, "at the present weights"),
        ("step size", certificate.step_size, "of plain gradient descent on all samples"),
        ("loss factor a step at most", rate, "each step multiplies the excess loss by it, or by less"),
        ("radius", certificate.radius, "the weights never move farther, in norm"),
        ("smoothness at most", certificate.smoothness_upper, "Lipschitz constant of the loss's gradient in the ball"),
        ("proved down to a loss of", certificate.goal, "below it nothing is proved"),
    )
    cells = ((name, meaning, found) for name, found, meaning in facts if found is not None)
    rows = tuple((name, meaning, found if isinstance(found, Cell) else numeral(found, ".6g")) for name, meaning, found in cells)
    return Table("Numbers", ("number", "meaning", "value"), rows, left=2)


def verdict(certificate: Certificate) -> Cell:
    """The grade and its meaning in one sentence, marked."""
    return Cell(f"Grade {certificate.grade}: {MEANINGS[certificate.grade]}.", GRADE_MARKS[certificate.grade])


def certificate_html(certificate: Certificate) -> str:
    """What a notebook shows: the grade, the numbers, the rows and the explanation."""
    grade = verdict(certificate)
    sign, _, colour = MARKS[grade.mark]
    words = "\n".join(certificate.explain().splitlines()[1:])
    return (
        f'<p style="color:{colour}"><b>{sign} {escape(grade.text)}</b></p>{numbers_table(certificate).to_html()}'
        f'{rows_table(certificate.hypotheses).to_html()}<pre style="white-space:pre-wrap">{escape(words)}</pre>'
    )


def certificate_rich(certificate: Certificate) -> Group:
    """The same for a terminal."""
    from rich.console import Group
    from rich.text import Text

    grade = verdict(certificate)
    head = Text(f"{grade.sign} {grade.text}", f"bold {MARKS[grade.mark][1]}")
    words = Text("\n".join(certificate.explain().splitlines()[1:]))
    return Group(head, numbers_table(certificate).to_rich(), rows_table(certificate.hypotheses).to_rich(), words)
