"""Position bias: how often the candidate at each place of the prompt is chosen."""

from __future__ import annotations

from typing import Any

from recbole_llm.results.reading import Analysis
from recbole_llm.results.report import plots
from recbole_llm.results.report.analyses.names import name_of, share
from recbole_llm.results.report.parts import Plot, Row, Section, Table, Text, number
from recbole_llm.results.table import p_value


def section(analysis: Analysis) -> Section:
    """Shares of the chosen places beside the expected one, hits by the target's place, and the test of each model."""
    results = analysis.results
    listed = max(len(result["chosen"]) for result in results)
    places = list(range(1, listed + 1))
    chosen, hits = [], []
    rows: list[list[Any]] = []
    for number_, result in enumerate(results):
        name, valid = name_of(result, results), sum(result["chosen"])
        shares = [count / valid if valid else None for count in result["chosen"]]
        rates = [hit / count if count else None for hit, count in zip(result["hits"], result["targets"], strict=True)]
        chosen.append(plots.line(name, places, shares, number_))
        hits.append(plots.line(name, places, rates, number_))
        statistic = result["chi_square"]
        rows.append(
            [
                name,
                result["users"],
                valid,
                result["invalid"],
                result["ambiguous"],
                share(max(shares, key=lambda value: value or 0)),
                share(min(shares, key=lambda value: value or 0)),
                number(statistic, None if statistic is None else f"{statistic:.1f}"),
                number(result["p_value"], p_value(result["p_value"]) if result["p_value"] is not None else None),
            ]
        )
    even = plots.line("expected", [1, listed], [1 / listed] * 2, len(results), mode="lines")
    figure = plots.figure([*chosen, even], x="place in the prompt", y="share of the answers")
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    of_hits = plots.figure(hits, x="place of the target", y="hit@1")
    of_hits.update_yaxes(rangemode="tozero")
    header = ["model", "users", "valid", "none", "several", "most chosen", "least chosen", "chi-square", "p"]
    return Section(
        "Position bias",
        [
            Row([Plot(figure, "Places of the chosen candidates"), Plot(of_hits, "Hits by the target's place")]),
            Table(header, rows),
            Text(f"p: chi-square test that all {listed} places are chosen equally often. None: they name no candidate."),
        ],
    )
