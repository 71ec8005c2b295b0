"""A number with its name, its source and what it is worth."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

CLAIMED, CORRECTED, PROVED, MEASURED = "claimed", "corrected", "proved", "measured"


@dataclass(frozen=True)
class Row:
    """One constant.

    kind: "claimed", as the paper prints it; "corrected", the paper's way with its slips repaired, still under the
    paper's hypotheses; "proved", holds for this network and these data; "measured", computed there without a
    statement. ``value`` is None where the claim has no meaning; ``note`` says why.
    """

    name: str
    value: float | None
    kind: str
    source: str
    note: str = ""


@dataclass(frozen=True)
class Rows:
    """Rows in order; ``rows[name, kind]`` is a value, str() a table."""

    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[str, str]) -> float | None:
        for row in self.rows:
            if (row.name, row.kind) == key:
                return row.value
        raise KeyError(f"{key}; the rows are {[(row.name, row.kind) for row in self.rows]}")

    def __str__(self) -> str:
        return table_of(
            ("constant", "value", "kind", "source", "note"),
            ((r.name, "-" if r.value is None else f"{r.value:.6g}", r.kind, r.source, r.note) for r in self.rows),
        )


def table_of(heads: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    """Columns under their heads, as wide as their widest entry."""
    lines = [heads, *lines]
    widths = [max(len(line[k]) for line in lines) for k in range(len(heads))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
