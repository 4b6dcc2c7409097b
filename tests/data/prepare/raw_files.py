"""Raw files in the sources' formats, written and read back by the tests of preparing data."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from recbole_llm.data.atomic import read_table


def lines(path: Path, *records: str, encoding: str = "utf-8", end: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(record + end for record in records).encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def json_lines(path: Path, *records: dict) -> Path:
    return lines(path, *map(json.dumps, records))


def written(folder: Path) -> tuple[dict, dict]:
    """Columns of a dataset's interactions and items."""
    return tuple(read_table(folder / f"{folder.name}.{kind}").columns for kind in ("inter", "item"))


def count(printed: str, what: str) -> int:
    """The number behind ``what`` in the printed counts."""
    row = next(line for line in printed.splitlines() if line.strip().startswith(what))
    return int(row.split()[-1].replace(",", ""))
