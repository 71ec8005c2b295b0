"""Findings as one page of HTML: no script, no network access, every text escaped."""

from __future__ import annotations

from html import escape

from ..certify import Certificate
from ..certify.certificate import GRADES
from ..certify.tables import GRADE_MARKS, numbers_table, rows_table, verdict
from ..convert.tables import remarks, steps_table
from ..tables import Cell, Table, numeral, paragraphs
from .findings import Findings, Missing
from .numbers import kernel_section, losses_section, norms_section, spectra_section
from .parts import absent, folded, section, shown, words
from .style import CSS

POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # the browser itself keeps the page from the network


def page(findings: Findings) -> str:
    """The page, as text to be written in UTF-8."""
    title = f"{findings.title}: trainability report"
    body = "\n".join(
        (
            _header(findings),
            _in_short(findings),
            _conversion(findings),
            _certificate(findings),
            spectra_section(findings),
            kernel_section(findings),
            losses_section(findings),
            norms_section(findings),
            _reading(),
        )
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<title>{escape(title)}</title>\n'
        f"<style>{CSS}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _header(findings: Findings) -> str:
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in findings.facts)
    return f'<header><p class="soft">Trainability report</p><h1>{escape(findings.title)}</h1><dl class="facts">{facts}</dl></header>'


def _in_short(findings: Findings) -> str:
    certificate, kernel, plan = findings.certificate, findings.kernel, findings.conversion
    tiles = []
    if not isinstance(certificate, Missing):
        tiles.append(_tile("grade", Cell(certificate.grade, GRADE_MARKS[certificate.grade]), "of none, measured, ball, global"))
        tiles.append(_tile("step size", numeral(certificate.step_size), "proved" if certificate.step_size else "none is proved"))
        where = "at least this, on the whole ball" if certificate.descent else "at least this, at these weights"
        tiles.append(_tile("lambda_min(DF DF^T)", numeral(certificate.lambda_lower), where))
        count = len(certificate.failing)
        tiles.append(_tile("obstacles", Cell(str(count), "doubt" if count else "good"), "rows that a higher grade needs"))
    if not isinstance(plan, Missing):
        changed = sum(step.changes for step in plan.steps)
        tiles.append(_tile("converted", Cell(f"{changed} of {len(plan.steps)}"), "places of the plan"))
    if not isinstance(kernel, Missing):
        tiles.append(_tile("condition number", numeral(kernel.extremes.condition_number, ".3g"), "of the kernel, measured"))
    if not isinstance(findings.norms, Missing):
        bounds = [row.norm_at_most for row in findings.norms if row.norm_at_most is not None]
        if bounds:
            tiles.append(_tile("largest norm of a layer", numeral(max(bounds), ".3g"), "at most this, proved"))
    return section("In short", (), f'<dl class="tiles">{"".join(tiles)}</dl>' if tiles else absent("Nothing could be computed."))


def _tile(name: str, cell: Cell, about: str) -> str:
    return f'<div><dt>{escape(name)}</dt><dd class="value">{words(cell)}</dd><dd class="soft">{escape(about)}</dd></div>'


def _conversion(findings: Findings) -> str:
    plan = findings.conversion
    if isinstance(plan, Missing):
        return section("What was converted, and why", (), absent(plan.reason))
    return section("What was converted, and why", (), shown(steps_table(plan)) + paragraphs(remarks(plan)))


def _certificate(findings: Findings) -> str:
    title, certificate = "What is proved of its training", findings.certificate
    if isinstance(certificate, Missing):
        return section(title, ("proved", "measured"), absent(certificate.reason))
    grade = verdict(certificate)
    against = tuple(row for row in certificate.hypotheses if not row.holds)
    holding = tuple(row for row in certificate.hypotheses if row.holds)
    near, far = obstacles(certificate)
    parts = [
        f'<p class="verdict {grade.mark}">{grade.sign} <span>{escape(grade.text)}</span></p>',
        shown(numbers_table(certificate)),
        shown(near) if near.rows else "",
        folded(f"And for the grades above it ({len(far.rows)})", far) if far.rows else "",
        folded(f"Every row that fails ({len(against)})", rows_table(against, "")) if against else "",
        folded(f"Every row that holds ({len(holding)})", rows_table(holding, "")) if holding else "",
        folded("In words", certificate.explain()),
    ]
    return section(title, ("proved", "measured"), "".join(parts))


def obstacles(certificate: Certificate) -> tuple[Table, Table]:
    """What stands in the way of the next grade and of those above it, with the remedy; rows that differ only in their
    place are one."""
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for row in certificate.failing:
        place = row.path or "whole network or data"
        remedy = row.remedy.removeprefix(f"{row.path}: ") if row.path else row.remedy
        groups.setdefault((row.grade, row.name, remedy, row.source), []).append(place)
    rows = [(Cell(grade, "bad"), name, ", ".join(paths), remedy, source) for (grade, name, remedy, source), paths in groups.items()]
    nearest = min((GRADES.index(row.grade) for row in certificate.failing), default=0)
    parts = [[row for row in rows if (row[0].text == GRADES[nearest]) is near] for near in (True, False)]
    columns = ("grade", "what fails", "where", "remedy", "source")
    titles = (f"In the way of grade {GRADES[nearest]}", "")
    return tuple(Table(title, columns, tuple(part), left=5) for title, part in zip(titles, parts, strict=True))


def _reading() -> str:
    return section(
        "How to read this page",
        (),
        "<p><b>Proved</b>: a bound by a theorem, with the rounding of the computation on the safe side. It is about exact plain "
        "gradient descent on these samples, all in every step; mini-batches, momentum and weight decay are not covered. "
        "<b>Measured</b>: a number that was computed at these weights and samples, by the means beside it, and that says nothing of "
        "others. <b>Estimated</b>: a guess with a reason, and no bound on its error.</p>"
        "<p>A check mark stands for what holds, a cross for what fails, and an exclamation mark for what deserves a look; "
        "the words beside them say the same. Each number keeps all its digits in the page's source.</p>",
    )
