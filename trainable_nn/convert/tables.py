"""A plan as a table, and as what a notebook and a terminal show."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..tables import Cell, Table, paragraphs

if TYPE_CHECKING:
    from rich.console import Group

    from .plan import Plan, Step


def steps_table(plan: Plan) -> Table:
    """One row a step: what stands there, what will, why, and how many state_dict keys survive."""
    changed = sum(step.changes for step in plan.steps)
    title = f"{plan.model} by recipe {plan.recipe}: {changed} of {len(plan.steps)} places change"
    columns = ("path", "before", "after", "why", "weights kept / new / dropped")
    return Table(title, columns, tuple(_row(step) for step in plan.steps), left=4)


def _row(step: Step) -> tuple[Cell | str, ...]:
    path = ", ".join((step.path or "(model)", *step.also))
    keys = f"{len(step.kept)} / {len(step.new)} / {len(step.dropped)}"
    return path, step.before, step.after if step.changes else "unchanged", step.reason, keys


def remarks(plan: Plan) -> list[str]:
    """The plan's notes, and how far the function moves."""
    return [*plan.notes, plan.distance()]


def plan_html(plan: Plan) -> str:
    return steps_table(plan).to_html() + paragraphs(remarks(plan))


def plan_rich(plan: Plan) -> Group:
    from rich.console import Group
    from rich.text import Text

    return Group(steps_table(plan).to_rich(), *map(Text, remarks(plan)))
