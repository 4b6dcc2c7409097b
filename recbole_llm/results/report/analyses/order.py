"""Order sensitivity: how a model's metrics change when histories, or training sequences, stand in another order."""

from __future__ import annotations

from typing import Any

from recbole_llm.results.reading import Analysis
from recbole_llm.results.report import plots
from recbole_llm.results.report.analyses.names import bounds_of, name_of, share
from recbole_llm.results.report.parts import Plot, Row, Section, Table, Text, number
from recbole_llm.results.table import decimal, p_value


def section(analysis: Analysis) -> Section:
    """Table of all conditions and metrics; the relative change of the first metric with its interval; Jaccard similarity."""
    body: list[list[Any]] = []
    labels, values, bounds = [], [], []
    similarity: dict[str, dict[str, float | None]] = {}
    metric = ""
    for result in analysis.results:
        name = name_of(result, analysis.results)
        for condition in result["conditions"]:
            for place, (measure, found) in enumerate(condition["metrics"].items()):
                interval, change = found["change_interval"], found["change"]
                jaccard = condition["jaccard"].get(f"jaccard@{measure.rpartition('@')[2]}")
                body.append(
                    [
                        name,
                        condition["condition"],
                        measure,
                        number(found["original"], decimal(found["original"])),
                        number(found["perturbed"], decimal(found["perturbed"])),
                        share(change, signed=True),
                        bounds_of(interval),
                        number(found["p_value"], p_value(found["p_value"])),
                        number(jaccard, None if jaccard is None else f"{jaccard:.2f}"),
                    ]
                )
                if place == 0:
                    metric = measure
                    similarity.setdefault(name, {})[condition["condition"]] = jaccard
                    if change is not None:
                        labels.append(f"{name}, {condition['condition']}")
                        values.append(change)
                        bounds.append(interval)
    parts: list[Any] = []
    if labels:
        parts.append(
            Plot(
                plots.forest(labels, values, bounds, f"relative change of {metric}", percent=True),
                f"Change of {metric} in another order",
                "Bars: 95 % intervals, bootstrap over users.",
                height=plots.height_of(labels),
                wide=True,
            )
        )
    conditions = list(dict.fromkeys(condition for found in similarity.values() for condition in found))
    if conditions:
        series = {name: [found.get(condition) for condition in conditions] for name, found in similarity.items()}
        note = "Jaccard similarity of the lists from the original and the other order, mean over users."
        bars = plots.bars(conditions, series, "Jaccard similarity")
        parts.append(Row([Plot(bars, "The best items that stay the same", note)]))
    header = ["model", "condition", "metric", "original", "perturbed", "change", "95 % interval", "p", "Jaccard"]
    parts.append(Table(header, body, left=3))
    parts.append(Text("p: two-sided sign-flip test, paired by user, not corrected for the number of lines."))
    parts += _between(analysis)
    return Section("Order sensitivity", parts)


def _between(analysis: Analysis) -> list[Any]:
    """Which model loses more: the differences between the models' changes; nothing where there are none."""
    rows: list[list[Any]] = []
    labels, values, bounds = [], [], []
    for result in analysis.results:
        for entry in result.get("against", []):  # results of before have none
            name, difference, interval = name_of(result, analysis.results), entry["difference"], entry["interval"]
            pair = [name, str(entry["against"]), entry["condition"], entry["metric"]]
            rows.append([*pair, share(difference, signed=True), bounds_of(interval)])
            if difference is not None:
                labels.append(f"{name} - {entry['against']}, {entry['condition']}")
                values.append(difference)
                bounds.append(interval)
    if not rows:
        return []
    table = Table(["model", "against", "condition", "metric", "difference", "95 % interval"], rows, left=4)
    if not labels:
        return [table]
    figure = plots.forest(labels, values, bounds, "difference of the relative changes", percent=True)
    note = "The change of the first model less that of the second; below 0, the first one loses the larger share."
    return [Plot(figure, "Which model loses more", note, height=plots.height_of(labels), wide=True), table]
