"""What the commands print: tables on stdout, progress on stderr, JSON without NaN."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

WIDTH = 110  # of a file or a pipe, which has none of its own


def stdout() -> Console:
    return _console(sys.stdout)


def stderr() -> Console:
    return _console(sys.stderr)


def _console(file: TextIO) -> Console:
    console = Console(file=file, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDTH
    return console


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1, caption: str = "") -> Table:
    """A table whose first ``left`` columns are text, and whose others are numbers."""
    shown = Table(title=title, title_justify="left", title_style="bold", caption=caption or None, caption_justify="left")
    for index, name in enumerate(columns):
        shown.add_column(name, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        shown.add_row(*(escape(cell) for cell in row))
    return shown


def number(value: float | None, form: str = ".4g") -> str:
    """A number as text; 'nan' and 'inf' as they are, a dash where there is none."""
    return "-" if value is None else format(value, form)


def print_json(value: Any) -> None:
    print(to_json(value))


def to_json(value: Any) -> str:
    """Strict JSON: a number that is not finite becomes null."""
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value
