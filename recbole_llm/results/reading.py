"""What a table or a report is made of: run folders, results files, results by user, analyses, published figures."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recbole_llm.errors import UserError, printable
from recbole_llm.results import files
from recbole_llm.results.run import FORMAT, RECORD, read_run

ANALYSIS = "result.json"  # of a folder that one analysis of one model was kept in


@dataclass
class Analysis:
    """The result of ``recbole-llm analyze``, as its file tells; nothing of it is checked.

    Attributes:
        name: such as ``order``.
        results: one mapping per model and seed, or one in all.
        command: that made it; None where the file does not tell.
        file: where it lies.
    """

    name: str
    results: list[Mapping[str, Any]]
    command: str | None
    file: Path


@dataclass
class Inputs:
    """What some files and folders hold.

    Attributes:
        rows: see :mod:`recbole_llm.results.comparison`; those of run folders have the training's ``curve``, too.
        analyses: in the order of the files.
        tables: other tables of published figures, each with ``title``, ``settings``, ``command`` and ``rows``.
        notes: what the reader should know of the inputs, one sentence each.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    analyses: list[Analysis] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_inputs(paths: Iterable[str | Path]) -> Inputs:
    """Read run folders (or folders of them), results files old and new, results by user, and analyses; told apart by what
    they hold. A file that is given twice, also under another name, is read once, and a note says so.

    Raises:
        UserError: a path that does not exist or is something else; nothing in a file is evaluated or unpickled.
    """
    inputs = Inputs()
    seen: dict[str, Path] = {}
    by_user: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = _inside(path)
            if not found:
                raise UserError(f"{path} holds neither a run nor an analysis: give the folder of a run, saved/<name>.")
        else:
            found = [path]
        for file in found:
            text = files.read_text(file)
            digest = hashlib.sha256(text.encode()).hexdigest()
            if digest in seen:
                inputs.notes.append(f"{file} is the same as {seen[digest]} and counts once.")
                continue
            seen[digest] = file
            if files.is_users_results(text):
                by_user.append(file)  # once all rows are known
            else:
                _read(file, text, inputs)
    for file in by_user:
        files.add_users_results(inputs.rows, file)
    return inputs


def _inside(folder: Path) -> list[Path]:
    """The files of a folder that say what it holds: a run, an analysis, or several of them."""
    for name in (RECORD, ANALYSIS):
        if (folder / name).is_file():
            return [folder / name]
    runs = sorted(folder.glob(f"*/{RECORD}"))
    tables = [file for file in sorted(folder.glob("*.json")) if isinstance(_parsed(file), dict | list)]
    parts = [] if tables else sorted(folder.glob(f"*/{ANALYSIS}"))
    return [*runs, *(file for file in tables if _kind(_parsed(file)) is not None), *parts]


def _parsed(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _kind(content: Any) -> str | None:
    """What a JSON file holds; None for something else."""
    if isinstance(content, list):
        return "results" if all(isinstance(entry, dict) and "model" in entry for entry in content) else None
    if not isinstance(content, dict):
        return None
    if content.get("format") == FORMAT:
        return "run"
    if isinstance(content.get("analysis"), str):
        return "analysis"
    return "published" if isinstance(content.get("tables"), list) else None


def _read(file: Path, text: str, inputs: Inputs) -> None:
    content = _parsed(file)
    kind = _kind(content)
    if kind == "run":
        run = read_run(file)
        inputs.rows.append({**run.row(), "curve": run.curve})  # the training is shown once
        inputs.rows += [run.under(protocol).row() for protocol in run.protocols[1:]]
    elif kind == "results":
        inputs.rows += _results(file)
    elif kind == "analysis":
        inputs.analyses.append(_analysis(file, content))
    elif kind == "published":
        _published(file, content, inputs)
    else:
        raise UserError(
            f"{file} is neither a run nor a results_file, per_user_file or analysis: give the folder of a run, saved/<name>, "
            f"or one of these."
        )


def _results(file: Path) -> list[dict[str, Any]]:
    """The rows of a results file. Results by user and curve of a run whose folder is still there are read from it."""
    rows = files.read_rows([file])
    for row in rows:
        folder, record = row.get("checkpoint"), row.get("record")
        if folder is not None and record is not None and (Path(folder) / RECORD).is_file():
            run, first = read_run(folder), True
            if record["protocol"] in run.protocols[1:]:
                run, first = run.under(record["protocol"]), False
            if all(run.record[name] == record[name] for name in ("model", "dataset", "seed", "test_set", "metrics")):
                row.update(run.ranks(), **({"curve": run.curve} if first else {}))
    return rows


def _analysis(file: Path, content: Mapping[str, Any]) -> Analysis:
    if "results" in content:
        results = content["results"]
        results = results if isinstance(results, list) else [results]
    else:  # one model's, as an analysis keeps it
        results = [content]
    if not results or not all(isinstance(result, dict) for result in results):
        raise UserError(f"{file} is damaged: it holds no results of an analysis; make it again by recbole-llm analyze.")
    command = content.get("command")
    words = [word for word in command if isinstance(word, str)] if isinstance(command, list) else []
    return Analysis(content["analysis"], results, shlex.join(words) or None, file)


def _published(file: Path, content: Mapping[str, Any], inputs: Inputs) -> None:
    """Figures collected by hand, as in the repository's folder ``results``: tables of models, or of anything else."""
    for place, table in enumerate(content["tables"], start=1):
        where = f"{file}, table {place}"
        if not isinstance(table, dict) or not _are_rows(table.get("rows")):
            raise UserError(f"{where} has no rows: it was not written for this library.")
        shared = {name: table.get(name, content.get(name)) for name in ("command", "settings", "machine", "seed", "protocol")}
        if not all("model" in row and isinstance(row.get("metrics"), dict) for row in table["rows"]) or "dataset" not in table:
            title = f"{content.get('topic', file.stem)}, table {place}"
            inputs.tables.append({**shared, "title": title, "rows": table["rows"]})
            continue
        for row in table["rows"]:
            inputs.rows.append(_published_row(row, table, shared, where))
    note = content.get("note")
    if isinstance(note, str):
        inputs.notes.append(f"{file.name}: {printable(note, None)}")


def _are_rows(rows: Any) -> bool:
    return isinstance(rows, list) and bool(rows) and all(isinstance(row, dict) for row in rows)


def _published_row(row: Mapping[str, Any], table: Mapping[str, Any], shared: Mapping[str, Any], where: str) -> dict[str, Any]:
    minutes = row.get("minutes")
    numbers = [*row["metrics"].values(), minutes, table.get("users")]
    texts = [row["model"], table["dataset"], *row["metrics"]]
    if any(isinstance(value, bool) or not isinstance(value, (int, float, type(None))) for value in numbers) or not all(
        isinstance(text, str) and text.isprintable() for text in texts
    ):
        raise UserError(f"{where}: {printable(row['model'])} has a metric that is no number; write the file again.")
    settings = shared["settings"]
    return {
        "model": row["model"],
        "dataset": table["dataset"],
        "seed": shared["seed"],
        "role": "model",
        "metrics": {name: math.nan if value is None else value for name, value in row["metrics"].items()},
        "users": table.get("users"),
        "trained_parameters": row.get("trained_parameters"),
        "train_seconds": None if minutes is None else 60 * minutes,
        "eval_seconds": None if minutes is None else 0,
        "valid_metric": None,
        "test_set": None,
        "record": {
            "command": shared["command"],
            "settings": settings if isinstance(settings, dict) else {},
            "machine": {"platform": shared["machine"]} if shared["machine"] else {},
            "protocol": shared["protocol"],
        },
    }
