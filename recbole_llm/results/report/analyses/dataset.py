"""Does the data have order at all? Figures of a dataset, and sequential rules before and after shuffling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recbole_llm.results.reading import Analysis
from recbole_llm.results.report import plots
from recbole_llm.results.report.analyses.names import amount, share
from recbole_llm.results.report.parts import Cell, Plot, Row, Section, Table, Text


def section(analysis: Analysis) -> Section:
    """A table with one column per dataset; rules and shares as bars."""
    results = {str(result["dataset"]): result for result in analysis.results}
    columns = {name: _figures(result) for name, result in results.items()}
    labels = list(dict.fromkeys(label for column in columns.values() for label in column))
    parts: list[Any] = [
        Table(["figure", *columns], [[label, *(column.get(label) for column in columns.values())] for label in labels])
    ]
    rules = {name: result["rules"] for name, result in results.items()}
    several = len(results) > 1
    groups = [f"{name} {kind}" if several else kind for name, found in rules.items() for kind in found]
    series = {
        "as they are": [entry["before"] for found in rules.values() for entry in found.values()],
        "shuffled": [entry["after"] for found in rules.values() for entry in found.values()],
    }
    shares = {
        name: [
            result["reachable"]["from_last"],
            result["reachable"]["from_any"],
            result["repeats"]["test_items"],
            result["ties"]["pairs"],
            result["popularity"]["top_10_percent"],
        ]
        for name, result in results.items()
    }
    captions = ["test item known behind last", "known behind any", "test item repeated", "ties in time", "in top 10 % items"]
    parts.append(
        Row(
            [
                Plot(plots.bars(groups, series, "rules"), "Sequential rules", "Shuffling removes them where there is order."),
                Plot(plots.bars(captions, shares, "share", percent=True), "Transitions, repeats, ties, popularity"),
            ]
        )
    )
    for name, result in results.items():
        settings = result["settings"]
        repeats = "kept" if settings["keep_repeats"] else "dropped"
        parts.append(
            Text(
                f"{name}: rules with support > {settings['support']}, confidence > {settings['confidence']}, mean of "
                f"{settings['draws']} shuffles, consecutive repeats {repeats}."
            )
        )
    return Section("Order in the data", parts)


def _figures(result: Mapping[str, Any]) -> dict[str, Cell]:
    length, popularity, ties, repeats = (result[key] for key in ("length", "popularity", "ties", "repeats"))
    figures = {
        "users": amount(result["users"]),
        "items": amount(result["items"]),
        "interactions": amount(result["interactions"]),
        "density": share(result["density"]),
        "mean length": amount(length["mean"]),
        "median length": amount(length["median"]),
        "longest": amount(length["max"]),
        "interactions of an item, mean": amount(popularity["mean"]),
        "interactions with the most popular 10 % of items": share(popularity["top_10_percent"]),
        "Gini coefficient of the items' popularity": amount(popularity["gini"], 3),
        "consecutive interactions at one time": share(ties["pairs"]),
        "users with such a tie": share(ties["users"]),
        "test items at the time of the validation item": share(ties["test_items"]),
        "consecutive interactions with one item": share(repeats["consecutive"]),
        "test items that the user knows": share(repeats["test_items"]),
        "test items seen in training right behind the history's last item": share(result["reachable"]["from_last"]),
        "test items seen in training right behind any item of the history": share(result["reachable"]["from_any"]),
    }
    for name, rules in result["rules"].items():
        figures[f"sequential {name}"] = amount(rules["before"])
        figures[f"sequential {name} after shuffling"] = amount(rules["after"])
        figures[f"change of sequential {name}"] = share(rules["change"], signed=True)
    return figures
