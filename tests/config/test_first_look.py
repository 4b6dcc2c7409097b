"""Misspelled words are told before RecBole and PyTorch are imported, by the sentence that the full check would say."""

from __future__ import annotations

import subprocess
import sys

import pytest

from recbole_llm.config.checks import stock_class
from recbole_llm.config.first_look import first_look
from recbole_llm.config.stock_sources import keys_read_by
from recbole_llm.configure import configure
from recbole_llm.errors import UserError
from recbole_llm.registry import BASELINES, stock_models

HEAVY = "torch", "transformers", "recbole", "pandas", "numpy"

WRONG = {
    "model": (["-m", "LLMSTARR", "-d", "ml-100k"], "There is no model named 'LLMSTARR'; did you mean 'LLMSTAR'?"),
    "variant": (["-m=SASRek:b", "-d=ml-100k"], "There is no model named 'SASRek'; did you mean 'SASRec'?"),
    "dataset": (["-m", "SASRec", "-d", "ml-10k"], "unknown dataset 'ml-10k'"),
    "not prepared": (["-m", "SASRec", "-d", "amazon-cds"], "run `recbole-llm prepare amazon-cds`"),
    "key": (["-m", "SASRec", "-d", "ml-100k", "--epohcs=3"], "unknown key 'epohcs' (command line); did you mean 'epochs'?"),
    "another program's key": (
        ["-m", "LLMSRec", "-d", "ml-100k", "--lr=1"],
        "unknown key 'lr' (command line); did you mean 'learn",
    ),
    "key of a variant": (["-m", "LLMSTAR,LLMSTAR:b", "-d", "ml-100k", "--LLMSTAR:b.bta=1"], "unknown key 'bta'"),
    "value": (["-m", "LLMSRec", "-d", "ml-100k", "--epochs=x"], "epochs must be a whole number > 0, not 'x' (command line)."),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistake_is_told_without_heavy_imports(case, tmp_path, monkeypatch):
    words, sentence = WRONG[case]
    script = f"""
import sys
from recbole_llm.cli import main
code = main(["run", *{words!r}])
print(sorted(set({HEAVY!r}) & set(sys.modules)))
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr.startswith("Error: ") and sentence in done.stderr and done.stderr.count("\n") == 1
    assert (done.returncode, done.stdout) == (2, "[]\n")


def test_import_and_help_take_neither_recbole_nor_pytorch():
    script = (
        f"import recbole_llm, sys; from recbole_llm.cli import main; main(['run', '--help']); "
        f"print(set({HEAVY!r}) & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\nset()\n") and "LLMSTAR" in done.stdout


@pytest.mark.slow
def test_recbole_that_was_imported_before_knows_the_models():
    script = "import recbole.utils, recbole_llm; print(recbole.utils.get_model('LLMSTAR').__module__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "recbole_llm.model.llmstar\n"


def test_file_and_line_of_a_wrong_key(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 3\nlearnin_rate: 1\n")
    with pytest.raises(UserError, match=rf"unknown key 'learnin_rate' \({file}:2\); did you mean 'learning_rate'"):
        first_look(["LLMSTAR"], "ml-100k", {}, [str(file)])


def test_what_only_the_full_check_can_judge_passes():
    first_look(["SASRec", "LLMSRec"], "ml-100k", {"GRU4Rec.epochs": 3, "n_heads": 1, "confidence": "none"})
    first_look(["SASRec", "LLMSRec"], "ml-100k", {"eval_step": 0.5})  # a training key, which the baseline does not take over
    with pytest.raises(UserError, match="eval_step must be a whole number"):
        first_look(["SASRec"], "ml-100k", {"eval_step": 0.5})


def test_a_key_of_training_is_no_baselines_key_beside_an_llm_recommender():
    first_look(["SASRec", "LLMSRec"], "ml-100k", {"eval_step": 0.5})
    for models, name in ((["SASRec"], "eval_step"), (["SASRec", "LLMSRec"], "SASRec.eval_step")):
        with pytest.raises(UserError, match="eval_step must be a whole number"):
            first_look(models, "ml-100k", {name: 0.5})


@pytest.mark.parametrize("model", stock_models())
def test_keys_of_a_stock_model_are_those_that_its_classes_read(model):
    """They are read without importing the model; the same are found by its class and base classes."""
    model_class = stock_class(model)
    if model in BASELINES:
        pytest.skip(f"{model} is of this library: its file of settings lists its keys")
    if model_class is None:
        pytest.skip(f"{model} needs a library of its own")
    assert set(keys_read_by(model)) == set(keys_read_by(model_class))


def test_plain_key_of_a_teacher_holds_for_it_in_both_roles():
    """One SASRec, trained once: not a baseline with one head and a teacher with two."""
    given = {"n_heads": 1, "SASRec.n_layers": 1}
    baseline, student = (configure(name, "ml-100k", ["SASRec", "LLMSTAR"], 1, None, given) for name in ("SASRec", "LLMSTAR"))
    assert (baseline["n_heads"], baseline["n_layers"]) == (1, 1)
    assert student["teacher_settings"] == {"n_heads": 1, "n_layers": 1}
    with pytest.raises(UserError, match="'n_heads' is a key of the teacher SASRec, not of LLMSTAR"):
        configure("LLMSTAR", "ml-100k", ["LLMSTAR"], 1, None, {"n_heads": 1})


def test_training_settings_of_the_llm_may_not_fit_a_baseline(tmp_path):
    """Half an epoch between validations: RecBole counts whole ones, and a baseline keeps its own."""
    file = tmp_path / "half.yaml"
    file.write_text("eval_step: 0.5\n")
    first_look(["SASRec", "LLMSRec"], "ml-100k", {}, [str(file)])
    with pytest.raises(UserError, match="eval_step"):
        first_look(["SASRec"], "ml-100k", {}, [str(file)])
    with pytest.raises(UserError, match="eval_step"):
        first_look(["SASRec", "LLMSRec"], "ml-100k", {"SASRec.eval_step": 0.5})


def test_models_of_a_fused_row_are_known():
    first_look(["SASRec", "LLMSRec", "SASRec+LLMSRec"], "ml-100k", {})
    with pytest.raises(UserError, match="LLMSRek"):
        first_look(["SASRec", "SASRec+LLMSRek"], "ml-100k", {})


def test_a_baseline_keeps_what_a_file_says_of_it_alone(tmp_path):
    """``--epochs`` is for the LLM recommenders, whatever a file says of the baseline's."""
    file = tmp_path / "epochs.yaml"
    file.write_text("SASRec.epochs: 15\nepochs: 1\n")

    def epochs(**settings):
        models = ["SASRec", "LLMSRec"]
        return [configure(name, "ml-100k", models, None, [file], settings)["epochs"] for name in models]

    assert epochs(epochs=2) == [15, 2] and epochs() == [15, 1] and epochs(**{"SASRec.epochs": 5}) == [5, 1]
