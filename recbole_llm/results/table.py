"""The table of results, in which the models are compared in pairs.

A row is one model trained with one seed, or the failure to train it: a mapping with

* ``model``, ``dataset``, ``seed``;
* ``role``: ``model``, or ``teacher`` for a model that was trained only to teach another;
* ``metrics`` (by RecBole's names), ``users`` (how many were evaluated), ``trained_parameters``, ``train_seconds``,
  ``eval_seconds``; ``valid_metric``, the one that models are chosen and compared by;
* ``test_set``: digest of users, targets and candidates; only rows with the same test set are tested in pairs;
* ``ranks`` and ``user_ids``: the rank of each target and its user, for the paired test. Where labels are
  judged, ``labels`` and ``values`` (what the model predicted of each user's item) in place of ``ranks``;
* ``error``: where the run failed, one sentence; of the above, such a row has model, dataset and seed alone.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tabulate import tabulate

from recbole_llm.errors import printable
from recbole_llm.evaluation.ranking import is_per_user, per_user, split_metric
from recbole_llm.evaluation.significance import auc_test, holm, paired_test

Row = Mapping[str, Any]

SIGNIFICANT = 0.05

TEACHER = " (teacher)"  # suffix of the name of a model that was trained only to teach another


@dataclass
class _Line:
    """One line of the table: the runs of one model with different seeds."""

    label: str
    is_teacher: bool
    runs: list[Row] = field(default_factory=list)
    failures: list[Row] = field(default_factory=list)

    @property
    def by_seed(self) -> dict[Any, Row]:
        return {row["seed"]: row for row in self.runs}


@dataclass
class _Column:
    header: str
    cells: dict[str, str]  # by the label of the line


def label_of(row: Row) -> str:
    """The name under which a row is reported: a teacher differs from the same model run in its own right."""
    return f"{row['model']}{TEACHER}" if row.get("role") == "teacher" else str(row["model"])


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


def format_table(rows: Sequence[Row], valid_metric: str | None = None, width: int = 120) -> str:
    """Lay the rows out as a plain-text table, one line per model.

    Several seeds give mean ± standard deviation over the seeds. The difference to the first model is taken in
    ``valid_metric`` over the same users (a user's value is first averaged over the seeds that both models have), with
    the p value of a test in pairs (:mod:`recbole_llm.evaluation.significance`), after Holm's
    correction for the number of comparisons.
    That test takes the trained models as given: what other seeds would give shows in the standard deviation.

    Args:
        rows: see the module; several datasets give one table each.
        valid_metric: such as ``ndcg@10``; default: the rows' own, else their first metric.
        width: of the page, in characters; a table with more columns goes on below itself.

    Returns:
        the table, without a newline at its end.
    """
    datasets = dict.fromkeys(row["dataset"] for row in rows)
    return "\n\n".join(
        _format_dataset([row for row in rows if row["dataset"] == dataset], valid_metric, width) for dataset in datasets
    )


def _format_dataset(rows: Sequence[Row], valid_metric: str | None, width: int) -> str:
    lines = _lines(rows)
    done = [line for line in lines if line.runs]
    page = [_title(rows, done)]
    notes: list[str] = []
    if done:
        names = _Column("model", {line.label: _name_with_seeds(line, rows) for line in done})
        metrics = [
            _Column(name, {line.label: _metric_cell(line, name) for line in done}) for name in _metric_names(done)
        ]
        if len({row.get("users") for line in done for row in line.runs}) > 1:
            cells = {line.label: _same(str(row.get("users", "-")) for row in line.runs) for line in done}
            metrics.insert(0, _Column("users", cells))
        rest = _difference_column(lines, valid_metric, notes) + [
            _Column("params", {line.label: _parameters(line.runs[0]) for line in done}),
            _Column("minutes", {line.label: _minutes(line.runs) for line in done}),
        ]
        page += _blocks(names, metrics, rest, width)
        notes.append("params: trained parameters. minutes: training and test.")
    failures = [
        _wrap(f"{line.label}{_seed_of(row, rows)}  FAILED: {sentence(row['error'])}", width)
        for line in lines
        for row in line.failures
    ]
    if failures:
        page.append("\n".join(failures))
    if notes:
        page.append("\n".join(_wrap(note, width) for note in notes))
    return "\n\n".join(page)


def _lines(rows: Sequence[Row]) -> list[_Line]:
    """Gather the rows by model, in order of appearance; a teacher that two models share is one."""
    lines: dict[str, _Line] = {}
    for row in rows:
        label, copy = label_of(row), 1
        while True:
            name = label if copy == 1 else f"{label} #{copy}"
            line = lines.setdefault(name, _Line(name, row.get("role") == "teacher"))
            if row.get("error"):
                line.failures.append(row)
                break
            other = line.by_seed.get(row["seed"])
            if other is None:
                line.runs.append(row)
            if other is None or other["metrics"] == row["metrics"]:
                break
            copy += 1  # the same name and seed, another result: a teacher with other settings
    return list(lines.values())


def _title(rows: Sequence[Row], done: Sequence[_Line]) -> str:
    parts = [str(rows[0]["dataset"])]
    users = {row.get("users") for line in done for row in line.runs}
    if len(users) == 1 and None not in users:
        parts.append(f"{users.pop():,} users")
    seeds = _seeds(rows)
    if len(seeds) > 1:
        parts.append(f"seeds {', '.join(map(str, seeds))} (mean ± standard deviation)")
    else:
        parts.append(f"seed {seeds[0]}")
    return printable(" · ".join(parts), None)


def _seeds(rows: Sequence[Row]) -> list[Any]:
    return list(dict.fromkeys(row["seed"] for row in rows))


def _name_with_seeds(line: _Line, rows: Sequence[Row]) -> str:
    planned, finished = len(_seeds(rows)), len(line.runs)
    return line.label if finished == planned else f"{line.label} ({finished} of {planned} seeds)"


def _seed_of(row: Row, rows: Sequence[Row]) -> str:
    return f" (seed {row['seed']})" if len(_seeds(rows)) > 1 else ""


def _metric_names(lines: Sequence[_Line]) -> list[str]:
    return list(dict.fromkeys(name for line in lines for row in line.runs for name in row["metrics"]))


def _metric_cell(line: _Line, name: str) -> str:
    values = [row["metrics"][name] for row in line.runs if row["metrics"].get(name) is not None]
    if not values or not all(math.isfinite(value) for value in values):
        return "-"
    if len(values) == 1:
        return _decimal(values[0])
    return f"{_decimal(np.mean(values))} ± {_decimal(np.std(values, ddof=1))}"


# --- the difference to the first model


def _difference_column(lines: Sequence[_Line], valid_metric: str | None, notes: list[str]) -> list[_Column]:
    """The column of differences (none where nothing can be compared); what the reader must know goes to ``notes``."""
    done = [line for line in lines if line.runs]
    if len(done) < 2:
        return []
    first = next((line for line in done if not line.is_teacher), done[0])
    metric = _compared_metric(done, valid_metric)
    if metric is None:
        notes.append("The models have no metric in common that could be compared by user.")
        return []
    tests = {line.label: _compare(line, first, metric) for line in done if line is not first}
    adjusted = holm({label: test["p_value"] for label, test in tests.items() if test and "p_value" in test})
    cells = {first.label: "-"}
    for label, test in tests.items():
        if test is None:
            cells[label] = "-"
        elif label in adjusted:
            mark = "*" if adjusted[label] < SIGNIFICANT else " "
            cells[label] = f"{_signed(test['difference'])} ({_p_value(adjusted[label])}) {mark}"
        else:
            cells[label] = f"{_signed(test['difference'])} (no test)  "
    if adjusted:
        correction = f", corrected for {len(adjusted)} comparisons (Holm)" if len(adjusted) > 1 else ""
        name, value = ("DeLong's test", "The area") if metric == "auc" else ("a two-sided sign-flip test", "A user's value")
        averaged = f" {value} is averaged over the seeds first." if len(_seeds_of(done)) > 1 else ""
        notes.append(
            f"* p < .05. Differences in {metric} to {first.label} are paired by user; p is from {name}"
            f"{correction}.{averaged} It speaks of other users, not of other training seeds."
        )
        if any(test and test["seeds"] < len(_seeds_of(done)) for test in tests.values()):
            notes.append("Where a run failed, the difference is over the seeds that both models finished.")
    if any(test and "p_value" not in test for test in tests.values()):
        notes.append("no test: the two models' results by user are not at hand, or not of the same users and candidates.")
    failed_first = next((line for line in lines if not line.is_teacher), first)
    if failed_first is not first:
        notes.append(f"{failed_first.label} failed; the differences are to {first.label}.")
    return [_Column(f"{metric} vs {first.label}", cells)]


def _seeds_of(lines: Iterable[_Line]) -> list[Any]:
    return _seeds([row for line in lines for row in line.runs])


def _compared_metric(done: Sequence[_Line], valid_metric: str | None) -> str | None:
    common = [name for name in _metric_names(done) if all(name in row["metrics"] for line in done for row in line.runs)]
    names = [name for name in common if name == "auc" or is_per_user(name)]
    wanted = valid_metric or next((row["valid_metric"] for row in done[0].runs if row.get("valid_metric")), "")
    return wanted.lower() if wanted.lower() in names else next(iter(names), None)


def _compare(line: _Line, first: _Line, metric: str) -> dict[str, float] | None:
    """Test a line against the first: None without a common seed, no p value without a common test set."""
    seeds = [seed for seed in line.by_seed if seed in first.by_seed]
    if not seeds:
        return None
    runs = [[other.by_seed[seed] for seed in seeds] for other in (line, first)]
    same = all(mine.get("test_set") == theirs.get("test_set") for mine, theirs in zip(*runs, strict=True))
    if same and metric == "auc" and _same_labels(runs[0] + runs[1]):
        return {**auc_test(runs[0][0]["labels"], *([row["values"] for row in part] for part in runs)), "seeds": len(seeds)}
    mine, theirs = (_user_values(part, metric) for part in runs)
    if not same or mine is None or theirs is None or not np.array_equal(mine[0], theirs[0]):
        means = [np.mean([row["metrics"][metric] for row in part]) for part in runs]
        return {"difference": float(means[0] - means[1]), "seeds": len(seeds)}
    return {**paired_test(mine[1], theirs[1]), "seeds": len(seeds)}


def _same_labels(runs: Sequence[Row]) -> bool:
    """Whether the runs judged the same users' labels, of which there are enough of both kinds to test."""
    labels: list[Any] = [row.get("labels") for row in runs]
    if labels[0] is None or np.bincount(labels[0], minlength=2).min() < 2:
        return False
    same_users = all(np.array_equal(row["user_ids"], runs[0]["user_ids"]) for row in runs)
    return same_users and all(np.array_equal(other, labels[0]) for other in labels)


def _user_values(runs: Sequence[Row], metric: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Average a metric by user: over the user's rows, then over the seeds, which are no independent observations.

    Returns:
        ids: ``[users]`` sorted, and values: ``[users]``; None where the runs lack ranks or differ in users.
    """
    values = []
    users: Any = None
    for row in runs:
        ranks = row.get("ranks")
        if ranks is None:
            return None
        by_row = per_user(np.asarray(ranks), *split_metric(metric))
        ids = row.get("user_ids")
        ids = np.arange(len(by_row)) if ids is None else np.asarray(ids)
        distinct, place, count = np.unique(ids, return_inverse=True, return_counts=True)
        if users is not None and not np.array_equal(users, distinct):
            return None
        users = distinct
        values.append(np.bincount(place.ravel(), weights=by_row) / count)
    return users, np.mean(values, axis=0)


# --- layout

def _blocks(names: _Column, metrics: Sequence[_Column], rest: list[_Column], width: int) -> list[str]:
    """Lay the columns out beside the models' names, in as many blocks as the page needs; ``rest`` stays together."""
    blocks: list[str] = []
    columns: list[_Column] = []
    for group in [*([column] for column in metrics), rest]:
        block = _block(names, [*columns, *group])
        if columns and max(map(len, block.splitlines())) > width:
            blocks.append(_block(names, columns))
            columns, block = [], _block(names, group)
        columns += group
    return [*blocks, block]


def _block(names: _Column, columns: Sequence[_Column]) -> str:
    columns = [names, *columns]
    rows = [[column.header for column in columns], *([column.cells[label] for column in columns] for label in names.cells)]
    header, *body = tabulate(
        [[printable(cell) for cell in row] for row in rows],
        tablefmt="plain",
        colalign=["left", *("right" for _ in columns[1:])],
        disable_numparse=True,
        preserve_whitespace=True,  # a blank stands where another line has its mark of significance
    ).splitlines()
    return "\n".join([header, "-" * len(header), *(line.rstrip() for line in body)])


def _wrap(text: str, width: int) -> str:
    return textwrap.fill(printable(text, None), width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def sentence(text: Any) -> str:
    """An error message as one line."""
    return " ".join(printable(" ".join(str(text).split()), 2000).split())


def _same(cells: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(cells))


# --- numbers


def _decimal(value: float) -> str:
    """Four decimals without the leading zero: .3123, 1.0000."""
    text = f"{value:.4f}"
    return text[1:] if text.startswith("0.") else text


def _signed(value: float) -> str:
    text = f"{round(float(value), 4) + 0.0:+.4f}"  # + 0.0 turns -0.0 into 0.0
    return text[0] + text[2:] if text[1:3] == "0." else text


def _p_value(value: float) -> str:
    if value < 0.001:
        return "p<.001"
    return f"p={value:.3f}".replace("0.", ".")


def _parameters(row: Row) -> str:
    """Three digits and a unit: 950, 12.3k, 1.23M."""
    count = row.get("trained_parameters")
    if count is None:
        return "-"
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


def _minutes(runs: Sequence[Row]) -> str:
    """Training and test of one run, the mean over the runs."""
    totals = [row["train_seconds"] + row["eval_seconds"] for row in runs if _has_times(row)]
    if not totals:
        return "-"
    minutes = float(np.mean(totals)) / 60
    return "<0.1" if 0 < minutes < 0.05 else f"{minutes:.1f}"


def _has_times(row: Row) -> bool:
    return all(row.get(key) is not None and math.isfinite(row[key]) for key in ("train_seconds", "eval_seconds"))
