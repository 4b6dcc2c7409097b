"""What tests/readme_commands.py finds in README.md, and that it sees what goes wrong. The commands: make commands."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from readme_commands import ROOT, Step, make_small, run, steps_of

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_command_of_the_readme_is_a_step():
    steps = steps_of(README)
    shell = [step.text for step in steps if step.kind == "shell"]
    assert all(re.match(r"(make|pip|python|recbole-llm) ", text) for text in shell), shell
    page = re.sub(r"\\\n\s*", "", README)
    lines = [line.strip() for line in page.splitlines() if re.match(r" *(make \w+$|pip |python run_|recbole-llm )", line)]
    assert lines == shell and len(shell) >= 11
    assert README.count("```python") == sum(step.kind == "python" for step in steps) == 2


def test_blocks_of_a_page():
    page = "text\n\n    make x\n\n```bash\npip a \\\n    b  # why\n\nls\n```\n\n```\noutput\n```\n"
    page += "\n```python\nimport os\nos\n```\n"
    texts = [("shell", "make x"), ("shell", "pip a b  # why"), ("shell", "ls"), ("python", "import os\nos\n")]
    assert steps_of(page) == [Step(*text) for text in texts]
    with pytest.raises(ValueError, match="an unknown kind, ruby"):
        steps_of("```ruby\n1\n```\n")


@pytest.mark.parametrize(
    ("kind", "text", "problem"),
    [
        ("shell", "true", ""),
        ("shell", "false", "exit code 1"),
        ("shell", "echo FAILED", "FAILED"),
        ("python", "print(1)", ""),
        ("python", "raise SystemExit(3)", "exit code 3"),
    ],
)
def test_what_goes_wrong_is_told(tmp_path, kind, text, problem):
    (tmp_path / "checkout").mkdir()
    found = run(Step(kind, text), tmp_path / "checkout", dict(os.environ), small=False)
    assert found.startswith(problem) if problem == "exit code 1" else problem in found
    assert bool(found) == bool(problem)


def test_a_small_run_is_prepared(tmp_path):
    (tmp_path / "properties/dataset").mkdir(parents=True)
    (tmp_path / "properties/dataset/ml-100k.yaml").write_text((ROOT / "properties/dataset/ml-100k.yaml").read_text())
    make_small(tmp_path)
    assert "backbone: tiny" in (tmp_path / "properties/dataset/ml-100k.yaml").read_text()
    assert len(list(Path(tmp_path, "dataset/raw/amazon-2023").iterdir())) == 4
