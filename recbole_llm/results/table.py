"""The table of results, in which the models are compared in pairs: as text, Markdown, LaTeX or CSV.

Its rows are those of :mod:`recbole_llm.results.comparison`.
"""

from __future__ import annotations

import csv
import io
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from recbole_llm.errors import UserError, printable, unknown_value
from recbole_llm.evaluation.intervals import DRAWS
from recbole_llm.evaluation.ranking import is_per_user
from recbole_llm.results.comparison import (
    SIGNIFICANT,
    TEACHER,
    Comparison,
    Difference,
    Line,
    Row,
    compare_rows,
    label_of,
    sentence,
    settings_of,
)
from recbole_llm.results.reading import read_inputs

__all__ = ["FORMATS", "TEACHER", "Row", "format_table", "label_of", "sentence", "table"]

FORMATS = ("text", "md", "latex", "csv")

WIDTH = 120  # of a page of text, in characters


@dataclass
class _Column:
    header: str
    cells: dict[str, str]  # by the label of the line


def format_table(
    rows: Sequence[Row],
    valid_metric: str | None = None,
    width: int = WIDTH,
    format: str = "text",
    against: str | None = None,
) -> str:
    """Lay the rows out as a table, one line per model and per choice of its settings.

    Several seeds give mean ± standard deviation over the seeds. The difference to the first model is taken in
    ``valid_metric`` over the same users (a user's value is first averaged over the seeds that both models have), with its
    95 % interval, the effect size, and the p value of a test in pairs (:mod:`recbole_llm.evaluation.significance`) after
    Holm's correction for the number of comparisons. These take the trained models as given: what other seeds would give
    shows in the standard deviation.

    Args:
        rows: see :mod:`recbole_llm.results.comparison`; several datasets or protocols give one table each.
        valid_metric: such as ``ndcg@10``; default: the rows' own, else their first metric.
        width: of a page of text, in characters; a table with more columns goes on below itself.
        format: one of :data:`FORMATS`. ``csv`` has numbers in full, and one line per model of all datasets.
        against: the model that the others are compared with; default: that of the first row.

    Returns:
        the table, without a newline at its end.

    Raises:
        UserError: an unknown format, or no model named ``against``.
    """
    if format not in FORMATS:
        raise UserError(unknown_value("format", format, FORMATS))
    comparisons = compare_rows(first_row(rows, against), known_metric(rows, valid_metric))
    if format == "csv":
        return _csv(comparisons)
    if format == "text":
        return "\n\n".join(_text(comparison, width) for comparison in comparisons)
    return "\n\n".join((_markdown if format == "md" else _latex)(comparison) for comparison in comparisons)


def table(
    runs: Sequence[Row | str | Path],
    format: str = "text",
    against: str | None = None,
    metric: str | None = None,
) -> str:
    """One table of runs, with tests in pairs: what ``recbole-llm table`` prints.

    >>> rows = recbole_llm.compare(["SASRec", "LLMSTAR"], "ml-100k")  # doctest: +SKIP
    >>> print(recbole_llm.table(rows, format="md"))  # doctest: +SKIP
    >>> print(recbole_llm.table(["saved/SASRec-...", "saved/LLMSTAR-..."], metric="hit@10"))  # doctest: +SKIP

    Args:
        runs: rows of :func:`recbole_llm.quick_start.compare`, or folders of runs, results files and results by user; both
            may stand together.
        format: ``text``, ``md``, ``latex`` (for the package booktabs) or ``csv`` (numbers in full).
        against: the model that the others are compared with; default: the first.
        metric: that they are compared in, such as ``ndcg@10``; default: the one that models were chosen by.

    Returns:
        the table, see :func:`format_table`.

    Raises:
        UserError: a file that is missing or something else, an unknown format, model or metric, or no run at all.
    """
    rows: list[Row] = [run for run in runs if not isinstance(run, (str, Path))]
    rows += read_inputs(run for run in runs if isinstance(run, (str, Path))).rows
    if not rows:
        raise UserError("runs: there is none; give rows of compare, folders of runs or their results files.")
    return format_table(rows, metric, format=format, against=against)


def first_row(rows: Sequence[Row], against: str | None) -> list[Row]:
    """The rows with those of the model ``against`` first, the others in their order.

    Raises:
        UserError: no row has that name.
    """
    names = list(dict.fromkeys(map(label_of, rows)))
    if against is None:
        return list(rows)
    if against not in names:
        raise UserError(f"against: there is no {against!r} among {', '.join(names)}.")
    return sorted(rows, key=lambda row: label_of(row) != against)


def known_metric(rows: Sequence[Row], metric: str | None) -> str | None:
    """``metric`` as the rows write it.

    Raises:
        UserError: no row has it by user.
    """
    known = list(dict.fromkeys(name for row in rows for name in row.get("metrics") or ()))
    known = [name for name in known if name == "auc" or is_per_user(name)]
    if metric is not None and metric.lower() not in known:
        raise UserError(unknown_value("metric", metric, known) if known else "metric: there is none to compare the models in.")
    return metric and metric.lower()


# ---------------------------------------------------------------------------------------------------------------------
# What the forms share
# ---------------------------------------------------------------------------------------------------------------------


def _columns(comparison: Comparison) -> tuple[_Column, list[_Column], list[_Column]]:
    """Names, metrics, and the rest."""
    done = comparison.done
    names = _Column("model", {line.label: name_with_seeds(line, comparison) for line in done})
    metrics = [
        _Column(name, {line.label: metric_cell(line.values(name)) for line in done}) for name in comparison.metrics
    ]
    if len({row.get("users") for line in done for row in line.runs}) > 1:
        cells = {line.label: _same(str(row.get("users", "-")) for row in line.runs) for line in done}
        metrics.insert(0, _Column("users", cells))
    rest = [
        *_difference_columns(comparison),
        _Column("params", {line.label: parameters(line.runs[0].get("trained_parameters")) for line in done}),
        _Column("minutes", {line.label: minutes(line.minutes) for line in done}),
    ]
    known = [column for column in rest if set(column.cells.values()) != {"-"}]
    return names, metrics, known


def _difference_columns(comparison: Comparison) -> list[_Column]:
    """The columns of differences to the first model; none where nothing can be compared."""
    first, done = comparison.first, comparison.done
    if first is None or comparison.metric is None:
        return []
    differences = [line.difference for line in done if line.difference]
    columns = [_Column(f"{comparison.metric} vs {first.label}", {line.label: _difference_cell(line) for line in done})]
    if any(found.low is not None for found in differences):
        columns.append(_Column("95 % interval", {line.label: interval(line.difference) for line in done}))
    if any(found.effect is not None for found in differences):
        cells = {line.label: effect(line.difference.effect) if line.difference else "-" for line in done}
        columns.append(_Column("effect", cells))
    return columns


def _difference_cell(line: Line) -> str:
    test = line.difference
    if test is None:
        return "-"
    if test.adjusted is None:
        return f"{signed(test.difference)} (no test)  "
    mark = "*" if test.adjusted < SIGNIFICANT else " "
    return f"{signed(test.difference)} ({_p_equals(test.adjusted)}) {mark}"


def title(comparison: Comparison) -> str:
    """Dataset, users and seeds, and the protocol where there are several."""
    parts = [comparison.dataset, *([f"protocol {comparison.protocol}"] if comparison.protocol else [])]
    users = {row.get("users") for line in comparison.done for row in line.runs}
    if len(users) == 1 and None not in users:
        parts.append(f"{users.pop():,} users")
    seeds = comparison.seeds
    if len(seeds) > 1:
        parts.append(f"seeds {', '.join(map(str, seeds))} (mean ± standard deviation)")
    else:
        parts.append(f"seed {seeds[0]}" if seeds[0] is not None else "")
    return printable(" · ".join(part for part in parts if part), None)


def notes(comparison: Comparison) -> list[str]:
    """What the reader must know of the differences, one sentence or more each."""
    found: list[str] = []
    done, first, metric = comparison.done, comparison.first, comparison.metric
    if len(done) > 1 and metric is None:
        found.append("The models have no metric in common that could be compared by user.")
    if first is not None and metric is not None:
        differences = [line.difference for line in done if line.difference]
        tested = [test for test in differences if test.adjusted is not None]
        if tested:
            correction = f", corrected for {comparison.corrected} comparisons (Holm)" if comparison.corrected > 1 else ""
            of_area = metric == "auc"
            name, value = ("DeLong's test", "The area") if of_area else ("a two-sided sign-flip test", "A user's value")
            averaged = f" {value} is averaged over the seeds first." if len(comparison.finished_seeds) > 1 else ""
            found.append(
                f"* p < .05. Differences in {metric} to {first.label} are paired by user; p is from {name}"
                f"{correction}.{averaged} It speaks of other users, not of other training seeds."
            )
            source = "DeLong's" if of_area else f"bootstrap over users ({DRAWS:,} draws), not corrected"
            found.append(f"95 % interval: of the difference, {source}." + ("" if of_area else _EFFECT))
            if any(test.seeds < len(comparison.finished_seeds) for test in differences):
                found.append("Where a run failed, the difference is over the seeds that both models finished.")
        if len(tested) < len(differences):
            found.append(
                "no test: the two models' results by user are not at hand, or not of the same users and candidates."
            )
        failed_first = next((line for line in comparison.lines if not line.is_teacher), first)
        if failed_first is not first and not failed_first.runs:
            found.append(f"{failed_first.label} failed; the differences are to {first.label}.")
    found += [fused for line in done if (fused := _fused(line))]
    if any(line.runs[0].get("trained_parameters") is not None or line.minutes is not None for line in done):
        found.append("params: trained parameters. minutes: training and test.")
    return found


_EFFECT = " effect: the mean difference divided by the standard deviation of the users' differences."


def _fused(line: Line) -> str:
    """How much of each model a fused row has; of several seeds, from the least to the most."""
    chosen = [settings_of(run).get("fusion_weights") for run in line.runs]
    weights = [found for found in chosen if isinstance(found, Mapping) and found]
    if not weights:
        return ""
    shares = []
    for name in weights[0]:
        values = sorted(float(found.get(name, math.nan)) for found in weights)
        shares.append(f"{' to '.join(f'{value:.1f}' for value in dict.fromkeys((values[0], values[-1])))} {name}")
    return f"{line.label}: {' + '.join(shares)}, standardized scores, weights chosen on the validation set."


def failures(comparison: Comparison) -> list[str]:
    """One sentence for each run that failed."""
    several = len(comparison.seeds) > 1
    return [
        _failure(line.label, row, several)
        for line in comparison.lines
        for row in line.failures
    ]


def _failure(label: str, row: Row, several: bool) -> str:
    seed = f" (seed {row['seed']})" if several else ""
    return f"{label}{seed}  FAILED: {sentence(row['error'])}"


def name_with_seeds(line: Line, comparison: Comparison) -> str:
    """A line's name; how many of the seeds it has, where some are missing."""
    planned, finished = len(comparison.seeds), len(line.runs)
    return line.label if finished == planned else f"{line.label} ({finished} of {planned} seeds)"


# ---------------------------------------------------------------------------------------------------------------------
# The forms
# ---------------------------------------------------------------------------------------------------------------------


def _text(comparison: Comparison, width: int) -> str:
    page = [title(comparison)]
    if comparison.done:
        page += _blocks(*_columns(comparison), width)
    failed = [_wrap(text, width) for text in failures(comparison)]
    if failed:
        page.append("\n".join(failed))
    remarks = [_wrap(note, width) for note in notes(comparison)]
    if remarks:
        page.append("\n".join(remarks))
    return "\n\n".join(page)


def _blocks(names: _Column, metrics: Sequence[_Column], rest: list[_Column], width: int) -> list[str]:
    """Lay the columns out beside the models' names, in as many blocks as the page needs; ``rest`` stays together."""
    blocks: list[str] = []
    columns: list[_Column] = []
    for group in [*([column] for column in metrics), *([rest] if rest else [])]:
        block = _block(names, [*columns, *group])
        if columns and max(map(len, block.splitlines())) > width:
            blocks.append(_block(names, columns))
            columns, block = [], _block(names, group)
        columns += group
    return [*blocks, block]


def _block(names: _Column, columns: Sequence[_Column]) -> str:
    header, *body = tabulate(
        [[printable(cell) for cell in row] for row in _cells(names, columns)],
        tablefmt="plain",
        colalign=["left", *("right" for _ in columns)],
        disable_numparse=True,
        preserve_whitespace=True,  # a blank stands where another line has its mark of significance
    ).splitlines()
    return "\n".join([header, "-" * len(header), *(line.rstrip() for line in body)])


def _cells(names: _Column, columns: Sequence[_Column]) -> list[list[str]]:
    """Header and body."""
    columns = [names, *columns]
    return [[column.header for column in columns], *([column.cells[label] for column in columns] for label in names.cells)]


def _wrap(text: str, width: int) -> str:
    return textwrap.fill(printable(text, None), width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def _tabulated(comparison: Comparison, form: str) -> str:
    names, metrics, rest = _columns(comparison)
    header, *body = [[printable(cell, None).strip() for cell in row] for row in _cells(names, [*metrics, *rest])]
    if form == "pipe":
        header, *body = [[_in_markdown(cell) for cell in row] for row in (header, *body)]
    alignment = ["left", *("right" for _ in header[1:])]
    return tabulate(body, header, tablefmt=form, colalign=alignment, disable_numparse=True)


def _markdown(comparison: Comparison) -> str:
    parts = [f"**{_in_markdown(title(comparison))}**"]
    parts += [_tabulated(comparison, "pipe")] if comparison.done else []
    parts += [_in_markdown(printable(text, None)) for text in (*failures(comparison), *notes(comparison))]
    return "\n\n".join(parts)


def _in_markdown(text: str) -> str:
    """Text that stays text in Markdown: neither markup nor HTML nor the end of a cell."""
    return "".join(f"\\{character}" if character in "\\`*_[]<>|#~" else character for character in text)


def _latex(comparison: Comparison) -> str:
    """A ``tabular`` for the package booktabs; title and notes are comments before it."""
    remarks = [title(comparison), *failures(comparison), *notes(comparison)]
    parts = [f"% {printable(text, None)}" for text in remarks]
    parts += [_tabulated(comparison, "latex_booktabs").replace("±", r"$\pm$")] if comparison.done else []
    return "\n".join(parts)


def _csv(comparisons: Sequence[Comparison]) -> str:
    """One line per model and dataset, numbers in full; an empty cell is an unknown one."""
    metrics = list(dict.fromkeys(name for comparison in comparisons for name in comparison.metrics))
    of_metrics = [f"{name}{suffix}" for name in metrics for suffix in ("", " sd")]
    tests = ["compared metric", "compared with", "difference", "low", "high", "effect", "p", "p corrected", "comparisons"]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    head = ["dataset", "protocol", "model", "seeds", "users"]
    table.writerow([*head, *of_metrics, *tests, "trained_parameters", "minutes", "error"])
    for comparison in comparisons:
        for line in comparison.lines:
            seeds = " ".join(str(row["seed"]) for row in line.runs)
            cells: list[Any] = [comparison.dataset, comparison.protocol, line.label, seeds]
            cells.append(_same(str(row["users"]) for row in line.runs if row.get("users") is not None))
            for name in metrics:
                values = line.values(name)
                cells += [np.mean(values) if values else None, np.std(values, ddof=1) if len(values) > 1 else None]
            test, first = line.difference, comparison.first
            if test is None or first is None:
                cells += [None] * len(tests)
            else:
                cells += [comparison.metric, first.label, test.difference, test.low, test.high, test.effect]
                cells += [test.p_value, test.adjusted, comparison.corrected]
            cells += [line.runs[0].get("trained_parameters") if line.runs else None, line.minutes]
            cells.append("; ".join(dict.fromkeys(sentence(row["error"]) for row in line.failures)))
            table.writerow([_csv_cell(cell) for cell in cells])
    return text.getvalue().rstrip("\n")


def _csv_cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.9g}"
    text = printable(value, None)
    return f"'{text}" if text[:1] in ("=", "+", "@") else text  # a spreadsheet would take it for a formula


def _same(cells: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(cells))


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


def metric_cell(values: Sequence[float]) -> str:
    """A metric's value, or mean ± standard deviation over the seeds."""
    if not values:
        return "-"
    if len(values) == 1:
        return decimal(values[0])
    return f"{decimal(float(np.mean(values)))} ± {decimal(float(np.std(values, ddof=1)))}"


def decimal(value: float) -> str:
    """Four decimals without the leading zero: .3123, 1.0000; ``-`` for what is no number."""
    if not math.isfinite(value):
        return "-"
    text = f"{value:.4f}"
    return text[1:] if text.startswith("0.") else text


def signed(value: float, places: int = 4) -> str:
    """A number with its sign: +.0123."""
    text = f"{round(float(value), places) + 0.0:+.{places}f}"  # + 0.0 turns -0.0 into 0.0
    return text[0] + text[2:] if text[1:3] == "0." else text


def interval(difference: Difference | None) -> str:
    """The interval of a difference: [+.0012, +.0345]."""
    if difference is None or difference.low is None or difference.high is None:
        return "-"
    return f"[{signed(difference.low)}, {signed(difference.high)}]"


def effect(value: float | None) -> str:
    """An effect size: +.12."""
    return "-" if value is None else signed(value, 2)


def p_value(value: float) -> str:
    """A p value: .012, <.001."""
    return "<.001" if value < 0.001 else f"{value:.3f}".replace("0.", ".", 1)


def _p_equals(value: float) -> str:
    return f"p{p_value(value)}" if value < 0.001 else f"p={p_value(value)}"


def parameters(count: float | str | None) -> str:
    """Three digits and a unit: 950, 12.3k, 1.23M."""
    if count is None or isinstance(count, str):
        return count or "-"
    size = float(count)
    for unit in ("", "k", "M", "G"):
        # 999.5 would be printed as 1000 with three digits
        if size < 999.5 or unit == "G":
            break
        size /= 1000
    if not unit:
        return str(count)
    decimals = 2 if size < 9.995 else 1 if size < 99.95 else 0
    return f"{size:.{decimals}f}{unit}"


def minutes(value: float | None) -> str:
    """Minutes with one decimal: 12.3, <0.1."""
    if value is None:
        return "-"
    return "<0.1" if 0 < value < 0.05 else f"{value:.1f}"
