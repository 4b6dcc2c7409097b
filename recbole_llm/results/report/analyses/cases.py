"""Case studies: a user's history, each model's best items, the truth, and what changes in another order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recbole_llm.results.reading import Analysis
from recbole_llm.results.report import plots
from recbole_llm.results.report.analyses.names import name_of
from recbole_llm.results.report.parts import Cell, Details, Plot, Section, Table, Text

MOST = 50


def section(analysis: Analysis) -> Section:
    """The users of the first model's cases, each with what every model recommends."""
    results = analysis.results
    cases = results[0]["cases"]
    parts: list[Any] = []
    for number, case in enumerate(cases[:MOST]):
        parts.append(Text(f"User {case['user']}; the next item was: {case['truth']}"))
        found = {name_of(result, results): result["cases"][number]["conditions"] for result in results}
        conditions = list(case["conditions"])
        series = {
            name: [1 / of_model[condition]["rank"] if condition in of_model else None for condition in conditions]
            for name, of_model in found.items()
        }
        figure = plots.bars(conditions, series, "1 / rank of the truth")
        parts.append(Plot(figure, f"User {case['user']}: the truth's place", "1: the first of the list.", height=260))
        parts += [_lists(found, condition, case["truth"]) for condition in conditions]
        parts.append(Details("History, oldest first", [_histories(case["conditions"])]))
    if len(cases) > MOST:
        parts.append(Text(f"The first {MOST} of {len(cases)} users."))
    return Section("Case studies", parts)


def _lists(found: Mapping[str, Mapping[str, Any]], condition: str, truth: str) -> Table:
    """Each model's best items side by side; the truth stands out."""
    of_models = {name: conditions[condition] for name, conditions in found.items() if condition in conditions}
    longest = max((len(entry["best"]) for entry in of_models.values()), default=0)
    rows: list[list[Any]] = []
    for place in range(longest):
        titles = [entry["best"][place] if place < len(entry["best"]) else "" for entry in of_models.values()]
        rows.append([place + 1, *(Cell(title, title.casefold(), title == truth) for title in titles)])
    ranks = ", ".join(f"{name} {entry['rank']}" for name, entry in of_models.items())
    caption = f"Best items, {condition} history. Rank of the truth: {ranks}."
    return Table(["place", *of_models], rows, caption, left=1 + len(of_models))


def _histories(conditions: Mapping[str, Any]) -> Table:
    """The history in each order, side by side."""
    longest = max((len(entry["history"]) for entry in conditions.values()), default=0)
    rows: list[list[Any]] = []
    for place in range(longest):
        row: list[Any] = [place + 1]
        for entry in conditions.values():
            title, date = entry["history"][place] if place < len(entry["history"]) else ("", "")
            row.append(f"{title} ({date})" if date else title)
        rows.append(row)
    return Table(["place", *conditions], rows, left=1 + len(conditions))
