"""What a report's page is made of. All text in it is plain: the page escapes it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, what it is sorted by (None: behind all others), and whether it stands out."""

    text: str
    value: float | str | None
    strong: bool = False


@dataclass
class Table:
    """A table whose columns a reader can sort by.

    Attributes:
        header: names of the columns.
        rows: a :class:`Cell`, or a value for :func:`cell`, per column.
        caption: one sentence; empty for none.
        left: how many columns at the beginning are names, aligned on the left.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    left: int = 1
    kind: str = field(default="table", init=False)

    @property
    def cells(self) -> list[list[Cell]]:
        return [[cell(value) for value in row] for row in self.rows]


@dataclass
class Plot:
    """A figure of plotly.

    Attributes:
        figure: its text is escaped by :mod:`recbole_llm.results.report.plots`.
        title: what it shows.
        note: how to read it.
        height: in pixels.
        wide: whether it takes the page's whole width.
    """

    figure: go.Figure
    title: str
    note: str = ""
    height: int = 340
    wide: bool = False
    kind: str = field(default="plot", init=False)


@dataclass
class Text:
    """A paragraph."""

    text: str
    kind: str = field(default="text", init=False)


@dataclass
class Code:
    """A command, or other text in which line breaks and blanks count."""

    text: str
    title: str = ""
    kind: str = field(default="code", init=False)


@dataclass
class Facts:
    """Names and what they are."""

    facts: Mapping[str, Any]
    kind: str = field(default="facts", init=False)

    @property
    def shown(self) -> list[tuple[str, str]]:
        return [(str(name), cell(value).text) for name, value in self.facts.items() if value not in (None, "", {}, [])]


@dataclass
class Row:
    """Parts that stand side by side where the page is wide enough."""

    parts: Sequence[Plot]
    kind: str = field(default="row", init=False)


@dataclass
class Details:
    """Parts that a reader opens by a click; open in print, but for ``long`` ones."""

    title: str
    parts: Sequence[Any]
    long: bool = False
    kind: str = field(default="details", init=False)


@dataclass
class Section:
    """A headline and what belongs to it."""

    title: str
    parts: Sequence[Any]


def cell(value: Any) -> Cell:
    """A value as a cell: numbers are sorted as such, ``-`` stands for none."""
    if isinstance(value, Cell):
        return value
    if value is None or value == "":
        return Cell("-", None)
    if isinstance(value, bool):
        return Cell("yes" if value else "no", int(value))
    if isinstance(value, numbers.Real):
        number = float(value)
        if not math.isfinite(number):
            return Cell("-", None)
        return Cell(f"{value:,}" if isinstance(value, numbers.Integral) else f"{number:,.6g}", number)
    if isinstance(value, Mapping):
        value = ", ".join(f"{name}: {cell(entry).text}" for name, entry in value.items())
    elif isinstance(value, (list, tuple)):
        value = ", ".join(cell(entry).text for entry in value)
    return Cell(str(value), str(value).casefold())


def number(value: Any, text: str | None = None, strong: bool = False) -> Cell:
    """A cell with a text of its own, sorted by its number; ``-`` where that is None or no number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(float(value)):
        return Cell("-", None)
    return Cell(cell(value).text if text is None else text, float(value), strong)
