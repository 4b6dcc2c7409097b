"""Every command in the documentation resolves as it stands: its words, keys, values, models and files are right.

Nothing is trained: the configurations of all its models are built, as the first step of the command does.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from recbole_llm import cli, configure, quick_start
from recbole_llm.config.command_line import parse_command_line
from recbole_llm.config.protocols import protocol_names, without_list

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = "run|analyze|table|report|runs|recommend|export|serve|prepare|clean"
RUN = re.compile(rf"(?:python run_recbole_llm\.py|recbole-llm (?:{COMMANDS}))\b")


def commands() -> list:
    """The commands in code blocks, as (page and number, words); lines that end in a backslash go on."""
    found = []
    for page in PAGES:
        number = 0
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"```(?:bash|console|sh)?\n(.*?)```|((?:^    .*\n)+)", text, re.M | re.S):
            for line in "".join(block).replace("\\\n", " ").splitlines():
                line = line.strip().removeprefix("$ ")
                if RUN.match(line) and "..." not in line.split("#")[0].replace("saved/", "").replace("-...", ""):
                    number += 1
                    name = f"{page.relative_to(ROOT)}-{number}"
                    is_long = line.count(",") > 25
                    found.append(pytest.param(line, id=name, marks=[pytest.mark.slow] * is_long))
    return found


@pytest.mark.parametrize("line", commands())
def test_a_documented_command_resolves(line, tmp_path, monkeypatch, capsys):
    words = shlex.split(line, comments=True)
    words = ["run", *words[2:]] if words[0] == "python" else words[1:]
    words = [re.sub(r"\b(properties|benchmarks)/", rf"{ROOT}/\1/", word) for word in words]
    if words[0] == "run":
        configured = []

        def configure_all(models, dataset, seeds=(), config_file_list=None, settings=None, on_row=None):
            settings = without_list(settings or {}, protocol_names((settings or {}).get("protocol")))
            for name in [name for name in models if "+" not in name]:
                configured.append(configure.configure(name, dataset, models, None, config_file_list, settings))
            return []

        monkeypatch.setattr(quick_start, "compare", configure_all)
        monkeypatch.setattr("recbole_llm.config.settings.check_dataset", lambda dataset, folder: None)
        monkeypatch.setattr("recbole_llm.config.first_look.check_dataset", lambda dataset, folder: None)
        for word in words:  # files of the user's own, that the page tells to write
            if word.startswith("--config_files=") and not Path(word.partition("=")[2]).exists():
                Path(word.partition("=")[2]).write_text("{}")
        words = [word for word in words if not word.startswith("--nproc=")]  # it would start other processes, which run
        assert cli.main(words) == 0, capsys.readouterr().err
        assert configured or "--help" in words
        return
    if words[0] == "prepare":
        return  # its own parser reads it; tests of prepare
    settings = parse_command_line([word for word in words[1:] if word.startswith("-")], flags=("yes", "unfinished", "size"))
    assert isinstance(settings, dict)


def test_there_are_commands():
    lines = [parameter.values[0] for parameter in commands()]
    assert len(lines) > 25 and sum("run_recbole_llm.py" in line or "recbole-llm run" in line for line in lines) > 15
