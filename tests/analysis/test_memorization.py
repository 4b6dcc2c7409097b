"""Lines that an LLM knows by heart are told from those that it guesses."""

from __future__ import annotations

import pytest

from recbole_llm.analysis import memorization
from recbole_llm.analysis.command import run
from recbole_llm.analysis.job import Job
from recbole_llm.analysis.memorization import MemorizationSettings, Questions, analyze, ask_for, count, format_results
from recbole_llm.data.prepare import generate_chain
from recbole_llm.errors import UserError


def test_questions_end_with_the_key_and_hold_no_answer():
    keys, values = [f"k{n}" for n in range(30)], [f"value {n}" for n in range(30)]
    asked = ask_for(keys, values, ["guess"] * 30, MemorizationSettings(questions=10, shown=3))
    assert len(asked.prompts) == len(asked.answers) == len(set(asked.answers)) == 10
    for prompt, answer in zip(asked.prompts, asked.answers, strict=True):
        number = int(answer.split()[1])
        lines = prompt.split("\n")
        assert lines == [*(f"k{n}\tvalue {n}" for n in range(number - 3, number)), f"k{number}\t"]
    again = ask_for(keys, values, ["guess"] * 30, MemorizationSettings(questions=10, shown=3))
    assert asked == again != ask_for(keys, values, ["guess"] * 30, MemorizationSettings(questions=10, shown=3, draw_seed=1))
    assert len(ask_for(keys, values, ["guess"] * 30, MemorizationSettings(questions=100, shown=3)).answers) == 27
    assert ask_for(["a"], ["b"], ["c"], MemorizationSettings()).prompts == ["a\t"]


def test_right_answers_are_counted():
    asked = Questions(["1\t", "2\t", "3\t", "4\t"], ["Toy Story (1995)", "Heat", "Casino", "Babe"], ["Heat"] * 4)
    found = count(asked, ["toy  story (1995)\n2\tHeat", "Heat 2", "", "Babe"])
    assert (found["asked"], found["right"], found["share"], found["guess"]) == (4, 2, 0.5, 0.25)
    # Wilson's interval of 2 of 4 by hand: (p + z2/2n -+ z sqrt(pq/n + z2/4n2)) / (1 + z2/n), z = 1.96
    assert found["interval"] == pytest.approx([0.15004, 0.84996], abs=1e-4)
    assert found["examples"] == [["1", "Toy Story (1995)"], ["4", "Babe"]]


@pytest.fixture
def job(tmp_path):
    """Of a generated chain, for the tiny LLM."""
    generate_chain(tmp_path / "data", "chain", users=30, items=12, seed=1, noise=0.1)
    settings = {"backbone": "tiny", "use_gpu": False, "data_path": str(tmp_path / "data")}
    return Job("chain", settings=settings, output=str(tmp_path / "analyses"))


def test_an_llm_is_asked_and_its_answers_are_kept(job, monkeypatch):
    (result,) = analyze(job, MemorizationSettings(questions=8, shown=1))
    assert {name: found["asked"] for name, found in result["questions"].items()} == {"titles": 8, "interactions": 8}
    assert all(found["share"] < 0.5 for found in result["questions"].values())  # its weights are random
    assert "by guessing" in format_results([result])
    monkeypatch.setattr(memorization, "greedy", None)  # is not asked again
    assert analyze(job, MemorizationSettings(questions=8, shown=1))[0]["read"]


def test_an_llm_that_knows_all_is_found(job, monkeypatch):
    monkeypatch.setattr(memorization, "answer", lambda backbone, questions, *costs: list(questions.answers))
    (result,) = analyze(job, MemorizationSettings(questions=8))
    assert all(found["share"] == 1 for found in result["questions"].values())


@pytest.mark.parametrize("name, value", [("questions", 0), ("shown", -1), ("draw_seed", 1.5)])
def test_settings_are_checked(name, value):
    with pytest.raises(UserError, match=name):
        MemorizationSettings(**{name: value})
    with pytest.raises(UserError, match=name):
        run(["memorization", "--dataset=ml-100k", f"--{name}={value}"])
