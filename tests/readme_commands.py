"""Run what README.md tells the reader to type, as it stands and in its order, in a clean copy of the checkout.

    python tests/readme_commands.py --small     # a minute; what .ci/run does
    python tests/readme_commands.py             # everything in full size, with an installation of its own; hours

A small run changes no command. In the copy, ml-100k has a few users and one epoch, and the default LLM is the tiny random
one (``properties/dataset/ml-100k.yaml``); the raw files of amazon-cds are there already; pip only says what it would install.
Python's commands run in forks of one process that has imported PyTorch. What it leaves to the full run is printed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SMALL = """
# A small run of README's commands: the users with 39 or 40 ratings, 196 among them; one epoch; the tiny random LLM.
user_inter_num_interval: "[39, 40]"
epochs: 1
backbone: tiny
show_progress: False
history_length: 3
MAX_ITEM_LIST_LENGTH: 10
"""
# What a small run leaves out, and why.
TOO_LONG = {
    "make quickstart": "it installs everything and trains on a real LLM",
    "make test": "it is the test suite",
}


class Step(NamedTuple):
    """What a reader is told to do: ``shell`` a command line, or ``python`` a script."""

    kind: str
    text: str


def steps_of(page: str) -> list[Step]:
    """The commands and scripts of a Markdown page, in order.

    Shell commands stand in blocks marked ``bash`` or indented by four spaces, one on a line (a backslash at its end continues
    it), scripts in blocks marked ``python``. A block without a mark is output.
    """
    found = []
    for kind, fenced, indented in re.findall(r"^```(\w*)\n((?:.*\n)*?)```$|((?:^ {4}.*\n)+)", page, re.M):
        if kind == "python":
            found.append(Step("python", fenced))
        elif kind == "bash" or indented:
            lines = re.sub(r"\\\n\s*", "", fenced or indented).splitlines()
            found += [Step("shell", line.strip()) for line in lines if line.strip()]
        elif kind:
            raise ValueError(f"README has a block of an unknown kind, {kind}")
    return found


def copy_checkout(folder: Path) -> None:
    """Copy what git knows, or would add, of this checkout to ``folder``."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def make_small(checkout: Path) -> None:
    """Prepare a copy for a small run; see the module's docstring."""
    with open(checkout / "properties/dataset/ml-100k.yaml", "a", encoding="utf-8") as file:
        file.write(SMALL)
    raw = checkout / "dataset/raw/amazon-2023"
    raw.mkdir(parents=True)
    rows = [(f"U{user}", f"B{place}", 5.0, 10**12 + place) for user in range(24) for place in range(8)]
    for split, places in (("train", range(6)), ("valid", [6]), ("test", [7])):
        lines = [",".join(map(str, row)) for row in rows if row[3] - 10**12 in places]
        _write(raw / f"CDs_and_Vinyl.{split}.csv.gz", ["user_id,parent_asin,rating,timestamp", *lines])
    items = [json.dumps({"parent_asin": f"B{item}", "title": f"Album {item}"}) for item in range(8)]
    _write(raw / "meta_CDs_and_Vinyl.jsonl.gz", items)


def _write(file: Path, lines: list[str]) -> None:
    file.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode()))


def environment(checkout: Path, small: bool) -> dict[str, str]:
    """The environment of the commands: this installation in a small run, the copy's own in a full one."""
    programs = Path(sys.executable).parent if small else checkout / ".venv" / "bin"
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "MAKE", "MFLAGS"))}
    own |= {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(checkout)}
    if small:
        own |= {"PIP_DRY_RUN": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_DEPS": "1"}
    return own


def run(step: Step, checkout: Path, variables: dict[str, str], small: bool) -> str:
    """Run one step; returns what is wrong with it, empty where nothing is."""
    words = shlex.split(step.text, comments=True) if step.kind == "shell" else ["python"]
    output = checkout.parent / "output"
    with open(output, "w", encoding="utf-8") as stream:
        if small and words[0] in ("python", "recbole-llm"):
            code = _fork(step, words, checkout, stream.fileno())
        else:
            command = ["bash", "-e", "-c", step.text] if step.kind == "shell" else ["python", "-c", step.text]
            kept = {"stdin": subprocess.DEVNULL, "stdout": stream, "stderr": subprocess.STDOUT}
            code = subprocess.run(command, cwd=checkout, env=variables, **kept).returncode
    text = output.read_text(encoding="utf-8", errors="replace")
    signs = [sign for sign in ("FAILED", "Traceback (most recent call last)") if sign in text]
    return f"exit code {code}\n{text[-3000:]}" if code or signs else ""


def _fork(step: Step, words: list[str], checkout: Path, output: int) -> int:
    """Run a command of Python's as the shell would, in a fork of this process; returns its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        os.chdir(checkout)
        for number in (1, 2):
            os.dup2(output, number)
        if step.kind == "python":
            sys.argv = ["-c"]
            exec(compile(step.text, "README.md", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = words[1:] if words[0] == "python" else [str(Path(sys.executable).parent / words[0]), *words[1:]]
            runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code & 255)


def run_all(steps: list[Step], checkout: Path, small: bool) -> Iterator[str]:
    """Run the steps in order; yields the problem of each that has one."""
    variables = environment(checkout, small)
    if small:
        sys.path.insert(0, str(checkout))
        import recbole_llm.quick_start  # the copy's, once for all forks

        assert Path(recbole_llm.__file__).is_relative_to(checkout)
    for step in steps:
        title = step.text.split("  #")[0].strip() if step.kind == "shell" else f"python: {step.text.strip().splitlines()[-1]}"
        if small and step.text in TOO_LONG:
            print(f"  left out   {title}: {TOO_LONG[step.text]}", flush=True)
            continue
        started = time.perf_counter()
        problem = run(step, checkout, variables, small)
        print(f"  {'WRONG' if problem else 'ok':<5} {time.perf_counter() - started:>6.1f} s   {title}", flush=True)
        if problem:
            yield f"{title}: {problem}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="on tiny data with a tiny LLM")
    arguments = parser.parse_args()
    steps = steps_of((ROOT / "README.md").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder, "recbole-llm")
        copy_checkout(checkout)
        if arguments.small:
            make_small(checkout)
        started = time.perf_counter()
        problems = list(run_all(steps, checkout, arguments.small))
        print(f"{len(steps)} steps, {len(problems)} wrong, {time.perf_counter() - started:.0f} s")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems or not steps else 0


if __name__ == "__main__":
    sys.exit(main())
