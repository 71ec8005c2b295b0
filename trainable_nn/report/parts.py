"""The pieces that a page is made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING

from ..tables import Cell, Table
from .charts import chart

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def section(title: str, kinds: Sequence[str], body: str) -> str:
    """A part of the page; ``kinds`` say what its numbers are: proved, measured, estimated."""
    name = re.sub(r"\W+", "-", title.lower()).strip("-")
    said = "".join(f'<span class="kind {kind}">{kind}</span>' for kind in kinds)
    said = f"<div>{said}</div>" if said else ""
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(title)}</h2>{said}{body}</section>'


def absent(reason: str) -> str:
    """A sentence in the place of a part that is not there."""
    return f'<p class="absent"><b>Not here.</b> {escape(reason)}</p>'


def words(cell: Cell) -> str:
    """A cell outside a table."""
    text = escape(cell.text)
    if cell.value is not None:
        text = f'<data value="{float(cell.value)!r}">{text}</data>'
    return f'<span class="{cell.mark}">{cell.sign} {text}</span>' if cell.mark else text


def picture(name: str, draw: Callable[[Axes], None], title: str, description: str) -> str:
    """A chart under its title, above the sentence that says the same."""
    svg = chart(name, draw, title=title, description=description)
    return f"<figure><h3>{escape(title)}</h3>{svg}<figcaption>{escape(description)}</figcaption></figure>"


def charts(*pictures: str) -> str:
    return f'<div class="charts">{"".join(pictures)}</div>'


def shown(table: Table) -> str:
    """A table that scrolls by itself where a word of it is wider than the page."""
    return f'<div class="scroll">{table.to_html()}</div>'


def folded(title: str, table: Table | str) -> str:
    """A table, or a text, that opens at a touch."""
    inside = shown(table) if isinstance(table, Table) else f"<pre>{escape(table)}</pre>"
    return f"<details><summary>{escape(title)}</summary>{inside}</details>"
