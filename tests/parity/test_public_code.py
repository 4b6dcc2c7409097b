"""Our prompts, representations, losses and gradients against figures of the models' public code: see README.md."""

import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
FIGURES = json.loads((FOLDER / "figures.json").read_text(encoding="utf-8"))
GROUPS = {group["group"]: group for group in FIGURES}
FAST = {"LLM-SRec, losses", "SASRec, loss", "A-LLMRec, stage 1", "LLM-SRec", "ST2SI"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The scene's data and LLM, shared by the models; and this folder's modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        patch.setattr(sys, "argv", ["pytest"])
        import ours

        yield ours.Place(tmp_path_factory.mktemp("parity"))


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in GROUPS]
)
def test_ours_is_what_the_public_code_gives(name, place):
    """Theirs was computed in float64, ours of whole models in float32."""
    import ours

    group = GROUPS[name]
    made, differs = ours.OURS[name](place, group.get("candidates")), group.get("differs", {})
    assert list(made) == list(group["figures"])
    for quantity, value in group["figures"].items():
        if quantity in differs:
            assert made[quantity] != value, "no longer different: say so in figures.json"
        elif isinstance(value, str):
            assert made[quantity] == value, quantity
        else:
            assert made[quantity] == pytest.approx(value, rel=5e-5, abs=2e-6), quantity


def test_every_model_with_public_code_is_compared():
    assert {group["model"] for group in FIGURES} == {
        "LLM-SRec", "SASRec", "TALLRec", "LLaRA", "CoLLM", "A-LLMRec", "ST2SI"
    }  # fmt: skip


def test_the_page_has_every_figure():
    page = (FOLDER.parents[1] / "docs" / "parity.md").read_text(encoding="utf-8")
    for group in FIGURES:
        assert f"`{group['commit'][:12]}`" in page
        for quantity, value in group["figures"].items():
            shown = f"| {quantity} | {value:.7g} |" if isinstance(value, float) else f"| {quantity} | text |"
            assert shown in page, "run: python docs/parity.py"


def test_which_answers_name_a_candidate():
    """LLaRA's ``calculate_hr1``: four of six name one, three of them the target: ``(0.6666666666666666, 0.75)`` there."""
    from recbole_llm.recommender.generation import CandidateGenerator

    generator = object.__new__(CandidateGenerator)
    generator.match = "substring"
    answers = ["1. Toy Story", 'I recommend "Toy Story"', "toy story or heat", "Fargo", "Heat", "Toy Story"]
    named = [generator.named_title(answer, ["toy story", "heat", "alien"]) for answer in answers]
    valid = [name for name in named if name is not None]
    assert (len(valid) / 6, valid.count("toy story") / len(valid)) == (0.6666666666666666, 0.75)


def test_long_attributes_of_st2si():
    """``tokenize_items`` cuts an attribute at 32 tokens, its name among them."""
    import numpy as np

    from recbole_llm.prompt.sequence import SequencePrompts, SequencePromptSettings

    prompts = SequencePrompts(
        lambda texts: [[ord(character) for character in text] for text in texts],
        [(), ("Hat", "brand: Acme"), ("Red shoes", "brand: " + "B" * 40)],
        SequencePromptSettings(separator=" ", query_ids=(ord("."),)),
    )
    batch = prompts.sequences(np.array([[1, 2]]), np.array([2]))
    text = "".join("." if token == -2 else chr(token) for token in batch.tokens)
    assert text == "Hat brand: Acme." + "Red shoes brand: BBBBBBBBBBBBBBBBBBBBBBBB."
