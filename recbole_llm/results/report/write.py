"""Write a report: what is in it, and in which order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from recbole_llm._version import __version__
from recbole_llm.errors import UserError
from recbole_llm.results.comparison import compare_rows, groups_of
from recbole_llm.results.files import check_writable, write_text
from recbole_llm.results.reading import Analysis, Inputs, read_inputs
from recbole_llm.results.report import comparison, runs
from recbole_llm.results.report.analyses import SECTIONS, section_of
from recbole_llm.results.report.page import Page
from recbole_llm.results.report.parts import Code, Facts, Section, Table
from recbole_llm.results.table import first_row, known_metric

DEFAULT_OUTPUT = "report.html"


def write_report(
    sources: Iterable[str | Path],
    output: str | Path = DEFAULT_OUTPUT,
    title: str | None = None,
    against: str | None = None,
    metric: str | None = None,
) -> Path:
    """Write a report of runs and analyses as one HTML file.

    Args:
        sources: folders of runs, results files and results by user, files or folders of ``recbole-llm analyze``.
        output: the file, written in one step.
        title: of the page; default: the datasets' names.
        against: the model that the others are compared with; default: the first.
        metric: that they are compared in; default: the one that models were chosen by.

    Returns:
        the file.

    Raises:
        UserError: a source that is missing or something else, no model named ``against``, or a file that cannot be written.
    """
    check_writable(output, "output")
    inputs = read_inputs(sources)
    write_text(output, html(inputs, title, against, metric), "output")
    return Path(output)


def html(inputs: Inputs, title: str | None = None, against: str | None = None, metric: str | None = None) -> str:
    """The text of a report, see :func:`write_report`."""
    rows = first_row(inputs.rows, against) if inputs.rows else []
    rows = [row for _, group in groups_of(rows) for row in group]
    done = [row for row in rows if not row.get("error")]
    sections: list[Section | None] = [*comparison.sections(compare_rows(rows, known_metric(rows, metric)))] if rows else []
    sections += [runs.curves(done)]
    sections += [section_of(analysis) for analysis in _together(inputs.analyses)]
    sections += [_other(table) for table in inputs.tables]
    sections += [runs.provenance(done)]
    found = [section for section in sections if section is not None]
    if not found:
        raise UserError("there is nothing to report: give the folder of a run, a results file or an analysis.")
    datasets = [row["dataset"] for row in rows]
    datasets += [result.get("dataset") for analysis in inputs.analyses for result in analysis.results]
    names = ", ".join(dict.fromkeys(str(name) for name in datasets if name))
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
    footer = f"Written by recbole-llm {__version__} on {now} UTC."
    return Page(title or (f"Results on {names}" if names else "Results"), found, inputs.notes, footer).html()


def _together(analyses: Sequence[Analysis]) -> list[Analysis]:
    """Analyses of single models, which were kept apart, as one; those that one command made stay as they are."""
    found: list[Analysis] = []
    for analysis in analyses:
        other = next((known for known in found if known.name == analysis.name and known.command is None), None)
        if other is None or analysis.command is not None or analysis.name == "cases":
            found.append(Analysis(analysis.name, list(analysis.results), analysis.command, analysis.file))
        else:
            other.results += analysis.results
    order = list(SECTIONS)
    return sorted(found, key=lambda analysis: order.index(analysis.name) if analysis.name in order else len(order))


def _other(table: dict[str, Any]) -> Section:
    """A table of published figures that are not of models."""
    header = list(dict.fromkeys(name for row in table["rows"] for name in row))
    parts: list[Any] = [Table(header, [[row.get(name) for name in header] for row in table["rows"]])]
    parts.append(Facts({name: table.get(name) for name in ("settings", "machine", "seed", "protocol")}))
    if isinstance(table.get("command"), str):
        parts.append(Code(table["command"], "Command"))
    return Section(str(table["title"]), parts)
