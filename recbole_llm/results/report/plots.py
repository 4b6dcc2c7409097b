"""Plots of a report: plain figures of plotly, to which the page gives the colors of its light and dark theme.

plotly reads a little HTML in its texts. Whatever comes from data or files goes through :func:`escape`, so that it stays text.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from recbole_llm.errors import printable

# Okabe and Ito's colors, which readers who are color-blind can tell apart, without black and yellow: legible on light and dark.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#7F7F7F")
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up")

LONGEST_LABEL = 40
LONGEST_LINE = 24


def escape(text: Any, limit: int | None = LONGEST_LABEL) -> str:
    """Text for a label of a plot, cut to ``limit`` characters."""
    return html.escape(printable(text, limit), quote=False)


def wrapped(text: Any) -> str:
    """Text for a label beside an axis, in up to three short lines."""
    lines = textwrap.wrap(printable(text, 3 * LONGEST_LINE), LONGEST_LINE, max_lines=3, placeholder="...") or ["-"]
    return "<br>".join(html.escape(line, quote=False) for line in lines)


def height_of(labels: Sequence[Any], around: int = 110, line: int = 16) -> int:
    """Pixels for a plot with one row per label, see :func:`wrapped`.

    Args:
        labels: beside the axis.
        around: pixels above and below the rows.
        line: pixels of a line of text.
    """
    lines = max((wrapped(label).count("<br>") + 1 for label in labels), default=1)
    return around + len(labels) * max(30, line * lines + 8)


def style(place: int, variant: int = 0) -> dict[str, Any]:
    """Color, dash and symbol of the ``place``-th line of a plot: no two of the first 32 look alike.

    Args:
        place: of a model, say.
        variant: of a line that shares its color with others: a seed, say.
    """
    around = place // len(COLORS) + variant
    color = COLORS[place % len(COLORS)]
    return {"color": color, "dash": DASHES[around % len(DASHES)], "symbol": SYMBOLS[around % len(SYMBOLS)]}


def figure(traces: Sequence[Any], x: str = "", y: str = "", legend: bool = True, **layout: Any) -> go.Figure:
    """A figure without a theme: the page adds colors, fonts and margins.

    Args:
        traces: of plotly.
        x, y: titles of the axes.
        legend: whether one is shown, where there are several traces.
        layout: more of plotly's layout.
    """
    found = go.Figure(data=list(traces))
    found.update_layout(
        template=None,
        showlegend=False,
        meta={"legend": legend and len(traces) > 1},  # drawn by the page, below the plot: it may be long
        margin={"l": 8, "r": 12, "t": 12, "b": 8},
        hovermode="closest",
        xaxis={"title": {"text": escape(x, None)}, "automargin": True, "zeroline": False},
        yaxis={"title": {"text": escape(y, None)}, "automargin": True, "zeroline": False},
    )
    found.update_layout(**layout)
    return found


def line(name: Any, x: Sequence[Any], y: Sequence[float | None], place: int = 0, variant: int = 0, **more: Any) -> go.Scatter:
    """A line with points; the ``place``-th of its plot, see :func:`style`."""
    look = style(place, variant)
    return go.Scatter(
        x=list(x),
        y=[None if value is None or not math.isfinite(value) else value for value in y],
        name=escape(name),
        mode=more.pop("mode", "lines+markers" if len(x) < 60 else "lines"),
        line={"color": look["color"], "dash": look["dash"], "width": 2},
        marker={"color": look["color"], "symbol": look["symbol"], "size": 6, "line": {"width": 0}},
        **more,
    )


def forest(
    labels: Sequence[str],
    values: Sequence[float],
    intervals: Sequence[Sequence[float] | None],
    x: str,
    solid: Sequence[bool] | None = None,
    percent: bool = False,
) -> go.Figure:
    """A forest plot: differences with their intervals, beside a line at 0.

    Args:
        labels: one per row, the first on top.
        values: the differences.
        intervals: low and high; None where unknown.
        x: title of the axis.
        solid: which markers are filled, such as the significant ones; None: all.
        percent: whether values are shares, shown as percentages.
    """
    names = distinct([wrapped(label) for label in labels])
    filled = [True] * len(values) if solid is None else list(solid)
    shown = ".1%" if percent else ".4f"
    traces = []
    for has_bounds in (True, False):
        rows = [place for place, bounds in enumerate(intervals) if (bounds is not None) is has_bounds]
        if not rows:
            continue
        bounds = [intervals[place] or (values[place], values[place]) for place in rows]
        spread = {
            "type": "data",
            "symmetric": False,
            "array": [high - values[place] for place, (_, high) in zip(rows, bounds, strict=True)],
            "arrayminus": [values[place] - low for place, (low, _) in zip(rows, bounds, strict=True)],
            "color": COLORS[0],
            "thickness": 2,
        }
        hover = [
            f"{names[place]}: {values[place]:+{shown}}" + (f" [{low:+{shown}}, {high:+{shown}}]" if has_bounds else "")
            for place, (low, high) in zip(rows, bounds, strict=True)
        ]
        traces.append(
            go.Scatter(
                x=[values[place] for place in rows],
                y=[names[place] for place in rows],
                mode="markers",
                marker={
                    "size": 10,
                    "color": COLORS[0],
                    "symbol": ["circle" if filled[place] else "circle-open" for place in rows],
                    "line": {"width": 2, "color": COLORS[0]},
                },
                error_x=spread if has_bounds else None,
                text=hover,
                hoverinfo="text",
            )
        )
    found = figure(traces, x=x, legend=False)
    rows_downwards(found, names)
    found.update_xaxes(zeroline=True, zerolinewidth=2, rangemode="tozero", tickformat="+.0%" if percent else "")
    return found


def rows_downwards(found: go.Figure, names: Sequence[str]) -> None:
    """Let a figure's rows, one per name, run from the top down, with half a row of room at both ends."""
    found.update_yaxes(
        type="category", categoryorder="array", categoryarray=list(names), range=[len(names) - 0.4, -0.6], showgrid=False
    )


def bars(groups: Sequence[str], series: Mapping[str, Sequence[float | None]], y: str, percent: bool = False) -> go.Figure:
    """Bars side by side.

    Args:
        groups: names along the axis.
        series: name of the bars of one color -> a value per group.
        y: title of the axis.
        percent: whether values are shares.
    """
    names = distinct([wrapped(group) for group in groups])
    found = figure(
        [
            go.Bar(name=escape(name), x=names, y=list(values), marker={"color": style(place)["color"]})
            for place, (name, values) in enumerate(series.items())
        ],
        y=y,
        barmode="group",
        bargap=0.25,
    )
    found.update_xaxes(type="category", showgrid=False)
    found.update_yaxes(zeroline=True, tickformat=".0%" if percent else "")
    return found


def distinct(names: Sequence[str]) -> list[str]:
    """The names with a number behind those that repeat: equal ones would fall on one place of the axis."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found
