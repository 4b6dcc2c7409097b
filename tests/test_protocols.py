"""One training, tested under several protocols."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from recbole_llm import cli
from recbole_llm.config.first_look import first_look
from recbole_llm.config.protocols import protocol_names, under_protocols
from recbole_llm.config.settings import make_config
from recbole_llm.configure import configure
from recbole_llm.errors import UserError
from recbole_llm.loading import load_data_and_model
from recbole_llm.quick_start import compare
from recbole_llm.results.files import read_rows, write_json, write_per_user
from recbole_llm.results.reading import read_inputs
from recbole_llm.results.run import add_test, read_run
from recbole_llm.results.table import format_table
from recbole_llm.teacher import stock
from recbole_llm.trainer.trainer import LLMTrainer

SETTINGS = {
    "backbone": "tiny", "backbone_dtype": "float32", "head_hidden_size": 16, "representation_size": 8,
    "item_projection_hidden_size": 16, "epochs": 1, "eval_step": 1, "SASRec.epochs": 1, "SASRec.hidden_size": 8,
    "SASRec.inner_size": 16, "SASRec.n_layers": 1, "topk": [1, 5], "valid_metric": "Hit@5", "eval_args": {"mode": "uni9"},
    "use_gpu": False, "show_progress": False, "checkpoint_dir": "saved",
}  # fmt: skip
MODELS = ["SASRec", "LLMSRec"]


def never(*_arguments, **_options):
    raise AssertionError("this was done before")


def test_a_list_of_one_protocol_is_that_protocol(chain_data):
    """As a YAML file or a program may give it."""
    first_look(["SASRec"], "chain", {"protocol": ["full"], "data_path": str(chain_data)})
    for model, more in (("SASRec", {}), ("LLMSRec", {"backbone": "tiny"})):
        settings = {"protocol": ["full"], "data_path": str(chain_data), **more}
        config = configure(model, "chain", [model], None, None, settings)
        assert (config["protocol"], config["eval_args"]["mode"]["test"]) == ("full", "full")
    for wrong in (["ful"], [], [["full"]], [None]):
        with pytest.raises(UserError, match="protocol"):
            compare(["LLMSRec"], "chain", settings={**SETTINGS, "data_path": str(chain_data), "protocol": wrong})


@pytest.fixture
def further(trained, chain_data, monkeypatch):
    """Rows of models that were trained and tested under retrieval before, and now are tested under full, too."""
    shutil.copytree(trained["LLMSRec"].parent, "saved")
    for owner, name in ((LLMTrainer, "fit"), (stock, "_train")):
        monkeypatch.setattr(owner, name, never)
    return compare(MODELS, "chain", settings={**SETTINGS, "data_path": str(chain_data), "protocol": "retrieval,full"})


def test_a_trained_model_is_tested_under_further_protocols_without_training(further, trained, chain_data, monkeypatch):
    assert [(row["model"], row["record"]["protocol"]) for row in further] == [
        (model, protocol) for model in MODELS for protocol in ("retrieval", "full")
    ]
    for row in further:
        folder = Path(row["checkpoint"])
        assert folder.name == trained[row["model"]].name, "the same training has the same folder"
        run = read_run(folder)
        assert run.protocols == ["retrieval", "full"] and run.record["version"] == 2
        under = run.under(row["record"]["protocol"])
        assert under.test == row["metrics"] and np.array_equal(under.ranks()["ranks"], row["ranks"])
        assert under.record["settings"]["topk"] == [1, 5] and under.record["users"] == 60
    of_full = read_run(further[3]["checkpoint"]).under("full")
    assert set(of_full.test) == {"mrr@all", *(f"{name}@{cut}" for name in ("ndcg", "recall", "mrr") for cut in (1, 5))}
    assert of_full.record["settings"]["eval_args"]["mode"] == {"valid": "uni9", "test": "full"}
    assert of_full.record["valid_metric"] == "NDCG@1" and of_full.protocols == ["full"]
    # the same once more tests nothing
    for owner, name in ((LLMTrainer, "evaluate"), (stock, "_train")):
        monkeypatch.setattr(owner, name, never)
    monkeypatch.setattr("recbole_llm.run_model.evaluate", never)
    again = compare(MODELS, "chain", settings={**SETTINGS, "data_path": str(chain_data), "protocol": ["retrieval", "full"]})
    assert [row["metrics"] for row in again] == [row["metrics"] for row in further]
    assert [row["test_set"] for row in again] == [row["test_set"] for row in further] and len(set(map(str, again))) == 4


def test_the_ranks_are_those_of_the_protocol(further, chain_data):
    row = further[3]
    _, model, train, _, _, _ = load_data_and_model(row["checkpoint"], {"data_path": str(chain_data)})
    split = train.splits["test"]
    with torch.no_grad():
        scores = model.score(split.inter_feat, None)[:, 1:]
    own = scores.gather(1, split.inter_feat["item_id"][:, None] - 1)
    greater, equal = (scores > own).sum(1).numpy(), (scores == own).sum(1).numpy()
    assert (row["ranks"] > greater).all() and (row["ranks"] <= greater + equal).all()
    assert row["metrics"]["recall@5"] == pytest.approx((row["ranks"] <= 5).mean())


def test_tables_and_files_keep_the_protocols_apart(further):
    shown = format_table(further)
    assert shown.count("chain · protocol") == 2 and "hit@5 vs SASRec" in shown and "ndcg@1 vs SASRec" in shown
    of_folders = read_inputs(["saved"]).rows
    assert format_table(of_folders).count("chain · protocol") == 2
    assert [row["record"]["protocol"] for row in of_folders if "curve" in row] == ["retrieval"] * 2, "one training, one curve"
    write_json(further, "out.json")
    write_per_user(further, "users.tsv")
    assert [record["protocol"] for record in json.loads(Path("out.json").read_text())] == ["retrieval", "full"] * 2
    read = read_rows(["out.json", "users.tsv"])
    for row, before in zip(read, further, strict=True):
        assert row["metrics"] == before["metrics"] and np.array_equal(row["ranks"], before["ranks"])
    shutil.rmtree("saved")
    assert format_table(read).count("chain · protocol") == 2


def test_a_record_of_the_first_version_has_one_test(trained):
    shutil.copytree(trained["SASRec"], "old")
    file = Path("old/run.json")
    record = {**json.loads(file.read_text()), "version": 1}
    del record["tests"]
    file.write_text(json.dumps(record))
    assert read_run("old").protocols == ["retrieval"]
    test = {
        "settings": {}, "finished": None, "seconds": 1.0, "users": 2, "test_set": "ab", "valid_metric": None,
        "metrics": {"ndcg@10": 0.5},
    }  # fmt: skip
    with pytest.raises(ValueError, match="protocol"):
        add_test("old", "../x", test, ["a", "b"], ranks=[1, 2])
    with pytest.raises(ValueError, match="metrics"):
        add_test("old", "full", {**test, "metrics": {"ndcg@10": "x"}}, ["a", "b"], ranks=[1, 2])
    assert add_test("old", "full", test, ["a", "b"], ranks=[1, 2]).ranks()["ranks"].tolist() == [1, 2]
    assert read_run("old").protocols == ["retrieval", "full"] and json.loads(file.read_text())["version"] == 2
    damaged = {**json.loads(file.read_text()), "tests": {"../../x": test}}
    file.write_text(json.dumps(damaged))
    with pytest.raises(UserError, match="damaged: its tests"):
        read_run("old")


def test_what_a_further_protocol_takes_over(chain_data):
    config = make_config("SASRec", "chain", config_dict={"data_path": str(chain_data), "protocol": "full"})
    (under,) = under_protocols(config, ["retrieval"])
    assert under["metrics"] == ["NDCG", "Hit"] and under["topk"] == [10, 20] and under["valid_metric"] == "Hit@10"
    assert under["eval_args"]["mode"] == {"valid": "full", "test": "uni99"} and config["eval_args"]["mode"]["test"] == "full"
    given = {"data_path": str(chain_data), "protocol": "full", "topk": [3], "valid_metric": "MRR@3", "most_candidates": 5}
    (under,) = under_protocols(make_config("SASRec", "chain", config_dict=given), ["retrieval"])
    assert under["topk"] == [3] and under["valid_metric"] == "Hit@3" and under["eval_args"]["mode"]["test"] == "uni5"


@pytest.mark.parametrize(
    "value, said",
    [
        ("retrieval,ful", "not 'ful'; did you mean 'full'"),
        ("full,retrieval,full", "full is named twice"),
        ("retrieval,yes_no", "yes_no judges ratings"),
        ([], "names none"),
    ],
)
def test_protocols_that_cannot_share_a_training(value, said):
    with pytest.raises(UserError, match=said):
        protocol_names(value)
    with pytest.raises(UserError, match=said):
        first_look(["SASRec"], "ml-100k", {"protocol": value})


def test_a_form_that_lists_candidates_cannot_rank_the_catalogue(chain_data, capsys):
    words = ["run", "--model=RSLLM", "--recommend_by=generation", "--dataset=chain", f"--data_path={chain_data}"]
    assert cli.main([*words, "--backbone=tiny", "--protocol=generation,full", "--use_gpu=False"]) == 2
    assert "RSLLM by generation chooses among listed candidates; set recommend_by: retrieval" in capsys.readouterr().err
    assert not Path("saved").exists()
