"""The wheel holds all that the checkout does: installed into an empty environment, the YAML files are found."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def call(*command, **environment) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env={**os.environ, **environment}, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The bin folder of an environment that holds the wheel and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "build", "saved", "log*", "__pycache__", "tests")
    shutil.copytree(ROOT, source, ignore=ignored)
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source)
    call(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    binaries = folder / "venv" / "bin"
    install = ["install", "--no-index", "--no-deps", "-q", next(folder.glob("*.whl"))]
    call(sys.executable, "-m", "pip", "--python", binaries / "python", *install)
    return binaries


def test_every_yaml_file_is_in_an_empty_environment(installed):
    ask = "import importlib.metadata as m; print(*(f for f in m.files('recbole-llm') if f.suffix == '.yaml'), sep='\\n')"
    found = {Path(line).relative_to("recbole_llm/properties") for line in call(installed / "python", "-c", ask).split()}
    assert found == {file.relative_to(ROOT / "properties") for file in (ROOT / "properties").rglob("*.yaml")}


def test_the_wheel_says_that_it_has_type_hints(installed):
    ask = "import importlib.metadata as m; print(*m.files('recbole-llm'), sep='\\n')"
    assert "recbole_llm/py.typed" in call(installed / "python", "-c", ask).split()


def test_the_page_of_the_report_is_in_it(installed):
    ask = "import importlib.metadata as m; print(*m.files('recbole-llm'), sep='\\n')"
    found = set(call(installed / "python", "-c", ask).split())
    assert {f"recbole_llm/results/report/{name}" for name in ("page.html", "style.css", "page.js")} <= found
    assert {f"recbole_llm/serving/{name}" for name in ("page.html", "page.css", "page.js")} <= found


def test_the_installed_command_reads_them(installed):
    """What the library needs is lent from this environment; the library itself is the wheel's."""
    libraries = {"PYTHONPATH": sysconfig.get_paths()["purelib"]}
    code = f"""
import runpy, sys
import recbole_llm
print(recbole_llm.__file__)
sys.argv = ["recbole-llm", "run", "--help", "--model=LLMSTAR"]
runpy.run_path({str(installed / "recbole-llm")!r}, run_name="__main__")
"""
    where, *text = call(installed / "python", "-c", code, **libraries).splitlines()
    assert Path(where).is_relative_to(installed.parent)
    assert "train_negatives" in "\n".join(text)
