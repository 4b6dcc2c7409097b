"""Small raw files in the formats of the sources, quirks included; all of it is made up."""

from __future__ import annotations

import pytest
from raw_files import written

from recbole_llm.cli import main


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
