"""A key over several values: each metric against the key, seeds as a band."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from recbole_llm.results.reading import Analysis
from recbole_llm.results.report import plots
from recbole_llm.results.report.parts import Plot, Row, Section, Table, Text, number
from recbole_llm.results.table import decimal

_OPACITY = 0.2


def section(analysis: Analysis) -> Section:
    """A plot per metric, one line per model through the means, a band from the lowest to the highest seed; and a table."""
    done = [result for result in analysis.results if "error" not in result]
    key = str(analysis.results[0]["key"])
    metrics = list(dict.fromkeys(metric for result in done for metric in result["metrics"]))
    models = list(dict.fromkeys(str(result["model"]) for result in done))
    several = len({result["seed"] for result in done}) > 1
    shown = []
    for metric in metrics[:4]:
        traces: list[Any] = []
        for place, model in enumerate(models):
            traces += _line(done, model, metric, place)
        figure = plots.figure(traces, x=key, y=metric)
        if not _is_numeric(done):
            figure.update_xaxes(type="category")
        note = "Line: mean of the seeds. Band: from the lowest to the highest seed." if several else "One seed."
        shown.append(Plot(figure, f"{metric} over {key}", note))
    rows: list[list[Any]] = []
    for model in models:
        for value, found in _by_value(done, model):
            cells = []
            for metric in metrics:
                values = [float(result["metrics"][metric]) for result in found if metric in result["metrics"]]
                spread = f" ± {decimal(float(np.std(values, ddof=1)))}" if len(values) > 1 else ""
                mean = float(np.mean(values)) if values else None
                cells.append(number(mean, None if mean is None else decimal(mean) + spread))
            rows.append([model, number(value) if _is_numeric(done) else str(value), len(found), *cells])
    caption = "±: standard deviation over the seeds." if several else ""
    failures = [
        Text(f"{result['model']}, {key} = {result['value']}, seed {result['seed']} FAILED: {result['error']}")
        for result in analysis.results
        if "error" in result
    ]
    return Section(f"Sweep over {key}", [Row(shown), Table(["model", key, "seeds", *metrics], rows, caption), *failures])


def _is_numeric(results: Sequence[Mapping[str, Any]]) -> bool:
    return all(isinstance(result["value"], (int, float)) and not isinstance(result["value"], bool) for result in results)


def _by_value(results: Sequence[Mapping[str, Any]], model: str) -> list[tuple[Any, list[Mapping[str, Any]]]]:
    """The runs of a model for each value: in order of size where all are numbers, else as they come."""
    of_model = [result for result in results if str(result["model"]) == model]
    values: list[Any] = []
    for result in of_model:
        if result["value"] not in values:
            values.append(result["value"])
    values = sorted(values) if _is_numeric(results) else values
    return [(value, [result for result in of_model if result["value"] == value]) for value in values]


def _line(results: Sequence[Mapping[str, Any]], model: str, metric: str, place: int) -> list[go.Scatter]:
    """The line of a model, and the band behind it where there are several seeds."""
    x, middle, low, high = [], [], [], []
    for value, found in _by_value(results, model):
        values = [float(result["metrics"][metric]) for result in found if metric in result["metrics"]]
        if values:
            x.append(value if _is_numeric(results) else plots.escape(value))
            middle.append(float(np.mean(values)))
            low.append(min(values))
            high.append(max(values))
    line = plots.line(model, x, middle, place)
    if low == high:
        return [line]
    color = plots.style(place)["color"]
    red, green, blue = (int(color[start : start + 2], 16) for start in (1, 3, 5))
    band = go.Scatter(
        x=[*x, *reversed(x)],
        y=[*high, *reversed(low)],
        mode="lines",
        line={"width": 0, "color": color},
        fill="toself",
        fillcolor=f"rgba({red},{green},{blue},{_OPACITY})",
        name=f"{plots.escape(model)}: seeds",
        hoverinfo="skip",
    )
    return [band, line]
