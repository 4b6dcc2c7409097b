"""Reading raw files, lazily: JSON lines, Python literals, separated values, packed or not."""

from __future__ import annotations

import ast
import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import polars as pl
from polars.io.plugins import register_io_source
from tqdm import tqdm

from recbole_llm.errors import UserError, first_line

_BLOCK = 16 << 20  # bytes of JSON that are parsed at a time
_RECORDS = 20_000  # Python literals that are held at a time


def collect(frame: pl.LazyFrame, files: Iterable[Path]) -> pl.DataFrame:
    """Run a query, streaming.

    Raises:
        UserError: a file cannot be read; names the file, and its line where that can be known.
    """
    try:
        return frame.collect(engine="streaming")
    except UserError:
        raise
    except (pl.exceptions.PolarsError, OSError) as error:
        names = ", ".join(str(path) for path in files)
        raise UserError(f"{names} cannot be read ({first_line(error)}): download again what is damaged.") from None


def open_binary(path: Path) -> IO[bytes]:
    """A file, unpacked where its first bytes are gzip's."""
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if packed else open(path, "rb")


def first_text(path: Path) -> str:
    """A file's first line, without its end."""
    with _whole(path), open_binary(path) as file:
        return file.readline().decode("utf-8", "replace").rstrip("\r\n")


def scan_json(path: Path, schema: Mapping[str, pl.DataType]) -> pl.LazyFrame:
    """JSON lines, some megabytes at a time; fields outside ``schema`` are skipped, those that a line lacks are null."""
    schema = dict(schema)

    def frames() -> Iterator[pl.DataFrame]:
        number = 1
        for block in _blocks(path):
            try:
                yield pl.read_ndjson(block, schema=schema)
            except pl.exceptions.PolarsError as error:
                raise _bad_line(path, block, number, schema, error) from None
            number += block.count(b"\n")

    return _lazy(path, frames, schema)


def _blocks(path: Path) -> Iterator[bytes]:
    """A file's bytes, unpacked, in blocks that end with a line."""
    with _whole(path), open_binary(path) as file:
        with tqdm(unit="B", unit_scale=True, desc=path.name, disable=None, leave=False) as bar:
            while block := file.read(_BLOCK):
                block += file.readline()
                bar.update(len(block))
                yield block


def _bad_line(path: Path, block: bytes, number: int, schema: dict, error: Exception) -> UserError:
    """The error of the first line of a block that cannot be read, with its number."""
    for offset, line in enumerate(block.splitlines()):
        if line.strip():
            try:
                json.loads(line)
                pl.read_ndjson(line, schema=schema)
            except (ValueError, pl.exceptions.PolarsError) as cause:
                reason = first_line(cause)
                return UserError(f"{path}:{number + offset} is no record as expected ({reason}): download the file again.")
    return UserError(f"{path}: some line behind line {number} cannot be read ({first_line(error)}).")


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is no whole gzip file ({error}): download it again.") from None


def _lazy(path: Path, frames: Callable[[], Iterator[pl.DataFrame]], schema: dict) -> pl.LazyFrame:
    """A query over frames that are made one by one."""
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty: download it again.")

    def source(with_columns, predicate, n_rows, batch_size) -> Iterator[pl.DataFrame]:
        for frame in frames():
            if n_rows is not None:
                frame, n_rows = frame.head(n_rows), n_rows - min(n_rows, frame.height)
            if predicate is not None:
                frame = frame.filter(predicate)
                # Texts that a filter leaves are views of all that were read: copies let the rest go.
                frame = pl.DataFrame(frame.to_dict(as_series=False), schema=frame.schema)
            yield frame if with_columns is None else frame.select(with_columns)
            if n_rows == 0:
                return

    return register_io_source(source, schema=schema)


def scan_literals(path: Path, schema: Mapping[str, pl.DataType]) -> pl.LazyFrame:
    """Lines that are Python dicts (single quotes, ``u''``), read by ``ast.literal_eval``: nothing of them is run.

    Strict JSON lines are read as well. Values other than lists become String where the schema says String.
    """
    schema = dict(schema)

    def frames() -> Iterator[pl.DataFrame]:
        records = literals(path)
        while batch := list(itertools.islice(records, _RECORDS)):
            columns = {name: [_as(record.get(name), kind) for record in batch] for name, kind in schema.items()}
            yield pl.DataFrame(columns, schema=schema)

    return _lazy(path, frames, schema)


def literals(path: Path) -> Iterator[dict]:
    """The dicts of a file of Python literals, or of strict JSON, one a line.

    Raises:
        UserError: a line is no dict; names file and line.
    """
    with _whole(path), open_binary(path) as file, tqdm(file, unit=" lines", desc=path.name, disable=None, leave=False) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _literal(path, number, line)


def _literal(path: Path, number: int, line: bytes) -> dict:
    text = line.decode("utf-8", "replace").strip()
    try:
        value = json.loads(text)
    except ValueError:
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise UserError(f"{path}:{number} is neither JSON nor a Python dict ({type(error).__name__}).") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}:{number} holds {type(value).__name__} where a dict is expected.")
    return value


def _as(value: Any, kind: Any) -> Any:
    if value is None:
        return None
    if kind == pl.String:
        return value if isinstance(value, str) else str(value)
    if kind == pl.List(pl.String):
        return [str(part) for part in _flat(value)]
    return value


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _flat(part)
    elif value is not None:
        yield value


def text_lines(path: Path, encoding: str | None = None) -> Iterator[tuple[int, str]]:
    """(line number, line) of a small text file: UTF-8, and Latin-1 where it is not UTF-8, unless ``encoding`` names another."""
    with open_binary(path) as file:
        data = file.read()
    if encoding is None:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = data.decode("latin-1")
    else:
        text = data.decode(encoding)
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.rstrip("\r")
        if line.strip():
            yield number, line
