"""What the LLM's tokens attend to, in the original order and in another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from recbole_llm.results.reading import Analysis
from recbole_llm.results.report import plots
from recbole_llm.results.report.analyses.names import name_of, share
from recbole_llm.results.report.parts import Details, Plot, Section, Table

PARTS = {"within": "within the item", "across": "other items", "rest": "rest of the prompt"}


def section(analysis: Analysis) -> Section:
    """The shares of attention as bars and table; what each user's out token attends to most."""
    labels: list[str] = []
    shares: list[Mapping[str, float]] = []
    rows: list[list[Any]] = []
    for result in analysis.results:
        name = name_of(result, analysis.results)
        for condition, layers in result["shares"].items():
            for layer, found in layers.items():
                labels.append(f"{name}, {condition}, {layer}")
                shares.append(found)
                rows.append([name, condition, layer, *(share(found[part]) for part in PARTS)])
    parts: list[Any] = []
    if labels:
        names = plots.distinct([plots.wrapped(label) for label in labels])
        traces = [
            go.Bar(
                x=[found[part] for found in shares],
                y=names,
                name=title,
                orientation="h",
                marker={"color": plots.COLORS[place]},
            )
            for place, (part, title) in enumerate(PARTS.items())
        ]
        height = plots.height_of(labels)
        figure = plots.figure(traces, x="share of attention", barmode="stack")
        figure.update_xaxes(range=[0, 1], tickformat=".0%")
        plots.rows_downwards(figure, names)
        parts.append(Plot(figure, "Where tokens inside items attend to", height=height, wide=True))
    parts.append(Table(["model", "condition", "layer", *PARTS.values()], rows, left=3))
    for result in analysis.results:
        name = name_of(result, analysis.results)
        parts.append(Details(f"What the out token attends to most: {name}", [_out_token(result)]))
    return Section("Attention", parts)


def _out_token(result: Mapping[str, Any]) -> Table:
    rows = []
    for user in result["users"]:
        for condition, layers in user["conditions"].items():
            for layer, found in layers.items():
                best = found["tokens"][-1]["attends_to"] if found["tokens"] else []
                shown = ", ".join(f"{token.strip() or repr(token)} {weight:.3f}" for token, _, weight in best)
                rows.append([user["user"], condition, layer, shown])
    return Table(["user", "condition", "layer", "tokens and weights"], rows, left=4)
