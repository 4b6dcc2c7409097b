"""One process at a time in a run's folder; what a killed process left there goes with the next one that holds it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path

from filelock import FileLock, Timeout

from recbole_llm.errors import UserError

LOCKS = ".locks"  # folder beside the locked ones, for the lock files and the notes of who holds them
_HELD: set[Path] = set()  # folders that this process holds: a run may train its teacher and ask for it again


@contextmanager
def held(folder: str | os.PathLike, waits: bool = True) -> Iterator[None]:
    """Hold ``folder`` within the context. Whoever holds it is named in the log while this process waits.

    The lock is the operating system's: it goes with a process that is killed. Temporary files of such a process, in the
    folder and beside it under the folder's name, are removed once the folder is held.

    Args:
        folder: need not exist.
        waits: False raises where another process holds the folder.

    Raises:
        UserError: another process holds the folder, or the lock cannot be written.
    """
    folder = Path(folder).resolve()
    if folder in _HELD:
        yield
        return
    place = folder.parent / LOCKS
    note = place / f"{folder.name}.json"
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place / f"{folder.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not waits:
                raise UserError(f"{folder} is in use by {_holder(note)}: wait for it, or end it.") from None
            getLogger().info(f"{folder} is in use by {_holder(note)}: waiting until it is done")
            lock.acquire()
    except OSError as error:
        raise UserError(f"{place} cannot be written ({error.strerror}): set checkpoint_dir to another folder.") from None
    _HELD.add(folder)
    try:
        _write_note(note)
        remove_temporaries(folder)
        yield
    finally:
        _HELD.discard(folder)
        note.unlink(missing_ok=True)
        lock.release()


def is_held(folder: str | os.PathLike) -> bool:
    """Whether some process, this one included, holds ``folder``."""
    folder = Path(folder).resolve()
    file = folder.parent / LOCKS / f"{folder.name}.lock"
    if folder in _HELD:
        return True
    if not file.exists():
        return False
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def names(place: str | os.PathLike) -> list[str]:
    """The names of the folders and files in ``place`` that have a lock file, held or not."""
    return sorted({file.stem for suffix in ("lock", "json") for file in (Path(place) / LOCKS).glob(f"*.{suffix}")})


def files(folder: str | os.PathLike) -> tuple[Path, Path]:
    """The lock file of ``folder`` and the note of who holds it; neither need exist."""
    folder = Path(folder).absolute()
    place = folder.parent / LOCKS
    return place / f"{folder.name}.lock", place / f"{folder.name}.json"


def forget(folder: str | os.PathLike) -> bool:
    """Remove the lock file and the note of ``folder``, and ``.locks`` where it is empty then.

    Returns:
        False where a process holds the folder: then nothing is removed.
    """
    folder = Path(folder).resolve()
    file, note = files(folder)
    if folder in _HELD:
        return False
    if file.exists():
        lock = FileLock(file)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        try:
            # Removed while it is held: a process that waits for it sees that the file is gone, and makes a new one.
            note.unlink(missing_ok=True)
            file.unlink(missing_ok=True)
        finally:
            lock.release()
    note.unlink(missing_ok=True)
    try:
        file.parent.rmdir()
    except OSError:
        pass  # other locks are there
    return True


def temporaries(folder: Path) -> list[Path]:
    """Files that a process which writes ``folder`` makes on the way: in it, and beside it under its name."""
    beside = [path for suffix in ("tmp", "part", "pth") for path in folder.parent.glob(f"{_escaped(folder.name)}.*.{suffix}")]
    within = [path for suffix in ("tmp", "part") for path in folder.rglob(f"*.{suffix}")] if folder.is_dir() else []
    return sorted({*beside, *within})


def remove_temporaries(folder: Path) -> None:
    """Remove what a killed process left of its writing. The folder must be held."""
    for path in temporaries(folder):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _escaped(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _write_note(note: Path) -> None:
    values = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    values["command"] = " ".join(sys.argv)[:500]
    note.write_text(json.dumps(values), encoding="utf-8")


def _holder(note: Path) -> str:
    try:
        values = json.loads(note.read_text(encoding="utf-8"))
        return f"process {int(values['pid'])} on {values['host']!r} since {values['since']!r}".replace("'", "")
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
