"""Memorization: how often the bare LLM goes on with a data set's own lines."""

from __future__ import annotations

from typing import Any

from recbole_llm.results.reading import Analysis
from recbole_llm.results.report import plots
from recbole_llm.results.report.analyses.names import share
from recbole_llm.results.report.parts import Plot, Section, Table, Text


def section(analysis: Analysis) -> Section:
    """Shares of right answers with intervals, beside what guessing is right in."""
    rows: list[list[Any]] = []
    groups: list[str] = []
    series: dict[str, list[float]] = {"the LLM": [], "guessing": []}
    texts = []
    for result in analysis.results:
        llm = f"{result['backbone']}, {result['layers']} layers"
        for kind, found in result["questions"].items():
            low, high = found["interval"]
            interval = f"{share(low).text} to {share(high).text}"
            rows.append([llm, kind, found["asked"], found["right"], share(found["share"]), interval, share(found["guess"])])
            groups.append(kind)
            series["the LLM"].append(found["share"])
            series["guessing"].append(found["guess"])
            if found["examples"]:
                examples = "; ".join(f"{key}: {value}" for key, value in found["examples"])
                texts.append(Text(f"{kind} that it knows: {examples}"))
    header = ["LLM", "lines of", "asked", "right", "share", "95 % interval", "by guessing"]
    figure = plots.bars(groups, series, "share of right answers", percent=True)
    return Section("Lines known by heart", [Table(header, rows), Plot(figure, "Right answers"), *texts])
