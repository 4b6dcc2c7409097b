"""``recbole-llm runs``: what lies in a folder of runs, how large it is, and the removal of some of it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tabulate import tabulate

from recbole_llm import checkpoint
from recbole_llm.errors import UserError, closest, printable, printable_json
from recbole_llm.files import format_size, tree_size
from recbole_llm.lock import LOCKS, forget, held, is_held
from recbole_llm.results import run
from recbole_llm.results.clean import find_orphans, remove_path

STATES = {"tested": "", "trained": "not tested", "unfinished": "unfinished", "damaged": "damaged"}


@dataclass(frozen=True)
class Listed:
    """One folder of a run.

    Attributes:
        name: of the folder.
        state: ``tested``, ``trained`` (not tested), ``unfinished`` (its training was stopped) or ``damaged``.
        in_use: whether a process holds it.
        model: None where the folder does not tell, as the next ones.
        dataset: the data set's name.
        seed: of training and candidates.
        protocol: the preset of split, candidates and metrics.
        metric: name of the metric by which the best step was chosen.
        value: this metric on the test split.
        minutes: training and test.
        bytes: all that lies in the folder.
        finished: when it was tested, ISO 8601; else when its folder was last changed.
    """

    name: str
    state: str
    in_use: bool
    model: str | None
    dataset: str | None
    seed: int | None
    protocol: str | None
    metric: str | None
    value: float | None
    minutes: float | None
    bytes: int
    finished: str


def list_runs(folder: str | Path, model: str | None = None, dataset: str | None = None) -> list[Listed]:
    """The runs in ``folder``, the latest last.

    Args:
        folder: such as ``saved``.
        model: leave out the runs of others.
        dataset: leave out the runs on others.

    Raises:
        UserError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give the checkpoint_dir of your runs, saved by default.")
    found = [_listed(path) for path in sorted(folder.iterdir()) if _is_run(path)]
    found = [one for one in found if model in (None, one.model) and dataset in (None, one.dataset)]
    return sorted(found, key=lambda one: one.finished)


def delete_runs(folder: str | Path, names: Sequence[str]) -> int:
    """Remove runs by the names of their folders: all of them, or none where one cannot be removed.

    Returns:
        how many bytes there were.

    Raises:
        UserError: a name that is none of a run in ``folder``, or one that a process holds.
    """
    folder = Path(folder)
    known = [one.name for one in list_runs(folder)]
    for name in names:
        if name not in known:
            near = closest(name, known)
            raise UserError(
                f"--delete={name}: there is no such run in {folder}" + (f"; did you mean {near}?" if near else ".")
            )
    size = 0
    with ExitStack() as stack:
        for name in dict.fromkeys(names):
            stack.enter_context(held(folder / name, waits=False))
        for name in dict.fromkeys(names):
            size += tree_size(folder / name)
            run.forget(folder / name)  # should the removal be cut short, the rest is no run
            (folder / name / checkpoint.RECORD).unlink(missing_ok=True)
            remove_path(folder / name)
    for name in dict.fromkeys(names):
        forget(folder / name)
    return size


def format_runs(runs: Sequence[Listed], now: datetime | None = None) -> str:
    """The runs as a table."""
    moment = now or datetime.now(UTC)
    header = ["run", "model", "dataset", "seed", "protocol", "metric", "value", "minutes", "size", "age"]
    body = []
    for one in runs:
        known = [one.model, one.dataset, one.seed, one.protocol, one.metric]
        notes = [STATES[one.state], "in use" if one.in_use else ""]
        age = moment - datetime.fromisoformat(one.finished)
        body.append(
            [
                printable(one.name, None),
                *("-" if cell is None else printable(cell) for cell in known),
                "-" if one.value is None else f"{one.value:.4f}",
                "-" if one.minutes is None else f"{one.minutes:.1f}",
                format_size(one.bytes),
                ", ".join(filter(None, [format_age(age.total_seconds()), *notes])),
            ]
        )
    aligned = ("left", "left", "left", "right", "left", "left", "right", "right", "right", "left")
    return tabulate(body, headers=header, tablefmt="plain", colalign=aligned, disable_numparse=True)


def format_json(runs: Sequence[Listed]) -> str:
    """The runs as a JSON list of objects."""
    return printable_json(json.dumps(run.plain([asdict(one) for one in runs]), indent=2, ensure_ascii=False))


def format_age(seconds: float) -> str:
    """A time span in its largest unit: 5 min, 3 h, 12 d."""
    for unit, length in (("d", 86_400), ("h", 3600)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(0, seconds) // 60:.0f} min"


def _is_run(path: Path) -> bool:
    if not path.is_dir() or path.is_symlink() or path.name == LOCKS or path.suffix == ".part":
        return False
    return any((path / part).exists() for part in (run.RECORD, checkpoint.RECORD, "resume", "stages"))


def _listed(path: Path) -> Listed:
    changed = datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
    values: dict[str, Any] = {"state": "unfinished", "finished": changed}
    try:
        if run.exists(path):
            values.update(_of_test(run.read_run(path)))
        elif checkpoint.exists(path):
            values.update(_of_checkpoint(checkpoint.read_record(path)))
    except UserError:
        values["state"] = "damaged"
    empty = dict.fromkeys(("model", "dataset", "seed", "protocol", "metric", "value", "minutes"))
    return Listed(**{**empty, **values, "name": path.name, "in_use": is_held(path), "bytes": tree_size(path)})


def _of_test(found: run.Run) -> dict[str, Any]:
    metric = (found.record["valid_metric"] or next(iter(found.test), "")).lower()
    value = found.test.get(metric, math.nan)
    finished = {"finished": found.finished.astimezone(UTC).isoformat(timespec="seconds")} if found.finished else {}
    return {
        "state": "tested",
        "model": found.model,
        "dataset": found.dataset,
        "seed": found.seed,
        "protocol": ",".join(filter(None, found.protocols)) or None,
        "metric": metric,
        "value": None if math.isnan(value) else value,
        "minutes": None if math.isnan(found.seconds) else found.seconds / 60,
        **finished,
    }


def _of_checkpoint(record: dict[str, Any]) -> dict[str, Any]:
    done = record.get("finished") or record.get("kind") in ("stock", "foundation")
    known = {key: record[key] for key in ("dataset",) if isinstance(record.get(key), str)}
    seed, seconds = record.get("seed"), record.get("train_seconds")
    return {
        "state": "trained" if done else "unfinished",
        "model": record["model"],
        **known,
        "seed": seed if isinstance(seed, int) else None,
        "minutes": seconds / 60 if isinstance(seconds, (int, float)) else None,
    }


# --- the command -----------------------------------------------------------------------------------------------------

USAGE = """\
recbole-llm runs: what was trained, and the room that it takes

  recbole-llm runs [FOLDER]             the runs in FOLDER (saved), the latest last
  recbole-llm runs --model=LLMSTAR --dataset=ml-100k
                                        those of one model, on one data set
  recbole-llm runs --format=json        for programs
  recbole-llm runs --size               only how many there are, how large they are together, and what clean would free
  recbole-llm runs --delete=NAME,NAME   remove runs by their exact names, without a question; one in use stays
"""


def command(words: Sequence[str]) -> str:
    """Run ``recbole-llm runs``; what it prints.

    Raises:
        UserError: a mistake in the words, or see :func:`list_runs` and :func:`delete_runs`.
    """
    options: dict[str, str] = {}
    deleted: list[str] = []
    folders = []
    for word in words:
        name, _, value = word.partition("=")
        if not word.startswith("-"):
            folders.append(word)
        elif name in ("-h", "--help"):
            return USAGE.rstrip("\n")
        elif name == "--delete":
            deleted += [one for one in value.split(",") if one]
        elif name in ("--model", "--dataset", "--format", "--size"):
            options[name[2:]] = value
        else:
            near = closest(name, ["--model", "--dataset", "--format", "--size", "--delete"])
            raise UserError(f"runs: {name} is unknown" + (f"; did you mean {near}?" if near else "; see runs --help."))
        if name == "--delete" and not value:
            raise UserError("--delete: name the folders of the runs, --delete=NAME,NAME (recbole-llm runs lists them).")
    if len(folders) > 1:
        raise UserError(f"runs: {folders[1]} is a second folder; give one.")
    folder = folders[0] if folders else "saved"
    form = options.get("format", "text")
    if form not in ("text", "json"):
        raise UserError(f"--format={form}: choose text or json.")
    if deleted:
        if options:
            raise UserError("--delete takes exact names alone, and no other option.")
        size = delete_runs(folder, deleted)
        return f"{len(set(deleted))} removed, {format_size(size)}."
    found = list_runs(folder, options.get("model"), options.get("dataset"))
    total = sum(one.bytes for one in found)
    if "size" in options:
        orphaned = sum(orphan.size for orphan in find_orphans(folder))
        if form == "json":
            return json.dumps({"runs": len(found), "bytes": total, "orphaned_bytes": orphaned})
        freed = f"; recbole-llm clean would free {format_size(orphaned)}" if orphaned else ""
        return f"{len(found)} runs in {printable(folder)}, {format_size(total)}{freed}"
    if form == "json":
        return format_json(found)
    if not found:
        return f"There is no such run in {printable(folder)}."
    return f"{format_runs(found)}\n\n{len(found)} runs, {format_size(total)}"
