"""The rooms of the package: imports run one way, from the command line down to losses and errors."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import recbole_llm
from recbole_llm.registry import MODELS

PACKAGE = Path(recbole_llm.__file__).parent

# From the top floor down: a room imports from its own floor's modules and from the floors below it.
ORDER = (
    "__main__ cli serving answers plugin tuning analysis quick_start run_model configure fused preflight recommend exported "
    "loading model trainer recommender teacher results evaluation backbone prompt data config registry checkpoint lock loss "
    "processes compat files errors _version"
).split()


def imports_of(file: Path) -> Iterator[str]:
    """The modules of this package that ``file`` imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith("recbole_llm"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("recbole_llm"):
            if node.module == "recbole_llm":
                yield from (f"recbole_llm.{name.name}" for name in node.names)
            else:
                yield node.module


def room_of(module: str) -> str:
    return module.split(".")[1]


def files() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def module_of(file: Path) -> str:
    return ".".join(("recbole_llm", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def test_every_room_has_its_floor():
    assert {room_of(module_of(file)) for file in files()} <= set(ORDER)


def test_imports_run_down():
    wrong = [
        f"{module_of(file)} imports {module}"
        for file in files()
        for module in imports_of(file)
        if ORDER.index(room_of(module)) < ORDER.index(room_of(module_of(file)))
    ]
    assert wrong == []


def test_no_circle_within_a_room():
    below = {module_of(file): set(imports_of(file)) for file in files()}
    while below:
        free = {module for module, needs in below.items() if not needs & (below.keys() - {module})}
        assert free, f"these modules import each other: {sorted(below)}"
        below = {module: needs for module, needs in below.items() if module not in free}


@pytest.mark.parametrize("room", ["prompt", "backbone"])
def test_no_model_is_named_below_the_models(room):
    """Neither in code nor in comments: what a model adds to a prompt or an LLM is a setting that it hands in."""
    names = re.compile(rf"\b({'|'.join(map(re.escape, MODELS))})\b")
    named = [
        f"{file.relative_to(PACKAGE)}, line {number}: {line.strip()}"
        for file in sorted((PACKAGE / room).rglob("*.py"))
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if names.search(line)
    ]
    assert named == []
