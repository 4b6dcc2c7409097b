"""``--model=SASRec,LLMSRec,SASRec+LLMSRec``: a row of two models as one."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from recbole_llm import cli
from recbole_llm.errors import UserError
from recbole_llm.evaluation.fusion import WEIGHTS
from recbole_llm.fused import check_parts
from recbole_llm.quick_start import compare
from recbole_llm.results.comparison import compare_rows
from recbole_llm.results.listing import list_runs
from recbole_llm.results.run import read_run
from recbole_llm.results.table import format_table

TINY = {
    "backbone": "tiny", "backbone_dtype": "float32", "head_hidden_size": 16, "representation_size": 8,
    "item_projection_hidden_size": 16, "eval_args": {"mode": "uni9"}, "topk": [1, 5], "valid_metric": "Hit@5", "epochs": 1,
    "eval_step": 1, "valid_users": 20, "show_progress": False, "use_gpu": False, "SASRec.epochs": 1, "SASRec.hidden_size": 8,
    "SASRec.inner_size": 16, "SASRec.n_layers": 1,
}  # fmt: skip


@pytest.mark.parametrize("seeds", [[1], [1, 2]], ids=str)
@pytest.mark.slow
def test_a_fused_row_stands_beside_its_models(chain_data, seeds):
    seen = []
    labels = ["SASRec", "SASRec+LLMSRec:b", "LLMSRec:b"]
    settings = {**TINY, "data_path": str(chain_data)}
    rows = compare(labels, "chain", seeds, settings=settings, on_row=lambda rows: seen.append([row["model"] for row in rows]))
    assert [(row["model"], row["seed"]) for row in rows] == [(label, seed) for seed in seeds for label in labels]
    assert seen[1] == ["SASRec", "LLMSRec:b", "SASRec+LLMSRec:b"], "made once both its models are there"
    for row in rows[1::3]:
        parts = {found["model"]: found for found in rows if found["seed"] == row["seed"]}
        assert row["test_set"] == parts["SASRec"]["test_set"] and np.array_equal(row["user_ids"], parts["SASRec"]["user_ids"])
        weights = row["record"]["settings"]["fusion_weights"]
        assert weights["LLMSRec:b"] in WEIGHTS and sum(weights.values()) == pytest.approx(1)
        stored = read_run(row["checkpoint"])
        assert stored.record == row["record"] and np.array_equal(stored.ranks()["ranks"], row["ranks"])
        assert stored.record["trained_parameters"] == sum(parts[name]["trained_parameters"] for name in weights)
        assert ":" not in Path(row["checkpoint"]).name
        valid, of_part = (found["record"]["metrics"]["valid"]["hit@5"] for found in (row, parts["LLMSRec:b"]))
        assert valid >= of_part, "weight 1 was among those tried"
    line = next(line for line in compare_rows(rows)[0].done if line.label == "SASRec+LLMSRec:b")
    assert line.difference is not None and line.difference.adjusted is not None and line.difference.seeds == len(seeds)
    assert "standardized scores, weights chosen on the validation set" in " ".join(format_table(rows).split())
    assert "SASRec+LLMSRec:b" in {found.model for found in list_runs("saved")}

    # The models are found again, and give the same row.
    again = compare(["LLMSRec:b", "SASRec", "SASRec+LLMSRec:b"], "chain", [1], settings=settings)
    assert again[2]["ranks"].tolist() == rows[1]["ranks"].tolist() and again[2]["checkpoint"] == rows[1]["checkpoint"]


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("SASRec+GRU4Rec", "GRU4Rec, which is no model of this run; name it too: --model=SASRec,LLMSRec,GRU4Rec,SASRec"),
        ("SASRec+", "a model without a name"),
        ("SASRec+SASRec", "two different models"),
        ("SASRec+LLMSRec+SASRec", "two different models"),
    ],
)
def test_names_that_make_no_row(label, words):
    with pytest.raises(UserError, match=re.escape(words)):
        check_parts(label, ["SASRec", "LLMSRec"])


@pytest.mark.parametrize(
    ("models", "settings", "words"),
    [
        (["SASRec", "LLaRA"], {"recommend_by": "generation"}, "LLaRA generates its answer"),
        (["SASRec", "TALLRec"], {"protocol": "yes_no", "recommend_by": "yes_no"}, "judges labels"),
    ],
)
def test_what_scores_no_candidates_is_refused_before_anything_is_trained(models, settings, words):
    with pytest.raises(UserError, match=words):
        compare([*models, "+".join(models)], "ml-100k", settings=settings)
    assert not Path("saved").exists()


def test_a_fused_row_on_the_command_line(chain_data, capsys):
    assert cli.main(["run", "--model=SASRec,SASRec+LLMSRec", "--dataset=chain", f"--data_path={chain_data}"]) == 2
    assert "LLMSRec, which is no model of this run" in capsys.readouterr().err
    assert cli.main(["run", "--model=SASRec,SASRec+LLMSRek", "--dataset=chain", f"--data_path={chain_data}"]) == 2
    assert "LLMSRek" in capsys.readouterr().err
