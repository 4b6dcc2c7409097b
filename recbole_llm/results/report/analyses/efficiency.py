"""What training and inference cost."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from recbole_llm.results.reading import Analysis
from recbole_llm.results.report import plots
from recbole_llm.results.report.analyses.names import amount, name_of
from recbole_llm.results.report.parts import Plot, Row, Section, Table, Text

COLUMNS = {
    "train_minutes": ("training, minutes", 2),
    "minutes_per_epoch": ("minutes per epoch", 2),
    "users_per_second": ("users per second", 1),
    "tokens_per_second": ("tokens per second", 0),
    "trained_parameters": ("trained parameters", 0),
    "peak_memory_gb": ("peak memory, GB", 2),
}
PLOTTED = ("train_minutes", "users_per_second", "trained_parameters", "peak_memory_gb")


def section(analysis: Analysis) -> Section:
    """A table, and bars of the figures that every model has."""
    results = analysis.results
    names = plots.distinct([name_of(result, results) for result in results])
    rows: list[list[Any]] = [
        [name, *(amount(result.get(key), places) for key, (_, places) in COLUMNS.items())]
        for name, result in zip(names, results, strict=True)
    ]
    shown = []
    for key in PLOTTED:
        values = [result.get(key) for result in results]
        if any(values):
            bars = go.Bar(
                x=values, y=[plots.wrapped(name) for name in names], orientation="h", marker={"color": plots.COLORS[0]}
            )
            figure = plots.figure([bars], x=COLUMNS[key][0], legend=False)
            plots.rows_downwards(figure, [plots.wrapped(name) for name in names])
            title = COLUMNS[key][0]
            shown.append(Plot(figure, title[:1].upper() + title[1:], height=plots.height_of(names)))
    first = results[0]
    machine = f"{first['device']}, {first['threads']} threads, {first['users']:,} test users."
    memory = " Memory: of the whole process so far, all models before included (on a GPU: of this model's inference)."
    table = Table(["model", *(title for title, _ in COLUMNS.values())], rows)
    return Section("Efficiency", [Row(shown), table, Text(machine + memory)])
