"""Files and folders that are there whole or not at all, for whoever may read what the user writes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def replace_file(file: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside its place, then move it there in one step: a killed program leaves the old one whole."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        _settle(temporary)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def written_folder(target: Path) -> Iterator[Path]:
    """Let a folder be written elsewhere, and put it in the place of ``target`` once it is complete and on disk.

    What is stopped in the middle, or killed, leaves ``target`` as it was; a killed program's leftovers go with the next
    call. One writer at a time.

    Yields:
        where to make the folder; its parent is a scratch folder that lasts as long as the context.
    """
    for leftover in target.parent.glob(f"{target.name}.*.part"):
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}.", suffix=".part") as scratch:
        made = Path(scratch) / "new"
        yield made
        for path in [*made.rglob("*"), made]:
            _settle(path)
        if target.exists():
            os.rename(target, Path(scratch) / "old")
        os.rename(made, target)
    _sync(target.parent)


def _settle(path: Path) -> None:
    """Force a new file or folder to disk, with the mode of any that this user makes: safetensors' are the owner's alone."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, (0o777 if path.is_dir() else 0o666) & ~mask)
    _sync(path)


def _sync(path: Path) -> None:
    """Force a file, or a folder's list of names, to disk."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
