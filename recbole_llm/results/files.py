"""Write the results of runs to files and read them back: JSON for programs, results by user for further tests.

Rows are those of :mod:`recbole_llm.results.comparison`; the JSON is the list of the runs' records, see
:mod:`recbole_llm.results.run`.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recbole_llm.errors import UserError
from recbole_llm.evaluation.ranking import is_per_user, per_user, split_metric
from recbole_llm.files import is_writable, regular_file, replace_text
from recbole_llm.results.comparison import TEACHER, Row, label_of, sentence
from recbole_llm.results.run import FIELDS, FORMAT, VERSION, checked_record, plain, row_of

# What earlier versions wrote of each run; such files are still read.
EARLIER_KEYS = (
    "model", "dataset", "seed", "metrics", "valid_metric", "users", "test_set", "trained_parameters", "train_seconds",
    "eval_seconds",
)  # fmt: skip

_HEAD = "model\tseed\tuser\t"  # of a file of results by user


# How the files begin that are written, by the key that names them.
_BEGINNINGS = {"results_file": b"[", "per_user_file": b"model\tseed\tuser", "output": b"<!DOCTYPE html>"}


def write_json(rows: Sequence[Row], file: str | Path) -> None:
    """Write the rows as a JSON list of the runs' records, each with ``label`` (the name in the table), ``role`` and ``folder``.

    A run that failed has ``error`` and what names it alone. A value that is missing, infinite or no number is null.

    Raises:
        UserError: the file cannot be written. An older file of that name is then left whole.
    """
    records = [plain(_labeled_record(row)) for row in rows]
    write_text(file, json.dumps(records, indent=2, allow_nan=False, ensure_ascii=False) + "\n", "results_file")


def _labeled_record(row: Row) -> dict[str, Any]:
    """What the JSON says of a row."""
    label, role = str(row["model"]), row.get("role", "model")
    names = {"format": FORMAT, "version": VERSION, "label": label, "role": role, "folder": row.get("checkpoint")}
    if row.get("error"):
        named = {"model": label.partition(":")[0], "dataset": row["dataset"], "seed": row["seed"]}
        protocol = (row.get("record") or {}).get("protocol")
        return {**names, **named, **({"protocol": protocol} if protocol else {}), "error": sentence(row["error"])}
    if row.get("record"):
        return {**names, **row["record"]}
    empty: dict[str, Any] = {name: {} if kinds == (dict,) else None for name, kinds in FIELDS.items()}
    of_row = {key: row.get(key) for key in ("dataset", "seed", "users", "trained_parameters", "test_set", "valid_metric")}
    seconds = {"train": row.get("train_seconds"), "evaluate": row.get("eval_seconds")}
    metrics = {"valid": {}, "test": dict(row.get("metrics") or {})}
    return {**empty, **names, **of_row, "model": label.partition(":")[0], "seconds": seconds, "metrics": metrics}


def write_per_user(rows: Sequence[Row], file: str | Path) -> None:
    """Write one line per model, seed and evaluated row: model, seed, user, rank and the value of each metric, by tabs.

    Where labels are judged, a line has model, seed, user, label (1: liked) and the value that the model predicted. Where the
    rows are of several protocols, the last column names each line's. Runs that failed have no lines.

    Raises:
        UserError: the file cannot be written. An older file of that name is then left whole.
    """
    done = [row for row in rows if not row.get("error") and row.get("ranks") is not None]
    judged = [row for row in rows if not row.get("error") and row.get("labels") is not None]
    names = list(dict.fromkeys(name for row in done for name in row["metrics"] if is_per_user(name)))
    text = io.StringIO()
    table = csv.writer(text, delimiter="\t", lineterminator="\n")
    several = len({_protocol(row) for row in (*done, *judged)}) > 1
    head = ["model", "seed", "user", *(["label", "value"] if judged else ["rank", *names])]
    table.writerow([*head, "protocol"] if several else head)
    for row in judged:
        for user, label, value in zip(row["user_ids"], row["labels"], row["values"], strict=True):
            line = [label_of(row), row["seed"], user, label, f"{value:.9g}"]
            table.writerow([*line, _protocol(row)] if several else line)
    for row in done:
        ranks = np.asarray(row["ranks"])
        values = [per_user(ranks, *split_metric(name)).tolist() if name in row["metrics"] else None for name in names]
        columns = [[""] * len(ranks) if column is None else [f"{value:.6g}" for value in column] for column in values]
        users = range(len(ranks)) if row.get("user_ids") is None else row["user_ids"]
        for user, rank, *cells in zip(users, ranks.tolist(), *columns, strict=True):
            line = [label_of(row), row["seed"], user, rank, *cells]
            table.writerow([*line, _protocol(row)] if several else line)
    write_text(file, text.getvalue(), "per_user_file")


def _protocol(row: Row) -> str | None:
    return (row.get("record") or {}).get("protocol")


def read_rows(files: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Read the rows of separate runs, for one table of them all.

    Args:
        files: of :func:`write_json`, and, for tests in pairs, of :func:`write_per_user`; told apart by what they hold.

    Returns:
        the rows in the order of the files; those whose per-user results are at hand have them.

    Raises:
        UserError: a file that is missing or something else, or per-user results of a run that no file reports.
    """
    rows: list[dict[str, Any]] = []
    by_user: list[tuple[Path, dict[str, Any]]] = []
    for file in map(Path, files):
        text = read_text(file)
        if is_users_results(text):
            by_user += [(file, run) for run in _runs_by_user(file, text)]
        else:
            rows += _reported(file, text)
    for file, run in by_user:
        _add_users_results(rows, run, file)
    return rows


def add_users_results(rows: list[dict[str, Any]], file: str | Path) -> None:
    """Add the results by user in a file of :func:`write_per_user` to the rows that they are of.

    Raises:
        UserError: the file is missing or something else, or has results of a run that no row reports.
    """
    for run in _runs_by_user(Path(file), read_text(file)):
        _add_users_results(rows, run, Path(file))


def _add_users_results(rows: list[dict[str, Any]], run: Mapping[str, Any], file: Path) -> None:
    owners = [row for row in rows if _belongs(run, row)]
    if not owners:
        raise UserError(
            f"{file}: its results of {run['label']} (seed {run['seed']}) are of none of the runs at hand; give the "
            f"results_file of that run too."
        )
    for row in owners:
        row.update({key: run[key] for key in run.keys() & {"user_ids", "ranks", "labels", "values"}})


def read_text(file: str | Path) -> str:
    """The text of a file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({getattr(error, 'strerror', None) or 'it is no text'}).") from None


def is_users_results(text: str) -> bool:
    """Whether a text is a file of :func:`write_per_user`."""
    return text.startswith(_HEAD)


def check_outputs(
    files: Mapping[str, str | Path | None],
    inputs: Mapping[str, str | Path | None] | None = None,
    folders: Mapping[str, str | Path] | None = None,
) -> None:
    """Refuse files that cannot be written, or must not be, before anything is trained for them.

    A file that is there already is replaced only where it holds what is written to it: nobody loses a data set, a
    configuration or a checkpoint by a slip of the keyboard. Links are followed.

    Args:
        files: ``results_file`` and ``per_user_file``, by these keys; None: not written.
        inputs: other files of the run, by their keys.
        folders: that the run makes, by what they are of.

    Raises:
        UserError: naming the key, the file and the remedy.
    """
    places = {os.path.realpath(file): key for key, file in (inputs or {}).items() if file}
    for key, file in files.items():
        if not file:
            continue
        check_writable(file, key)
        place = os.path.realpath(file)
        if place in places:
            raise UserError(f"{key}: {file} is the file of {places[place]} too; name another.")
        places[place] = key
        for name, folder in (folders or {}).items():
            if Path(os.path.realpath(folder)).is_relative_to(place):
                raise UserError(f"{key}: {file} is to be a folder, that of {name}; name another.")


def check_writable(
    file: str | Path, key: str, what: str = "results", is_ours: Callable[[bytes], bool] | None = None
) -> None:
    """Refuse a file that cannot be written, or that holds something else than what is written to it.

    Args:
        file: links are followed.
        key: that names it.
        what: is written to it.
        is_ours: whether a file with this beginning holds that; default: as the key says.

    Raises:
        UserError: its folder cannot be made or is not writable, or there is a folder, a device or another file.
    """
    file = Path(file)
    if file.is_dir():
        raise UserError(f"{key}: {file} is a folder; name a file.")
    try:
        end = regular_file(file)
    except UserError:
        raise UserError(f"{key}: {file} is no regular file; name one.") from None
    folder = next(parent for parent in end.parents if os.path.lexists(parent))
    if not is_writable(folder):
        raise UserError(f"{key}: {file} cannot be written in {folder}; name a file in a folder of yours.")
    if end.exists():
        try:
            with open(end, "rb") as stream:
                beginning = stream.read(64)
        except OSError as error:
            raise UserError(f"{key}: {file} cannot be read ({error.strerror}); name another.") from None
        is_known = is_ours or (lambda start: start.startswith(_BEGINNINGS[key]))
        if beginning.strip() and not is_known(beginning.lstrip()):
            raise UserError(f"{key}: {file} holds something else than {what}, and is not replaced; name another file.")


def write_text(file: str | Path, text: str, key: str) -> None:
    """Write a text file in one step: a reader, or a crash, finds the old file or the new one, never a part."""
    file = Path(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, text)
    except OSError as error:
        raise UserError(
            f"{key}: {file} cannot be written ({error.strerror}); name a file in a folder of yours."
        ) from None


def _reported(file: Path, text: str) -> Iterator[dict[str, Any]]:
    """The rows of a file of :func:`write_json`."""
    try:
        records = json.loads(text)
    except (ValueError, RecursionError):
        records = None
    if not isinstance(records, list):
        raise UserError(f"{file} was not written by results_file or per_user_file.")
    for place, record in enumerate(records):
        if isinstance(record, dict) and record.get("format") == FORMAT:
            yield _row_of_record(record, f"{file}, run {place + 1}")
            continue
        if not _is_record(record):
            raise UserError(f"{file} was not written by results_file or per_user_file.")
        model, metrics = record["model"], record["metrics"]
        yield {
            **record,
            "model": model.removesuffix(TEACHER),
            "role": "teacher" if model.endswith(TEACHER) else "model",
            "metrics": {name: math.nan if value is None else value for name, value in metrics.items()},
        }


def _row_of_record(record: dict[str, Any], place: str) -> dict[str, Any]:
    """The row of one record in a file of :func:`write_json`.

    Raises:
        UserError: the record is damaged, or of a newer version.
    """
    names = [record.get("label"), record.get("role"), record.get("model"), record.get("dataset")]
    names += [record[key] for key in ("folder", "error", "protocol") if record.get(key) is not None]
    if not all(isinstance(name, str) and name.isprintable() for name in names):
        raise UserError(f"{place} is damaged: its label, role or folder is missing or no name.")
    if record.get("error") is not None:
        if not isinstance(record.get("seed"), int):
            raise UserError(f"{place} is damaged: its seed is missing or of another kind.")
        failed = {"model": record["label"], **{key: record[key] for key in ("dataset", "seed", "role", "error")}, "metrics": {}}
        return {**failed, "record": {"protocol": record["protocol"]}} if record.get("protocol") is not None else failed
    row = row_of(checked_record(record, place), record["label"])
    return row if record.get("folder") is None else {**row, "checkpoint": record["folder"]}


def _is_record(record: Any) -> bool:
    """Whether ``record`` is what an earlier version wrote of a run."""
    if not isinstance(record, dict) or not record.keys() >= set(EARLIER_KEYS) or not isinstance(record["metrics"], dict):
        return False
    numbers = [record[key] for key in ("users", "trained_parameters", "train_seconds", "eval_seconds")]
    texts = [record[key] for key in ("valid_metric", "test_set", "error") if record.get(key) is not None]
    texts += [record["model"], record["dataset"], *record["metrics"]]
    return (
        all(isinstance(text, str) and text.isprintable() for text in texts)
        and isinstance(record["seed"], int)
        and all(isinstance(number, (int, float, type(None))) for number in [*numbers, *record["metrics"].values()])
    )


def _runs_by_user(file: Path, text: str) -> Iterator[dict[str, Any]]:
    """The runs of a file of :func:`write_per_user`: ``label``, ``seed``, ``user_ids`` and ``ranks`` or labels and values."""
    lines = csv.DictReader(io.StringIO(text), delimiter="\t")
    kinds = {"rank": int} if "rank" in (lines.fieldnames or ()) else {"label": int, "value": float}
    runs: dict[tuple[str, int, str | None], list[list[Any]]] = {}
    try:
        for line in lines:
            values = [kind(line[name]) for name, kind in kinds.items()]
            run = line["model"], int(line["seed"]), line.get("protocol")
            runs.setdefault(run, []).append([line["user"], *values])
    except (KeyError, TypeError, ValueError, csv.Error):
        raise UserError(f"{file}, line {lines.line_num}: this is no line of a per_user_file.") from None
    for (label, seed, protocol), values in runs.items():
        columns = map(np.array, zip(*values, strict=True))
        names = {"label": label, "seed": seed, "protocol": protocol}
        yield {**names, **dict(zip(("user_ids", *(f"{kind}s" for kind in kinds)), columns, strict=True))}


def _belongs(run: Mapping[str, Any], row: Row) -> bool:
    """Whether per-user results are those of a row: of its model, seed and number of users, with its averages."""
    if run.get("protocol") not in (None, _protocol(row)):
        return False
    if row.get("error") or (label_of(row), row["seed"], row["users"]) != (run["label"], run["seed"], len(run["user_ids"])):
        return False
    if "ranks" not in run:
        return "auc" in row["metrics"]
    means = {name: per_user(run["ranks"], *split_metric(name)).mean() for name in row["metrics"] if is_per_user(name)}
    return bool(means) and all(math.isclose(row["metrics"][name], mean, abs_tol=1e-6) for name, mean in means.items())
