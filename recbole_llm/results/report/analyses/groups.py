"""For which users does a model work, and for which does order matter?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recbole_llm.results.reading import Analysis
from recbole_llm.results.report import plots
from recbole_llm.results.report.analyses.names import bounds_of, name_of, share
from recbole_llm.results.report.parts import Details, Plot, Row, Section, Table, Text, number
from recbole_llm.results.table import decimal, p_value


def section(analysis: Analysis) -> Section:
    """One plot per grouping in the first metric, the change by condition, and a table of all."""
    groups: list[Mapping[str, Any]] = [group for result in analysis.results for group in result["groups"]]
    if not groups:
        return Section("Groups of users", [Text("No group has a user.")])
    metric = next(iter(groups[0]["metrics"]))
    groupings = list(dict.fromkeys(str(group["grouping"]) for group in groups))
    parts: list[Any] = [Row([_bars(groups, grouping, metric, None) for grouping in groupings])]
    conditions = list(dict.fromkeys(condition for group in groups for condition in group["conditions"]))
    parts += [Row([_bars(groups, grouping, metric, condition) for grouping in groupings]) for condition in conditions]
    table = _table(groups, metric)
    parts.append(Details(f"All {len(table.rows)} lines as a table", [table]) if len(table.rows) > 20 else table)
    return Section("Groups of users", parts)


def _bars(groups: Sequence[Mapping[str, Any]], grouping: str, metric: str, condition: str | None) -> Plot:
    of_grouping = [group for group in groups if group["grouping"] == grouping]
    names = list(dict.fromkeys(group["group"] for group in of_grouping))
    series: dict[str, dict[str, float | None]] = {}
    for group in of_grouping:
        if condition is None:
            value = group["metrics"][metric]
        else:
            value = group["conditions"].get(condition, {}).get(metric, {}).get("change")
        series.setdefault(name_of(group, groups), {})[group["group"]] = value
    values = {model: [found.get(name) for name in names] for model, found in series.items()}
    users = {group["group"]: group["users"] for group in of_grouping}
    labels = [f"{name} ({users[name]:,})" for name in names]
    if condition is None:
        return Plot(plots.bars(labels, values, metric), f"{metric} by {grouping}", "In brackets: users.", height=300)
    figure = plots.bars(labels, values, "relative change", percent=True)
    return Plot(figure, f"Change of {metric} by {grouping}, {condition}", height=300)


def _table(groups: Sequence[Mapping[str, Any]], metric: str) -> Table:
    rows: list[list[Any]] = []
    for group in groups:
        value = group["metrics"][metric]
        head = [name_of(group, groups), group["grouping"], group["group"], group["users"], number(value, decimal(value))]
        if not group["conditions"]:
            rows.append([*head, None, None, None, None, None])
        for condition, metrics in group["conditions"].items():
            found = metrics[metric]
            changed = found["perturbed"]
            rows.append(
                [
                    *head,
                    condition,
                    number(changed, decimal(changed)),
                    share(found["change"], signed=True),
                    bounds_of(found["change_interval"]),
                    number(found["p_value"], p_value(found["p_value"])),
                ]
            )
    header = ["model", "grouping", "group", "users", metric, "condition", "perturbed", "change", "95 % interval", "p"]
    if all(row[5] is None for row in rows):
        header, rows = header[:5], [row[:5] for row in rows]
    return Table(header, rows, left=3)
