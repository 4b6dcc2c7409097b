"""Atomic writes of files and folders. A full disk is one sentence, and what was there before stays."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recbole_llm.errors import FullDiskError, UserError, is_full_disk


def replace_file(file: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside its place, then move it there in one step: if the program is killed, the old file is intact.

    Args:
        file: what to replace; its folder exists. A link stays, and the file that it leads to is replaced.
        write: called with the temporary file to write.

    Raises:
        FullDiskError: there is no room for the file.
        UserError: there is something else than a file: a device, a pipe, a folder.
    """
    file = regular_file(file)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    with reporting_full_disk(file):
        try:
            write(temporary)
            _flush_to_disk(temporary)
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)


def replace_text(file: Path, text: str) -> None:
    """Write a text file, UTF-8 with Unix line ends, in one step; raises as :func:`replace_file`."""
    replace_file(file, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


def regular_file(file: Path) -> Path:
    """Where ``file`` leads, if that is a file or nothing yet.

    Raises:
        UserError: it is a device, a pipe, a folder or a link that leads around in a circle.
    """
    end = Path(os.path.realpath(file))
    if os.path.lexists(end) and not end.is_file():
        raise UserError(f"{file} is no regular file, and is not replaced by one: name another.")
    return end


def is_writable(folder: Path) -> bool:
    """Whether a file can be made in ``folder``: tried, since rights alone do not say so."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError as error:
        return is_full_disk(error)


@contextmanager
def written_folder(target: Path) -> Iterator[Path]:
    """Let a folder be written elsewhere, and move it to ``target`` once it is complete and on disk.

    If the writing fails or the program is killed, ``target`` is as it was; what a killed program left behind is removed by
    the next call. One writer at a time.

    Yields:
        where to make the folder; its parent is a scratch folder that lasts as long as the context.

    Raises:
        FullDiskError: there is no room for the folder.
    """
    for leftover in target.parent.glob(f"{target.name}.*.part"):
        shutil.rmtree(leftover)
    with (
        reporting_full_disk(target),
        tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}.", suffix=".part") as scratch,
    ):
        new = Path(scratch) / "new"
        yield new
        for path in [*new.rglob("*"), new]:
            _flush_to_disk(path)
        if target.exists():
            os.rename(target, Path(scratch) / "old")
        os.rename(new, target)
    _sync(target.parent)


def tree_size(folder: Path) -> int:
    """Bytes of all files in a folder, without what links point to; files that vanish meanwhile count nothing."""
    size = 0
    for path in folder.rglob("*"):
        try:
            status = path.lstat()
        except OSError:
            continue
        size += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return size


def format_size(size: float) -> str:
    """Bytes with a unit: 950 B, 4.2 MB."""
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


@contextmanager
def reporting_full_disk(path: Path) -> Iterator[None]:
    """Turn the error of a write that found no room into one sentence that names ``path`` and its folder.

    Raises:
        FullDiskError: there is no room left.
    """
    try:
        yield
    except FullDiskError:
        raise
    except Exception as error:
        if not is_full_disk(error):
            raise
        raise FullDiskError(
            f"{path} cannot be written, for there is no room left in {path.parent} ({_reason(error)}): free some, or name a "
            f"folder on another disk."
        ) from error


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or os.strerror(errno.ENOSPC)


def _flush_to_disk(path: Path) -> None:
    """Force a new file or folder to disk, with the mode of any new one of this user: safetensors makes them private."""
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
