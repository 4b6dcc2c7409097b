"""User representations of original and perturbed histories."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from recbole_llm.results.reading import Analysis
from recbole_llm.results.report import plots
from recbole_llm.results.report.analyses.names import name_of
from recbole_llm.results.report.parts import Plot, Section, Table, Text, number


def section(analysis: Analysis) -> Section:
    """Cosine between a user's two representations with its quantiles, beside that of two users."""
    rows: list[list[Any]] = []
    labels, means, lows, highs, between = [], [], [], [], []
    for result in analysis.results:
        name = name_of(result, analysis.results)
        for condition in result["conditions"]:
            cosine, quantiles = condition["cosine"], condition["quantiles"]
            numbers = [cosine, *quantiles, result["cosine_between_users"], result["distance"], result["unit_distance"]]
            shown = [number(value, None if value is None else f"{value:.4f}") for value in numbers]
            rows.append([name, condition["condition"], condition["users"], *shown])
            if cosine is not None:
                labels.append(f"{name}, {condition['condition']}")
                means.append(cosine)
                lows.append(quantiles[0])
                highs.append(quantiles[2])
                between.append(result["cosine_between_users"])
    parts: list[Any] = []
    if labels:
        names = plots.distinct([plots.wrapped(label) for label in labels])
        spread = {
            "type": "data",
            "symmetric": False,
            "array": [high - mean for high, mean in zip(highs, means, strict=True)],
            "arrayminus": [mean - low for low, mean in zip(lows, means, strict=True)],
            "color": plots.COLORS[0],
        }
        traces = [
            go.Scatter(
                x=means,
                y=names,
                mode="markers",
                name="of one user",
                error_x=spread,
                marker={"size": 10, "color": plots.COLORS[0]},
            ),
            go.Scatter(
                x=between,
                y=names,
                mode="markers",
                name="of two users",
                marker={"size": 10, "color": plots.COLORS[1], "symbol": "diamond"},
            ),
        ]
        figure = plots.figure(traces, x="cosine")
        plots.rows_downwards(figure, names)
        height = plots.height_of(labels)
        note = "Bars: from the 5 % to the 95 % quantile of the users whose history has another order."
        parts.append(Plot(figure, "Cosine of representations", note, height=height, wide=True))
    header = ["model", "condition", "users", "cosine", "5 %", "median", "95 %", "between users", "distance", "unit distance"]
    parts.append(Table(header, rows, left=2))
    parts.append(Text("distance: mean Euclidean distance of two users; unit distance: the same of vectors of length 1."))
    return Section("User representations", parts)
