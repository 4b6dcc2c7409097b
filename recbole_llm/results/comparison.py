"""The models of some rows compared in pairs: what every form of the table and the report show.

A row is one model trained with one seed, or the failure to train it: a mapping with

* ``model`` (or the name of a variant, such as ``LLMSTAR:plain``), ``dataset``, ``seed``;
* ``role``: ``model``, or ``teacher`` for a model that was trained only to teach another;
* ``metrics`` (by RecBole's names), ``users`` (how many were evaluated), ``trained_parameters``, ``train_seconds``,
  ``eval_seconds``; ``valid_metric``, the one that models are chosen and compared by;
* ``test_set``: digest of users, targets and candidates; only rows with the same test set are tested in pairs;
* ``record``: of its run folder (:mod:`recbole_llm.results.run`); by its settings, rows of one model are told apart;
* ``ranks`` and ``user_ids``: the rank of each target and its user, for the paired test. Where labels are
  judged, ``labels`` and ``values`` (what the model predicted of each user's item) in place of ``ranks``;
* ``error``: where the run failed, one sentence; of the above, such a row has model, dataset and seed alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from recbole_llm.config.schema import recbole_keys, shared_schema
from recbole_llm.errors import printable
from recbole_llm.evaluation.intervals import effect_size, mean_interval
from recbole_llm.evaluation.ranking import is_per_user, per_user, split_metric
from recbole_llm.evaluation.significance import auc_test, holm, paired_test

Row = Mapping[str, Any]

SIGNIFICANT = 0.05

TEACHER = " (teacher)"  # suffix of the name of a model that was trained only to teach another

_MOST_KEYS = 3  # that tell one line from another in its name
_LONGEST_VALUE = 24
_RESULTS_BY_USER = ("ranks", "labels", "values", "user_ids")


@dataclass(frozen=True)
class Difference:
    """A line against the first one, in one metric, over the same users.

    Attributes:
        difference: of the means.
        low, high: 95 % interval of the difference; None where the results by user are not at hand.
        effect: see :func:`recbole_llm.evaluation.intervals.effect_size`; None for an area, which no user has.
        p_value: two-sided; None where nothing could be tested.
        adjusted: the same after Holm's correction for the number of comparisons.
        seeds: over how many that both lines have.
    """

    difference: float
    seeds: int
    low: float | None = None
    high: float | None = None
    effect: float | None = None
    p_value: float | None = None
    adjusted: float | None = None


@dataclass
class Line:
    """The runs of one model, and of one choice of its settings, with different seeds.

    Attributes:
        label: its name in the table.
        is_teacher: whether the model was trained only to teach another.
        runs: rows that succeeded.
        failures: rows that did not.
        difference: to the first line of the comparison; None for that one, and where nothing can be compared.
    """

    label: str
    is_teacher: bool
    runs: list[Row] = field(default_factory=list)
    failures: list[Row] = field(default_factory=list)
    difference: Difference | None = None

    @property
    def by_seed(self) -> dict[Any, Row]:
        return {row["seed"]: row for row in self.runs}

    def values(self, metric: str) -> list[float]:
        """The finite values of a metric, one per run; empty if one of them is none."""
        values = [row["metrics"][metric] for row in self.runs if row["metrics"].get(metric) is not None]
        return values if all(math.isfinite(value) for value in values) else []

    @property
    def minutes(self) -> float | None:
        """Training and test of one run, the mean over the runs; None where no run has its times."""
        totals = [row["train_seconds"] + row["eval_seconds"] for row in self.runs if _has_times(row)]
        return float(np.mean(totals)) / 60 if totals else None


@dataclass
class Comparison:
    """The models of one dataset and protocol.

    Attributes:
        dataset: its name.
        protocol: None where all rows of the dataset have the same.
        lines: one per model, those that failed too.
        first: the line that the others are compared with; None where there is nothing to compare.
        metric: in which they are; None where they have none in common.
        corrected: how many comparisons the p values are corrected for.
        seeds: of all rows.
    """

    dataset: str
    protocol: str | None
    lines: list[Line]
    first: Line | None
    metric: str | None
    corrected: int
    seeds: list[Any]

    @property
    def done(self) -> list[Line]:
        return [line for line in self.lines if line.runs]

    @property
    def metrics(self) -> list[str]:
        """Of all lines, in order of appearance."""
        return list(dict.fromkeys(name for line in self.lines for row in line.runs for name in row["metrics"]))

    @property
    def finished_seeds(self) -> list[Any]:
        return list(dict.fromkeys(row["seed"] for line in self.lines for row in line.runs))


def label_of(row: Row) -> str:
    """The name under which a row is reported: a teacher differs from the same model run in its own right."""
    return f"{row['model']}{TEACHER}" if row.get("role") == "teacher" else str(row["model"])


def sentence(text: Any) -> str:
    """An error message as one line."""
    return " ".join(printable(" ".join(str(text).split()), 2000).split())


def settings_of(row: Row) -> Mapping[str, Any]:
    """The resolved settings of a row's run; empty where they are not known."""
    settings = (row.get("record") or {}).get("settings")
    return settings if isinstance(settings, Mapping) else {}


def compare_rows(rows: Sequence[Row], valid_metric: str | None = None) -> list[Comparison]:
    """Compare the models of each dataset, and of each protocol of it, with the first of its models.

    A user's value is first averaged over the seeds that both models have. The tests take the trained models as given: what
    other seeds would give shows in the standard deviation over seeds.

    Args:
        rows: see the module. Rows of one run count once, and so does a teacher that is also a model of its own.
        valid_metric: such as ``ndcg@10``; default: the rows' own, else their first metric.
    """
    return [_compare_group(group, protocol, valid_metric) for protocol, group in groups_of(rows)]


def groups_of(rows: Sequence[Row]) -> list[tuple[str | None, list[Row]]]:
    """The distinct rows by dataset and protocol, in order of appearance; the protocol is None where a dataset has one only."""
    protocols: dict[str, list[str]] = {}
    for row in rows:
        known = protocols.setdefault(row["dataset"], [])
        if (protocol := _protocol(row)) is not None and protocol not in known:
            known.append(protocol)
    groups: dict[tuple[str, str | None], list[Row]] = {}
    for row in rows:
        known = protocols[row["dataset"]]
        # a run that does not say its protocol stands beside those of the only one
        protocol = known[0] if len(known) == 1 else _protocol(row)
        groups.setdefault((row["dataset"], protocol), []).append(row)
    return [
        (protocol if len(protocols[dataset]) > 1 else None, _distinct(group)) for (dataset, protocol), group in groups.items()
    ]


def _protocol(row: Row) -> str | None:
    protocol = (row.get("record") or {}).get("protocol")
    return str(protocol) if protocol else None


def _compare_group(rows: Sequence[Row], protocol: str | None, valid_metric: str | None) -> Comparison:
    lines = _lines(rows)
    done = [line for line in lines if line.runs]
    first = metric = None
    corrected = 0
    if len(done) > 1:
        first = next((line for line in done if not line.is_teacher), done[0])
        metric = _compared_metric(done, valid_metric)
    if first is not None and metric is not None:
        found = {line.label: _compare(line, first, metric) for line in done if line is not first}
        p_values = {label: test.p_value for label, test in found.items() if test and test.p_value is not None}
        adjusted = holm(p_values)
        corrected = len(adjusted)
        for line in done:
            test = found.get(line.label)
            if test is not None:
                line.difference = Difference(**{**vars(test), "adjusted": adjusted.get(line.label)})
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    return Comparison(str(rows[0]["dataset"]), protocol, lines, first, metric, corrected, seeds)


# ---------------------------------------------------------------------------------------------------------------------
# Which rows are of one run, and of one line
# ---------------------------------------------------------------------------------------------------------------------


def _distinct(rows: Sequence[Row]) -> list[Row]:
    """The rows without those of a run that another row reports: the same file twice, or a teacher that is a model, too."""
    kept: list[Row] = []
    for row in rows:
        place = next((place for place, other in enumerate(kept) if _same_run(row, other)), None)
        if place is None:
            kept.append(row)
            continue
        other = kept[place]
        missing = {name: row[name] for name in _RESULTS_BY_USER if other.get(name) is None and row.get(name) is not None}
        role = "teacher" if other.get("role") == row.get("role") == "teacher" else "model"
        if missing or role != (other.get("role") or "model"):
            kept[place] = {**other, **missing, "role": role}
    return kept


def _same_run(a: Row, b: Row) -> bool:
    if a.get("error") or b.get("error"):
        return False
    if (a["model"], a["seed"]) != (b["model"], b["seed"]):
        return False
    if _digits(a) != _digits(b) or a.get("test_set") != b.get("test_set") or a.get("users") != b.get("users"):
        return False
    sizes = {row["trained_parameters"] for row in (a, b) if row.get("trained_parameters") is not None}
    if len(sizes) > 1:
        return False
    ranks = [np.sort(row["ranks"]) for row in (a, b) if row.get("ranks") is not None]
    if len(ranks) == 2 and not np.array_equal(ranks[0], ranks[1]):
        return False
    if (a.get("role") == "teacher") != (b.get("role") == "teacher"):
        return True
    told = [_told(row) for row in (a, b) if settings_of(row)]
    return len(told) < 2 or told[0] == told[1]


def _digits(row: Row) -> dict[str, str]:
    return {name: "-" if value is None else f"{value:.9g}" for name, value in row["metrics"].items()}


@cache
def _silent_keys() -> frozenset[str]:
    """Keys that do not tell one model from another: time, memory and output alone, and the seed."""
    groups = [recbole_keys(), *shared_schema().values()]
    marked = {name for keys in groups for name, key in keys.items() if key.mark in ("cost", "output")}
    # A fused row's weights are chosen for each seed anew, and its models are named by its label.
    return frozenset({*marked, "seed", "model", "dataset", "fusion_weights", "fusion_runs"})


def _told(row: Row) -> dict[str, Any]:
    """The settings of a row that may tell it from others of its model."""
    return {name: value for name, value in settings_of(row).items() if name not in _silent_keys()}


def differing_keys(rows: Sequence[Row]) -> list[str]:
    """The settings in which some rows differ, those that only cost time or memory, and the seed, left out.

    Args:
        rows: those whose settings are not known are passed over.
    """
    told = [_told(row) for row in rows if settings_of(row)]
    names = dict.fromkeys(name for settings in told for name in settings)
    return [name for name in names if any(settings.get(name) != told[0].get(name) for settings in told)]


def line_names(rows: Sequence[Row]) -> list[str]:
    """For each row of one dataset and protocol its model's name, with the settings that tell it from others of that name."""
    differing = {label: differing_keys([row for row in rows if label_of(row) == label]) for label in set(map(label_of, rows))}
    return [_name(row, label_of(row), differing[label_of(row)]) for row in rows]


def _lines(rows: Sequence[Row]) -> list[Line]:
    """Gather the rows by model and by the settings in which its rows differ, in order of appearance."""
    lines: dict[str, Line] = {}
    for name, row in zip(line_names(rows), rows, strict=True):
        copy = 1
        while True:
            # the same name and seed, another result: runs whose settings are not known
            line = lines.setdefault(
                name if copy == 1 else f"{name} #{copy}",
                Line(name if copy == 1 else f"{name} #{copy}", row.get("role") == "teacher"),
            )
            if row.get("error"):
                line.failures.append(row)
                break
            if row["seed"] not in line.by_seed:
                line.runs.append(row)
                break
            copy += 1
    return list(lines.values())


def _name(row: Row, label: str, keys: Sequence[str]) -> str:
    """A model's name with the settings that tell it from others of that name: ``LLMSTAR beta=0``."""
    settings = settings_of(row)
    if not settings or not keys:
        return label
    shown = [f"{key}={short_value(settings.get(key))}" for key in keys[:_MOST_KEYS]]
    if len(keys) > _MOST_KEYS:
        shown.append(f"and {len(keys) - _MOST_KEYS} more")
    return f"{label} {' '.join(shown)}"


def short_value(value: Any) -> str:
    """A setting as a short word."""
    if value is None:
        return "none"
    text = str(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


# ---------------------------------------------------------------------------------------------------------------------
# Tests in pairs
# ---------------------------------------------------------------------------------------------------------------------


def _compared_metric(done: Sequence[Line], valid_metric: str | None) -> str | None:
    runs = [row for line in done for row in line.runs]
    common = [name for name in runs[0]["metrics"] if all(name in row["metrics"] for row in runs)]
    names = [name for name in common if name == "auc" or is_per_user(name)]
    wanted = valid_metric or next((row["valid_metric"] for row in done[0].runs if row.get("valid_metric")), "")
    return wanted.lower() if wanted.lower() in names else next(iter(names), None)


def _compare(line: Line, first: Line, metric: str) -> Difference | None:
    """Test a line against the first: None without a common seed, no p value without a common test set."""
    seeds = [seed for seed in line.by_seed if seed in first.by_seed]
    if not seeds:
        return None
    runs = [[other.by_seed[seed] for seed in seeds] for other in (line, first)]
    same = all(mine.get("test_set") == theirs.get("test_set") for mine, theirs in zip(*runs, strict=True))
    if same and metric == "auc" and _same_labels(runs[0] + runs[1]):
        test = auc_test(runs[0][0]["labels"], *([row["values"] for row in part] for part in runs))
        return Difference(test["difference"], len(seeds), test["low"], test["high"], None, test["p_value"])
    mine, theirs = (user_values(part, metric) for part in runs)
    if not same or mine is None or theirs is None or not np.array_equal(mine[0], theirs[0]):
        means = [np.mean([row["metrics"][metric] for row in part]) for part in runs]
        return Difference(float(means[0] - means[1]), len(seeds))
    test, differences = paired_test(mine[1], theirs[1]), mine[1] - theirs[1]
    low, high = mean_interval(differences)
    return Difference(test["difference"], len(seeds), low, high, effect_size(differences), test["p_value"])


def _same_labels(runs: Sequence[Row]) -> bool:
    """Whether the runs judged the same users' labels, of which there are enough of both kinds to test."""
    labels: list[Any] = [row.get("labels") for row in runs]
    if labels[0] is None or np.bincount(labels[0], minlength=2).min() < 2:
        return False
    same_users = all(np.array_equal(row["user_ids"], runs[0]["user_ids"]) for row in runs)
    return same_users and all(np.array_equal(other, labels[0]) for other in labels)


def user_values(runs: Iterable[Row], metric: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Average a metric by user: over the user's rows, then over the seeds, which are no independent observations.

    Returns:
        ids: ``[users]`` sorted, and values: ``[users]``; None where the runs lack ranks or differ in users.
    """
    values = []
    users: Any = None
    for row in runs:
        ranks = row.get("ranks")
        if ranks is None or not is_per_user(metric):
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


def _has_times(row: Row) -> bool:
    return all(row.get(key) is not None and math.isfinite(row[key]) for key in ("train_seconds", "eval_seconds"))
