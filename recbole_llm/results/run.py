"""A run on disk: what it was, how its training went, and every user's result. ``docs/runs.md`` describes each field.

::

    saved/LLMSTAR-ml-100k-seed2020-1f3c.../
        run.json         the record
        ranks.parquet    user, rank; where labels are judged: user, label, value
        ranks-full.parquet   the same under a further protocol, here full
        curve.json       losses and validations on the way

The record is written last: a folder with ``run.json`` holds a model that was trained and tested.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike

from recbole_llm.errors import UserError, first_line
from recbole_llm.files import replace_file, replace_text

RECORD, RANKS, CURVE = "run.json", "ranks.parquet", "curve.json"
FORMAT, VERSION = "recbole-llm run", 2

_TEXT, _NUMBER, _MAYBE_TEXT, _MAYBE_NUMBER = (str,), (int, float), (str, type(None)), (int, float, type(None))
_DICT, _MAYBE_DICT = (dict,), (dict, type(None))

# The fields of a record, and what each may be.
FIELDS: Mapping[str, tuple[type, ...]] = {
    "format": _TEXT,
    "version": (int,),
    "model": _TEXT,
    "dataset": _TEXT,
    "protocol": _MAYBE_TEXT,
    "seed": (int,),
    "settings": _DICT,
    "changed": _DICT,
    "command": _MAYBE_TEXT,
    "versions": _DICT,
    "git": _MAYBE_DICT,
    "data": _DICT,
    "backbone": _MAYBE_DICT,
    "teacher": _MAYBE_DICT,
    "machine": _DICT,
    "started": _MAYBE_TEXT,
    "finished": _MAYBE_TEXT,
    "seconds": _DICT,
    "peak_memory_bytes": _DICT,
    "trained_parameters": _MAYBE_NUMBER,
    "users": _MAYBE_NUMBER,
    "test_set": _MAYBE_TEXT,
    "valid_metric": _MAYBE_TEXT,
    "metrics": _DICT,
    "tests": _DICT,
}

# The fields of a test under a further protocol, an entry of ``tests``.
TEST_FIELDS: Mapping[str, tuple[type, ...]] = {
    "settings": _DICT,
    "finished": _MAYBE_TEXT,
    "seconds": _MAYBE_NUMBER,
    "users": _MAYBE_NUMBER,
    "test_set": _MAYBE_TEXT,
    "valid_metric": _MAYBE_TEXT,
    "metrics": _DICT,
}
_PROTOCOL_NAME = re.compile(r"[A-Za-z0-9_]{1,50}")  # a part of a file's name


@dataclass(frozen=True)
class Run:
    """A run that was trained and tested, as its folder tells.

    Attributes:
        folder: where it lies.
        record: see ``docs/runs.md``; its fields are checked, what its ``settings`` say is not.
        curve: one mapping for each point of the training at which losses were noted or the model was validated.
        ranks_file: name of the file with every user's result.
    """

    folder: Path
    record: dict[str, Any]
    curve: list[dict[str, Any]]
    ranks_file: str = RANKS

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.name

    @property
    def model(self) -> str:
        """The model's name in RecBole."""
        return self.record["model"]

    @property
    def dataset(self) -> str:
        """The data set's name."""
        return self.record["dataset"]

    @property
    def protocol(self) -> str | None:
        """The preset of split, candidates and metrics."""
        return self.record["protocol"]

    @property
    def seed(self) -> int:
        """The seed of training and candidates."""
        return self.record["seed"]

    @property
    def test(self) -> dict[str, float]:
        """The metrics on the test split; NaN where the record has no number."""
        return _numbers(self.record["metrics"].get("test"))

    @property
    def valid(self) -> dict[str, float]:
        """The metrics on the validation split at the step that was chosen; empty where nothing was validated."""
        return _numbers(self.record["metrics"].get("valid"))

    @property
    def seconds(self) -> float:
        """Training and test together; NaN where one was not measured."""
        return sum(_or_nan(self.record["seconds"].get(part)) for part in ("train", "evaluate"))

    @property
    def finished(self) -> datetime | None:
        """When the test was over, with its time zone."""
        return None if self.record["finished"] is None else datetime.fromisoformat(self.record["finished"])

    def ranks(self) -> dict[str, np.ndarray]:
        """Read every user's result: ``user_ids`` ``[n]`` with ``ranks`` ``[n]``, or with ``labels`` and ``values`` ``[n]``.

        Raises:
            UserError: the file is missing or something else.
        """
        return read_ranks(self.folder, self.ranks_file)

    @property
    def protocols(self) -> list[str | None]:
        """The protocols that it was tested under, that of its training first."""
        return [self.protocol, *self.record["tests"]]

    def under(self, protocol: str | None) -> Run:
        """The run as its test under one of :attr:`protocols` tells.

        Raises:
            KeyError: it was not tested under that one.
        """
        if protocol == self.protocol:
            return self
        return Run(self.folder, record_under(self.record, str(protocol)), self.curve, ranks_file(str(protocol)))

    def row(self, label: str | None = None) -> dict[str, Any]:
        """The run as a row of :mod:`recbole_llm.results.table`, with its record and every user's result.

        Args:
            label: the name that the table gives it, such as ``LLMSTAR:plain``; default: the model's.
        """
        return {**row_of(self.record, label), "checkpoint": str(self.folder), **self.ranks()}


def record_under(record: Mapping[str, Any], protocol: str) -> dict[str, Any]:
    """The record of a run as its test under a further protocol, one of its ``tests``, tells."""
    test = record["tests"][protocol]
    return {
        **record,
        "protocol": protocol,
        "settings": {**record["settings"], **test["settings"]},
        "seconds": {**record["seconds"], "evaluate": test["seconds"]},
        "metrics": {**record["metrics"], "test": test["metrics"]},
        "tests": {},
        **{name: test[name] for name in ("finished", "users", "test_set", "valid_metric")},
    }


def ranks_file(protocol: str) -> str:
    """The name of the file with every user's result under a further protocol."""
    return f"ranks-{protocol}.parquet"


def row_of(record: Mapping[str, Any], label: str | None = None) -> dict[str, Any]:
    """A record as a row of :mod:`recbole_llm.results.table`, without users' results."""
    return {
        "model": label or record.get("label") or record["model"],
        "dataset": record["dataset"],
        "seed": record["seed"],
        "role": record.get("role", "model"),
        "metrics": _numbers(record["metrics"].get("test")),
        "users": record["users"],
        "trained_parameters": record["trained_parameters"],
        "train_seconds": record["seconds"].get("train"),
        "eval_seconds": record["seconds"].get("evaluate"),
        "test_set": record["test_set"],
        "valid_metric": record["valid_metric"],
        "record": dict(record),
    }


# --- writing ---------------------------------------------------------------------------------------------------------


def write_run(
    folder: str | Path,
    record: Mapping[str, Any],
    curve: Sequence[Mapping[str, Any]],
    user_ids: ArrayLike,
    *,
    ranks: ArrayLike | None = None,
    labels: ArrayLike | None = None,
    values: ArrayLike | None = None,
) -> Run:
    """Write a run; each file in one step, the record last. An older run in the folder goes first.

    Args:
        folder: the run's folder; made where it does not exist.
        record: the fields of :data:`FIELDS`; ``format`` and ``version`` are filled in.
        curve: see :class:`Run`.
        user_ids: ``[n]`` the users' own ids, one for each row that was tested.
        ranks: ``[n]`` rank of each target, from 1.
        labels: ``[n]`` 1 or 0, where labels are judged.
        values: ``[n]`` what the model predicted of each, with ``labels``.

    Raises:
        ValueError: a field is missing, unknown or of another type.
        FullDiskError: there is no room.
    """
    folder = Path(folder)
    written: dict[str, Any] = plain({"format": FORMAT, "version": VERSION, **record, "tests": {}})
    wrong = _first_wrong_field(written) or next((name for name in written if name not in FIELDS), None)
    if wrong is not None:
        raise ValueError(f"the record of a run has no valid {wrong!r}")
    folder.mkdir(parents=True, exist_ok=True)
    forget(folder)
    _write_ranks(folder / RANKS, user_ids, ranks, labels, values)
    write_curve(folder, curve)
    _write_json(folder / RECORD, written)
    return Run(folder, written, plain(list(curve)))


def add_test(
    folder: str | Path, protocol: str, test: Mapping[str, Any], user_ids: ArrayLike, *, ranks: ArrayLike
) -> Run:
    """Add the test under a further protocol to a run, or put it in the place of an earlier one; the record is written last.

    Args:
        folder: of a run that was tested.
        protocol: its name.
        test: the fields of :data:`TEST_FIELDS`.
        user_ids: ``[n]`` the users' own ids.
        ranks: ``[n]`` rank of each target, from 1.

    Returns:
        the run under that protocol.

    Raises:
        ValueError: a field is missing, unknown or of another type.
        UserError: there is no run, or a damaged one.
        FullDiskError: there is no room.
    """
    folder, written = Path(folder), plain(test)
    wrong = _wrong_test(protocol, written) or next((name for name in written if name not in TEST_FIELDS), None)
    if wrong is not None:
        raise ValueError(f"the test of a run has no valid {wrong!r}")
    found = read_run(folder)
    record = {**found.record, "version": VERSION, "tests": {**found.record["tests"], protocol: written}}
    _write_ranks(folder / ranks_file(protocol), user_ids, ranks, None, None)
    _write_json(folder / RECORD, record)
    return Run(folder, record, found.curve).under(protocol)


def _write_ranks(
    file: Path, user_ids: ArrayLike, ranks: ArrayLike | None, labels: ArrayLike | None, values: ArrayLike | None
) -> None:
    columns: dict[str, pl.Series] = {"user": pl.Series(np.asarray(user_ids).astype(str).tolist(), dtype=pl.String)}
    if ranks is not None:
        columns["rank"] = pl.Series(np.asarray(ranks).tolist(), dtype=pl.Int32)
    else:
        columns["label"] = pl.Series(np.asarray(labels).tolist(), dtype=pl.Int32)
        columns["value"] = pl.Series(np.asarray(values).tolist(), dtype=pl.Float64)
    table = pl.DataFrame(columns)
    replace_file(file, lambda temporary: table.write_parquet(temporary))


def write_curve(folder: str | Path, curve: Sequence[Mapping[str, Any]]) -> None:
    """Write the curve of a training alone: the run is not tested yet."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    _write_json(Path(folder) / CURVE, plain(list(curve)))


def forget(folder: str | Path) -> None:
    """Remove the record and the users' results, before other weights come into the folder."""
    for file in (Path(folder) / RECORD, Path(folder) / RANKS, *Path(folder).glob(ranks_file("*"))):
        file.unlink(missing_ok=True)


def plain(value: Any) -> Any:
    """``value`` for JSON: NumPy's numbers become Python's, tuples lists, what JSON has no number for None, the rest text."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _write_json(file: Path, value: Any) -> None:
    replace_text(file, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


# --- reading ---------------------------------------------------------------------------------------------------------


def exists(folder: str | Path) -> bool:
    """Whether ``folder`` holds a run that was tested."""
    return (Path(folder) / RECORD).is_file()


def read_run(folder: str | Path) -> Run:
    """Read a run, the folder or its ``run.json``. Nothing in it is trusted, evaluated or unpickled.

    Raises:
        UserError: no run, a damaged one, or one of a newer version.
    """
    folder = Path(folder)
    folder = folder.parent if folder.is_file() else folder
    return Run(folder, checked_record(_read_json(folder / RECORD), str(folder / RECORD)), read_curve(folder))


def checked_record(record: Any, place: str) -> dict[str, Any]:
    """``record`` where it is one of a run.

    Args:
        record: what was read.
        place: where it was read, for messages.

    Raises:
        UserError: it is something else, damaged, or of a newer version.
    """
    if not isinstance(record, dict) or record.get("format") != FORMAT or not isinstance(record.get("version"), int):
        raise UserError(f"{place} is no record of a run of recbole-llm: give the folder of a run, saved/<name>.")
    if record["version"] > VERSION:
        raise UserError(f"{place} was written by a newer version of recbole-llm: update the library to read it.")
    if record["version"] < 2:
        record = {**record, "tests": {}}  # one test in each run
    wrong = _first_wrong_field(record)
    if wrong is not None:
        raise UserError(f"{place} is damaged: its {wrong} is missing or of another kind; run the model again.")
    return record


def _first_wrong_field(record: Mapping[str, Any]) -> str | None:
    """The first field of a record that is missing or of another type; None where all are right."""
    for name, kinds in FIELDS.items():
        value = record.get(name, ...)
        if not isinstance(value, kinds) or isinstance(value, bool):
            return name
        if isinstance(value, str) and name != "command" and not value.isprintable():
            return name
    for name in ("started", "finished"):
        try:
            datetime.fromisoformat(record[name] or "2000-01-01T00:00:00Z")
        except ValueError:
            return name
    for name in ("train", "evaluate"):
        if not _is_number_or_none(record["seconds"].get(name)):
            return "seconds"
    for name in ("valid", "test"):
        if not _is_metrics(record["metrics"].get(name)):
            return "metrics"
    for protocol, test in record["tests"].items():
        if _wrong_test(protocol, test) is not None:
            return "tests"
    return None


def _wrong_test(protocol: str, test: Any) -> str | None:
    """The first field of a test under a further protocol that is missing or of another type; None where all are right."""
    if not _PROTOCOL_NAME.fullmatch(protocol):
        return "protocol"
    if not isinstance(test, dict):
        return "test"
    for name, kinds in TEST_FIELDS.items():
        value = test.get(name, ...)
        if not isinstance(value, kinds) or isinstance(value, bool) or (isinstance(value, str) and not value.isprintable()):
            return name
    try:
        datetime.fromisoformat(test["finished"] or "2000-01-01T00:00:00Z")
    except ValueError:
        return "finished"
    return None if _is_metrics(test["metrics"]) else "metrics"


def _is_number_or_none(value: Any) -> bool:
    return isinstance(value, _MAYBE_NUMBER) and not isinstance(value, bool)


def _is_metrics(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, dict) and all(name.isprintable() and _is_number_or_none(part) for name, part in value.items())


def read_curve(folder: str | Path) -> list[dict[str, Any]]:
    """Read the curve of a training; empty where there is none.

    Raises:
        UserError: the file is damaged.
    """
    file = Path(folder) / CURVE
    if not file.is_file():
        return []
    curve = _read_json(file)
    if not isinstance(curve, list) or not all(map(_is_point, curve)):
        raise UserError(f"{file} is damaged: it is no list of a training's points; run the model again.")
    return curve


def _is_point(point: Any) -> bool:
    if not isinstance(point, dict) or not isinstance(point.get("losses"), dict) or not _is_metrics(point.get("valid")):
        return False
    numbers = [point.get("step"), point.get("epoch"), point.get("seconds"), *point["losses"].values()]
    return all(map(_is_number_or_none, numbers)) and isinstance(point.get("stage", ""), str)


def read_ranks(folder: str | Path, name: str = RANKS) -> dict[str, np.ndarray]:
    """Read every user's result of a run, see :meth:`Run.ranks`.

    Args:
        folder: of the run.
        name: of the file in it.

    Raises:
        UserError: the file is missing or something else.
    """
    file = Path(folder) / name
    try:
        table = pl.read_parquet(io.BytesIO(file.read_bytes()))
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{file} is missing or damaged ({first_line(error)}); run the model again.") from None
    kinds = {"user": pl.String, "rank": pl.Int32, "label": pl.Int32, "value": pl.Float64}
    if table.columns not in (["user", "rank"], ["user", "label", "value"]) or any(
        table.schema[name] != kinds[name] or table[name].null_count() for name in table.columns
    ):
        raise UserError(f"{file} is damaged: it is no table of user and rank, or user, label and value; run the model again.")
    columns = {"user_ids": np.array(table["user"].to_list(), dtype=str)}
    for name in table.columns[1:]:
        columns[f"{name}s"] = table[name].to_numpy().astype(np.float64 if name == "value" else np.int64)
    return columns


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} does not exist: give the folder of a run that was trained and tested, saved/<name>.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is truncated or no record of a run ({first_line(error)}); run the model again.") from None


def _numbers(values: Mapping[str, Any] | None) -> dict[str, float]:
    return {name: _or_nan(value) for name, value in (values or {}).items()}


def _or_nan(value: Any) -> float:
    return math.nan if value is None else value
