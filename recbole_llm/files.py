"""Folders that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
            _sync(path)
        if target.exists():
            os.rename(target, Path(scratch) / "old")
        os.rename(made, target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    """Force a file, or a folder's list of names, to disk."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
