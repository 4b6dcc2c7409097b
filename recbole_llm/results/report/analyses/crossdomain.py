"""Trained on one dataset, tested on another."""

from __future__ import annotations

from typing import Any

from recbole_llm.results.reading import Analysis
from recbole_llm.results.report import plots
from recbole_llm.results.report.analyses.names import name_of
from recbole_llm.results.report.parts import Cell, Plot, Section, Table, Text, number
from recbole_llm.results.table import decimal, p_value


def section(analysis: Analysis) -> Section:
    """The gain over the untrained model in the first metric, with its interval; and a table."""
    rows: list[list[Any]] = []
    labels, values, bounds, metric = [], [], [], ""
    for result in analysis.results:
        name = name_of(result, analysis.results)
        for condition in result["conditions"]:
            for place, (measure, found) in enumerate(condition["metrics"].items()):
                low, high = found["difference_interval"]
                rows.append(
                    [
                        name,
                        condition["vectors"],
                        measure,
                        number(found["original"], decimal(found["original"])),
                        number(found["perturbed"], decimal(found["perturbed"])),
                        number(found["difference"], f"{found['difference']:+.4f}"),
                        Cell(f"[{low:+.4f}, {high:+.4f}]", low),
                        number(found["p_value"], p_value(found["p_value"])),
                    ]
                )
                if place == 0:
                    metric = measure
                    labels.append(f"{name}, {condition['vectors']}")
                    values.append(found["difference"])
                    bounds.append((low, high))
    figure = plots.forest(labels, values, bounds, f"difference in {metric}")
    title = f"Gain in {metric} over the untrained model"
    note = "Without: prompts of text alone. Own: vectors of the test dataset's own teacher. Bars: 95 % intervals over users."
    header = ["model", "vectors", "metric", "untrained", "trained elsewhere", "difference", "95 % interval", "p"]
    return Section(
        "Another dataset",
        [
            Text(f"Trained on {analysis.results[0]['train']}."),
            Plot(figure, title, note, height=plots.height_of(labels), wide=True),
            Table(header, rows, left=3),
        ],
    )
