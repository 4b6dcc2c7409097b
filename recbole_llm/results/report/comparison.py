"""The section of a report with the models of one dataset: table, paired differences, quality against minutes, ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from recbole_llm.results import table as form
from recbole_llm.results.comparison import SIGNIFICANT, Comparison, Line
from recbole_llm.results.report import plots
from recbole_llm.results.report.parts import Cell, Plot, Row, Section, Table, Text, number

_CURVE_POINTS = 60  # of a plot of ranks


def section(comparison: Comparison) -> Section:
    """The section of one dataset."""
    parts: list[Any] = []
    if comparison.done:
        parts.append(_table(comparison))
        forest = _forest(comparison)
        if forest is not None:
            parts.append(forest)
        beside = [plot for plot in (_cost(comparison), _ranks(comparison)) if plot is not None]
        if beside:
            parts.append(Row(beside))
    parts += [Text(text) for text in (*form.failures(comparison), *form.notes(comparison))]
    return Section(form.title(comparison), parts)


def _table(comparison: Comparison) -> Table:
    metrics, done = comparison.metrics, comparison.done
    means = {name: [float(np.mean(line.values(name))) for line in done if line.values(name)] for name in metrics}
    best = {name: max(values, default=None) for name, values in means.items()}
    tests = [line.difference for line in done if line.difference is not None]
    header = ["model", *metrics]
    if comparison.first is not None and comparison.metric is not None:
        header += [f"{comparison.metric} vs {comparison.first.label}"]
        header += ["95 % interval", "effect"] if any(test.low is not None for test in tests) else []
        header += ["p", "p corrected"] if any(test.p_value is not None for test in tests) else []
    header += ["params", "minutes"]
    rows = []
    for line in done:
        row: list[Any] = [form.name_with_seeds(line, comparison)]
        for name in metrics:
            values = line.values(name)
            mean = float(np.mean(values)) if values else None
            is_best = mean is not None and mean == best[name] and len(done) > 1 and _higher_is_better(name)
            row.append(number(mean, form.metric_cell(values), is_best))
        test = line.difference
        if f"{comparison.metric} vs" in " ".join(header) and comparison.first is not None:
            row.append(number(test and test.difference, form.signed(test.difference) + _star(test) if test else None))
        if "95 % interval" in header:
            row.append(number(test and test.low, form.interval(test)))
            row.append(number(test and test.effect, form.effect(test.effect) if test else None))
        if "p" in header:
            row += [
                number(value, form.p_value(value) if value is not None else None)
                for value in ((test.p_value, test.adjusted) if test else (None, None))
            ]
        count = line.runs[0].get("trained_parameters")
        row.append(Cell(form.parameters(count), float(count) if isinstance(count, (int, float)) else None))
        row.append(number(line.minutes, form.minutes(line.minutes)))
        rows.append(row)
    kept = [place for place in range(len(header)) if place == 0 or any(_text(row[place]) != "-" for row in rows)]
    caption = "Bold: the highest value of a metric." if len(done) > 1 else ""
    return Table([header[place] for place in kept], [[row[place] for place in kept] for row in rows], caption)


def _text(value: Any) -> str:
    return value.text if isinstance(value, Cell) else str(value)


def _star(test: Any) -> str:
    return " *" if test.adjusted is not None and test.adjusted < SIGNIFICANT else ""


def _higher_is_better(metric: str) -> bool:
    return metric not in ("logloss", "mae", "rmse", "averagepopularity") and not metric.startswith("averagepopularity@")


def _forest(comparison: Comparison) -> Plot | None:
    """Each model's difference to the first, with its interval."""
    lines = [line for line in comparison.done if line.difference is not None]
    if not lines or comparison.first is None:
        return None
    tests = [line.difference for line in lines if line.difference is not None]
    bounds = [(test.low, test.high) if test.low is not None and test.high is not None else None for test in tests]
    title = f"Difference in {comparison.metric} to {comparison.first.label}"
    figure = plots.forest(
        [line.label for line in lines],
        [test.difference for test in tests],
        bounds,
        f"difference in {comparison.metric}",
        [test.adjusted is not None and test.adjusted < SIGNIFICANT for test in tests],
    )
    with_bounds = any(bound is not None for bound in bounds)
    note = "Bars: 95 % intervals, paired by user. Filled: p < .05 after the correction." if with_bounds else (
        "No intervals: the results by user are not at hand."
    )
    return Plot(figure, title, note, height=plots.height_of([line.label for line in lines]), wide=True)


def _cost(comparison: Comparison) -> Plot | None:
    """The compared metric against the minutes of training and test."""
    metric = comparison.metric or next(iter(comparison.metrics), None)
    lines = [line for line in comparison.done if line.minutes and metric and line.values(metric)]
    if len(lines) < 2 or metric is None:
        return None
    traces = []
    for place, line in enumerate(lines):
        values, look = line.values(metric), plots.style(place)
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
        traces.append(
            go.Scatter(
                x=[line.minutes],
                y=[float(np.mean(values))],
                name=plots.escape(line.label),
                mode="markers",
                marker={"size": 12, "color": look["color"]},
                error_y={"type": "data", "array": [spread], "visible": spread is not None, "color": look["color"]},
            )
        )
    minutes = [line.minutes or 0 for line in lines]
    figure = plots.figure(traces, x="minutes (training and test)", y=metric)
    if max(minutes) > 20 * min(minutes):
        figure.update_xaxes(type="log")
    else:
        figure.update_xaxes(rangemode="tozero")
    several = any(len(line.runs) > 1 for line in lines)
    return Plot(figure, "Quality against minutes", "Bars: standard deviation over the seeds." if several else "")


def _ranks(comparison: Comparison) -> Plot | None:
    """For each k the share of users whose target is among the best k: all users' ranks at one glance."""
    lines = [line for line in comparison.done if any(row.get("ranks") is not None for row in line.runs)]
    if not lines:
        return None
    highest = max(int(_all_ranks(line).max()) for line in lines)
    cutoffs = _cutoffs(highest)
    traces = []
    for place, line in enumerate(lines):
        ranks = np.sort(_all_ranks(line))
        shares = np.searchsorted(ranks, cutoffs, side="right") / len(ranks)
        traces.append(plots.line(line.label, cutoffs.tolist(), np.round(shares, 5).tolist(), place, mode="lines"))
    figure = plots.figure(traces, x="k", y="share of users")
    if highest > 10:
        ticks = [step * 10**power for power in range(len(str(highest))) for step in (1, 2, 5)]
        figure.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{tick:,}" for tick in ticks])
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    note = "All users' ranks: at each k, a line's height is the hit rate."
    return Plot(figure, "Users whose target is among the best k", note)


def _all_ranks(line: Line) -> np.ndarray:
    return np.concatenate([np.asarray(row["ranks"]) for row in line.runs if row.get("ranks") is not None])


def _cutoffs(highest: int) -> np.ndarray:
    if highest <= _CURVE_POINTS:
        return np.arange(1, highest + 1)
    return np.unique(np.round(np.geomspace(1, highest, _CURVE_POINTS)).astype(np.int64))


def sections(comparisons: Sequence[Comparison]) -> list[Section]:
    """One section per dataset."""
    return [section(comparison) for comparison in comparisons]
