"""The sections of analyses, by the name that ``recbole-llm analyze`` has for them; one file each."""

from __future__ import annotations

from collections.abc import Callable

from recbole_llm.errors import UserError
from recbole_llm.results.reading import Analysis
from recbole_llm.results.report.analyses import (
    attention,
    cases,
    crossdomain,
    curve,
    dataset,
    efficiency,
    groups,
    memorization,
    order,
    position,
    representations,
    sweep,
)
from recbole_llm.results.report.parts import Code, Section

SECTIONS: dict[str, Callable[[Analysis], Section]] = {
    "dataset": dataset.section,
    "order": order.section,
    "groups": groups.section,
    "representations": representations.section,
    "attention": attention.section,
    "efficiency": efficiency.section,
    "curve": curve.section,
    "cases": cases.section,
    "crossdomain": crossdomain.section,
    "memorization": memorization.section,
    "position": position.section,
    "sweep": sweep.section,
}


def section_of(analysis: Analysis) -> Section:
    """The section of an analysis, with its dataset in the title and its command.

    Raises:
        UserError: an analysis of another name, or a result that lacks what its section shows.
    """
    build = SECTIONS.get(analysis.name)
    if build is None:
        raise UserError(f"{analysis.file}: there is no report of the analysis {analysis.name!r}; known: {', '.join(SECTIONS)}.")
    try:
        section = build(analysis)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ZeroDivisionError):
        raise UserError(f"{analysis.file} is damaged or of another version; make it again by recbole-llm analyze.") from None
    datasets = ", ".join(dict.fromkeys(str(result["dataset"]) for result in analysis.results if "dataset" in result))
    parts = [*section.parts, *([Code(analysis.command, "Command")] if analysis.command else [])]
    return Section(f"{section.title}: {datasets}" if datasets else section.title, parts)
