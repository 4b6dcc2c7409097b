"""Validation figures in the course of a training."""

from __future__ import annotations

from typing import Any

from recbole_llm.results.reading import Analysis
from recbole_llm.results.report import plots
from recbole_llm.results.report.analyses.names import name_of
from recbole_llm.results.report.parts import Details, Plot, Row, Section, Table, number
from recbole_llm.results.table import decimal


def section(analysis: Analysis) -> Section:
    """One plot per metric, one line per model; all validations as a table."""
    results = analysis.results
    entries = [entry for result in results for entry in result["validations"]]
    metrics = list(dict.fromkeys(name for entry in entries for name in entry if "@" in name))
    shown = []
    for metric in metrics[:4]:
        traces = []
        for place, result in enumerate(results):
            found = [entry for entry in result["validations"] if entry.get(metric) is not None]
            sizes = [12 if entry["step"] == result["best_step"] else 6 for entry in found]
            trace = plots.line(
                name_of(result, results), [entry["epoch"] for entry in found], [entry[metric] for entry in found], place
            )
            shown_marks = trace.update(mode="lines+markers")
            shown_marks.marker.size = sizes
            traces.append(shown_marks)
        figure = plots.figure(traces, x="epoch", y=f"validation {metric}")
        figure.update_xaxes(rangemode="tozero")
        shown.append(Plot(figure, f"Validation {metric}", "Large: the step that was kept."))
    rows: list[list[Any]] = [
        [
            name_of(result, results),
            number(entry["epoch"], f"{entry['epoch']:.2f}"),
            *(number(entry.get(metric), None if entry.get(metric) is None else decimal(entry[metric])) for metric in metrics),
            "kept" if entry["step"] == result["best_step"] else "",
        ]
        for result in results
        for entry in result["validations"]
    ]
    table = Table(["model", "epoch", *metrics, "step"], rows)
    return Section("Learning curve", [Row(shown), Details(f"All {len(rows)} validations", [table])])
