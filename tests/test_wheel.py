"""The wheel holds all that the checkout does: installed into an empty environment, the YAML files are found."""

import importlib.metadata
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


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_what_recbole_needs_is_required_and_on_python_3_12_neither_recbole_nor_ray(installed, python):
    """pip finds no ray that recbole 1.2.1 takes after Python 3.11."""
    from packaging.requirements import Requirement

    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}

    def needed(lines) -> dict[str, Requirement]:
        found = [Requirement(line) for line in lines]
        return {one.name: one for one in found if one.marker is None or one.marker.evaluate(environment)}

    ask = "import importlib.metadata as m; print(*m.requires('recbole-llm'), sep='\\n')"
    ours = needed(call(installed / "python", "-c", ask).splitlines())
    recboles = needed(importlib.metadata.requires("recbole"))
    assert "ray" in recboles and "ray" not in ours
    assert ("recbole" in ours) == (python == "3.11")
    if python != "3.11":
        assert set(recboles) - {"ray"} <= set(ours)
        for name in ("colorlog", "colorama"):  # pinned there
            assert str(ours[name].specifier) == str(recboles[name].specifier)


@pytest.mark.parametrize(("python", "options"), [((3, 11), ""), ((3, 13), " --no-deps")])
def test_where_recbole_is_missing_a_sentence_says_what_to_type(python, options):
    code = f"""
import importlib.machinery, sys
find = importlib.machinery.PathFinder.find_spec
hidden = lambda cls, name, *rest: None if name == "recbole" else find(name, *rest)
importlib.machinery.PathFinder.find_spec = classmethod(hidden)
import recbole_llm
sys.version_info = {python}
from recbole_llm import cli
assert cli.main(["run", "--model=SASRec", "--dataset=ml-100k"]) == 2
try:
    from recbole.quick_start import run_recbole
except ImportError as error:
    print(error.name, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sentence = f"RecBole is not installed: pip install{options} recbole==1.2.1"
    assert done.stdout.startswith(f"recbole {sentence}") and done.stderr.startswith(f"Error: {sentence}")
    assert len(done.stderr.splitlines()) == 1
