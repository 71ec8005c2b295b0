"""A table as a value, and its two faces: HTML for a page or a notebook, rich for a terminal.

A mark is said by a sign and a word and by nothing else alone, so that it is read without colours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table as RichTable

# name: sign, colour in a terminal, colour in a notebook (at least 4.5 : 1 on white, 3 : 1 on black)
MARKS = {
    "good": ("\N{CHECK MARK}", "green", "#1a7f37"),
    "bad": ("\N{BALLOT X}", "red", "#c0362c"),
    "doubt": ("!", "yellow", "#8a6100"),
}
NARROW = 3  # columns that a phone has room for


@dataclass(frozen=True)
class Cell:
    """A text, with one of ``MARKS`` or "", and the number that it rounds, if any."""

    text: str
    mark: str = ""
    value: float | None = None

    @property
    def sign(self) -> str:
        return MARKS[self.mark][0] if self.mark else ""


@dataclass(frozen=True)
class Table:
    """Columns and rows; the first ``left`` columns are text, the others numbers, and a plain string is a cell."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell | str, ...], ...]
    left: int = 1
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"Table: a row of {len(row)} cells stands under {len(self.columns)} columns: {row}.")

    def to_html(self) -> str:
        """The table alone, every text escaped; each cell names its column, so that a style sheet can stack the rows."""
        caption = f"<caption>{escape(self.title)}</caption>" if self.title else ""
        head = "".join(f'<th scope="col"{_side(i, self.left)}>{escape(name)}</th>' for i, name in enumerate(self.columns))
        body = "\n".join(f"<tr>{''.join(self._cell(i, cell) for i, cell in enumerate(row))}</tr>" for row in self.rows)
        below = f"<p>{escape(self.caption)}</p>" if self.caption else ""
        narrow = ' class="narrow"' if len(self.columns) <= NARROW else ""
        return f"<table{narrow}>{caption}<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>{below}"

    def _cell(self, index: int, cell: Cell | str) -> str:
        cell = as_cell(cell)
        text = escape(cell.text)
        if cell.value is not None:
            text = f'<data value="{float(cell.value)!r}">{text}</data>'
        if cell.mark:
            sign, _, colour = MARKS[cell.mark]
            text = f'<span class="{cell.mark}" style="color:var(--{cell.mark},{colour})"><b>{sign}</b> {text}</span>'
        return f'<td data-label="{escape(self.columns[index])}"{_side(index, self.left)}>{text}</td>'

    def _repr_html_(self) -> str:
        return self.to_html()

    def __rich__(self) -> RichTable:
        return self.to_rich()

    def to_rich(self) -> RichTable:
        """The table for a console of rich; the texts are no markup."""
        from rich.table import Table as RichTable
        from rich.text import Text

        shown = RichTable(
            title=Text(self.title) if self.title else None, title_justify="left", title_style="bold",
            caption=Text(self.caption) if self.caption else None, caption_justify="left",
        )  # fmt: skip
        for index, name in enumerate(self.columns):
            shown.add_column(Text(name), justify="left" if index < self.left else "right", overflow="fold")
        for row in self.rows:
            cells = map(as_cell, row)
            shown.add_row(*(Text(f"{c.sign} {c.text}".strip(), MARKS[c.mark][1] if c.mark else "") for c in cells))
        return shown


def as_cell(cell: Cell | str) -> Cell:
    return Cell(cell) if isinstance(cell, str) else cell


def numeral(value: float | None, form: str = ".4g") -> Cell:
    """A number as a cell that keeps all its digits; a dash where there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return Cell("-")
    return Cell(format(value, form), value=value)


def paragraphs(lines: Sequence[str]) -> str:
    """Texts as paragraphs of HTML, escaped."""
    return "".join(f"<p>{escape(line)}</p>" for line in lines if line)


def _side(index: int, left: int) -> str:
    return "" if index < left else ' style="text-align:right"'
