"""Small raw files in the formats of the sources, quirks included; all of it is made up."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from recbole_llm.cli import main
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


@pytest.fixture
def prepare(tmp_path, capsys):
    """Run the command on ``tmp_path/raw``; give (interactions, items, what was printed)."""

    def run(name: str, *words: str, folder: str = ""):
        code = main(["prepare", name, f"--raw-dir={tmp_path / 'raw'}", *words])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        inter, item = written(tmp_path / "dataset" / (folder or name))
        return inter, item, printed.out

    return run


def count(printed: str, what: str) -> int:
    """The number behind ``what`` in the printed counts."""
    row = next(line for line in printed.splitlines() if line.strip().startswith(what))
    return int(row.split()[-1].replace(",", ""))
