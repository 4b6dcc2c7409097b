"""A handful of the cases of ``make fuzz``, of which each once went wrong, and of the machine that judges them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).with_name("fuzz.py")

# Key and value; what they end as.
CASES = {
    ("teacher_settings", "[{name: a}]"): "refused",
    ("clip_grad_norm", "{max_norm: -1}"): "refused",
    ("seed", "4294967296"): "refused",
    ("results_file", "/dev/null"): "refused",
    ("user_inter_num_interval", "1,5"): "refused",
    ("prompt_goal", ""): "run",
    ("dataset", "\x1b[31mred"): "refused",
}


@pytest.mark.slow
def test_odd_values_end_as_a_run_or_in_one_sentence(tmp_path):
    code = (
        "import json, sys, pathlib; sys.path.insert(0, sys.argv[1]); import fuzz, forks; forks.import_library()\n"
        "folder = pathlib.Path(sys.argv[2]); data = fuzz.prepare(folder); owners = fuzz.keys()\n"
        "cases = json.loads(sys.argv[3])\n"
        "ended = [fuzz.run_case(fuzz.arguments(owners[k][0], k, v, data), folder / str(n)) for n, (k, v) in enumerate(cases)]\n"
        "print('\\n' + json.dumps([[outcome.kind, outcome.text] for outcome in ended]))"
    )
    arguments = [str(FUZZ.parent), str(tmp_path), json.dumps(list(CASES))]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert {case: kind for case, (kind, _) in zip(CASES, outcomes, strict=True)} == CASES, outcomes


@pytest.fixture
def fuzz(monkeypatch):
    monkeypatch.syspath_prepend(FUZZ.parent)
    import fuzz

    return fuzz


@pytest.mark.parametrize(
    ("ended", "kind"),
    [
        ((0, "a table", "", 1), "run"),
        ((2, "", "Error: no", 1), "refused"),
        ((2, "LLMSTAR FAILED", "", 1), "refused"),
        ((2, "", "", 1), "no sentence"),
        ((2, "", "Error: no", 60), "slow refusal"),
        ((1, "", "Traceback (most recent call last)", 1), "traceback"),
        ((0, "Traceback (most recent call last)", "", 1), "traceback"),
        ((0, "\x1b[31mred", "", 1), "raw escape"),
        ((-11, "", "", 1), "exit code -11"),
        ((None, "", "", 121), "too slow"),
    ],
)
def test_what_is_wrong_is_seen(fuzz, tmp_path, ended, kind):
    assert fuzz.judge(*ended, tmp_path).kind == kind


def test_evaluated_text_is_seen(fuzz, tmp_path):
    (tmp_path / fuzz.MARK).touch()
    assert fuzz.judge(0, "", "", 1, tmp_path).kind == "evaluated text"


def test_draws(fuzz):
    drawn = fuzz.cases(None, 3, per_key=2, only=("seed", "tuning"))
    assert sorted(key for _, key, _ in drawn) == ["seed", "seed", "tuning", "tuning"] and len(set(drawn)) == 4
    assert fuzz.cases(None, 3, per_key=2, only=("seed", "tuning")) == drawn
    assert len({key for _, key, _ in fuzz.cases(None, 0, per_key=1)}) == len(fuzz.keys()) > 200
    assert len(fuzz.cases(50, 0)) == 50
