"""The notebook runs from top to bottom; its parameters are replaced by those of a small run."""

from __future__ import annotations

import json
from pathlib import Path

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


def test_quickstart_notebook(tiny_settings, monkeypatch, capsys):
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    small = {**tiny_settings, "epochs": 1, "SASRec.epochs": 1, "teacher_settings": {}, "checkpoint_dir": "saved"}
    for key in ("hidden_size", "inner_size", "n_layers"):
        small[f"SASRec.{key}"] = tiny_settings["teacher_settings"][key]
    names: dict = {}
    for cell in cells:
        assert not cell["outputs"], "outputs are not kept: they would age"
        exec(compile(cell["source"], NOTEBOOK.name, "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert {"models", "dataset", "settings"} <= names.keys()
            names.update(dataset="chain", settings=small)
    printed = capsys.readouterr().out
    assert "LLMSRec" in printed and "toprule" in printed
    page = Path("report.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>") and "LLMSRec" in page
