"""What killed runs left in a folder of checkpoints, and what no run there reads any more: found, and removed on demand.

Nothing of a folder that a process holds (see :mod:`recbole_llm.lock`) is an orphan, and links are never followed.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from recbole_llm import checkpoint, lock
from recbole_llm.errors import UserError
from recbole_llm.files import tree_size

_TEMPORARY = re.compile(r"(?P<of>.+)\.(?P<writer>\d+|[a-z0-9_]{8})\.(?P<kind>tmp|part|pth)")
_STORED = re.compile(r"alignment-[0-9a-f]{10}-[0-9a-f]{10}\.safetensors|.+-(?:train|items|evaluation|texts)-[0-9a-f]{16}\.npy")
KINDS = {
    "temporary": "a file that a killed process was writing",
    "lock": "the lock file of a folder that nobody holds",
    "stored": "hidden states or aligned vectors that no run here reads; they would be computed again",
    "finished": "the resume state of a training that ended",
    "unfinished": "the resume state of a training that did not end",
}


@dataclass(frozen=True)
class Orphan:
    """A file or folder that nobody needs.

    Attributes:
        path: where it is.
        kind: one of :data:`KINDS`.
        size: bytes on disk, of a folder with all that is in it.
    """

    path: Path
    kind: str
    size: int


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; a link that is asked for counts for itself."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size if os.path.lexists(path) else 0
    return tree_size(path)


def find_orphans(folder: str | os.PathLike, unfinished: bool = False) -> list[Orphan]:
    """The orphans in a folder of checkpoints, sorted by kind and path.

    Args:
        folder: ``checkpoint_dir`` of runs.
        unfinished: also the states from which interrupted trainings would be resumed.

    Raises:
        UserError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"checkpoint_dir: there is no folder {folder}; name the one whose runs are meant.")
    found: list[tuple[str, Path]] = []
    stored: list[Path] = []
    records: list[dict[str, Any]] = []
    is_any_held = False
    for place, folders, names in os.walk(folder):
        here = Path(place)
        if here.name == lock.LOCKS:
            folders.clear()
            free = [name for name in lock.names(here.parent) if not lock.is_held(here.parent / name)]
            is_any_held = is_any_held or len(free) < len(lock.names(here.parent))
            found += [("lock", file) for name in free for file in lock.files(here.parent / name) if file.exists()]
            continue
        if checkpoint.RECORD in names:
            records.append(_record(here))
        for name in [*folders, *names]:
            if _is_orphaned_temporary(here / name):
                found.append(("temporary", here / name))
        folders[:] = [name for name in folders if not _TEMPORARY.fullmatch(name)]
        stored += [here / name for name in names if _STORED.fullmatch(name)]
        if "resume" in folders and checkpoint.has_resume_state(here) and _is_free(here):
            record = _record(here)
            kind = "finished" if record.get("finished") is True or record.get("kind") == "stock" else "unfinished"
            if kind == "finished" or unfinished:
                found.append((kind, here / "resume"))
    if not is_any_held:  # a run that is under way may read what no record names yet
        used, unknown = _used(records)
        found += [("stored", file) for file in stored if file.name not in used and not file.name.startswith(unknown)]
    return sorted((Orphan(path, kind, size_of(path)) for kind, path in found), key=lambda entry: (entry.kind, str(entry.path)))


def remove(orphans: Iterable[Orphan]) -> list[Orphan]:
    """Remove orphans; returns those that were removed. What a process holds by now stays."""
    removed = []
    for orphan in sorted(orphans, key=lambda entry: entry.kind == "lock"):  # locks last: removing takes locks
        if orphan.kind == "lock":
            if lock.forget(orphan.path.parent.parent / orphan.path.stem):
                removed.append(orphan)
            continue
        owner = _owner(orphan.path)
        try:
            with lock.held(owner, waits=False):
                remove_path(orphan.path)
                removed.append(orphan)
                if orphan.path.name == "resume" and not any(orphan.path.parent.iterdir()):
                    orphan.path.parent.rmdir()
        except UserError:
            continue
        lock.forget(owner)
    return removed


def remove_path(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or a link but not what it leads to.

    Raises:
        UserError: it cannot be removed.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        pass  # somebody else was faster
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be removed ({error.strerror}).") from None


def _is_orphaned_temporary(path: Path) -> bool:
    match = _TEMPORARY.fullmatch(path.name)
    if match is None:
        return False
    if match["kind"] != "part" and (not match["writer"].isdigit() or psutil.pid_exists(int(match["writer"]))):
        return False  # another program's, or of a process that still writes
    return _is_free(path)


def _is_free(path: Path) -> bool:
    """Whether nobody holds ``path``, what it is a temporary file of, or a folder that it lies in."""
    return not any(map(lock.is_held, _owners(path)))


def _owners(path: Path) -> Iterator[Path]:
    match = _TEMPORARY.fullmatch(path.name)
    if match is not None:
        yield path.with_name(match["of"])
    yield from (path, *path.absolute().parents)


def _owner(path: Path) -> Path:
    """What a process that writes ``path`` holds: what has a lock, else the folder of the run or the file itself."""
    owners = list(_owners(path))
    usual = path.parent if path.name == "resume" else owners[0]
    return next((owner for owner in owners if owner.name and lock.files(owner)[0].exists()), usual)


def _record(folder: Path) -> dict[str, Any]:
    """The record of a checkpoint; empty where there is none that can be read."""
    try:
        return checkpoint.read_record(folder)
    except UserError:
        return {}


def _used(records: Iterable[dict[str, Any]]) -> tuple[set[str], tuple[str, ...]]:
    """The names of the stored files that records name, and beginnings of names of which nothing is known."""
    names: set[str] = set()
    beginnings: set[str] = set()
    for record in records:
        files = record.get("stored_files")
        if isinstance(files, list):
            names.update(Path(str(file)).name for file in files)
        elif record.get("kind") != "stock":  # written before records named them, or unreadable
            beginnings |= {f"{record.get('dataset', '')}-", "alignment-"} if record else {""}
    return names, tuple(beginnings)
