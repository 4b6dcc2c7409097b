"""What is wrong with a comparison is told before anything is trained; what fails later costs no other model its row."""

from __future__ import annotations

import functools
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from recbole_llm import preflight
from recbole_llm.configure import configure
from recbole_llm.data.shared import SharedData
from recbole_llm.errors import UserError
from recbole_llm.quick_start import compare
from recbole_llm.registry import MODELS

SETTINGS = {
    "backbone": "tiny",
    "backbone_dtype": "float32",
    "head_hidden_size": 8,
    "representation_size": 8,
    "epochs": 1,
    "SASRec.epochs": 1,
    "eval_args": {"mode": "uni9"},
    "topk": [5],
    "valid_metric": "Hit@5",
    "use_gpu": False,
    "show_progress": False,
    "state": "ERROR",
}


FOR_LLM = ("backbone", "backbone_dtype", "head_hidden_size", "representation_size", "SASRec.epochs")


@pytest.fixture
def run(chain_data, tmp_path, monkeypatch):
    """Compare models on the chain with small settings and those given."""
    monkeypatch.chdir(tmp_path)

    def compare_with(models: list[str], **settings):
        with_llm = any(name in MODELS for name in models)
        given = {key: value for key, value in SETTINGS.items() if with_llm or key not in FOR_LLM}
        protocol = {} if with_llm else {"protocol": "retrieval"}
        return compare(models, "chain", settings={**given, **protocol, "data_path": str(chain_data), **settings})

    return compare_with


@pytest.mark.parametrize(
    ("models", "settings", "message"),
    [
        (["SASRec", "LLMSTAR"], {"eval_args": {"mode": "uni99"}}, r"mode uni99 \(valid\) asks for 99 items.*set it to uni"),
        (["SASRec", "LLMSTAR"], {"train_negatives": 1000}, r"train_negatives: 1000 takes 1000 items .* set it to \d+ or lower"),
        (
            ["TALLRec"],
            {"protocol": "generation", "recommend_by": "generation", "train_candidates": 500, "eval_args": {"mode": "uni4"},
             "topk": [1], "valid_metric": "Hit@1"},
            r"train_candidates: 500 takes 499 items",
        ),
        (["SASRec", "FDSA"], {"FDSA.selected_features": ["brand"]}, r"selected_features: FDSA reads the column 'brand'"),
        (["SASRec"], {"MAX_ITEM_LIST_LENGTH": 10**9}, r"MAX_ITEM_LIST_LENGTH: 1000000000 items .* set it to \d+ or lower"),
        (["SASRec"], {"normalize_field": ["nothing"]}, r"dataset: chain cannot be loaded .*nothing"),
        (["SASRec", "LLMSTAR"], {"backbone": "no/such-folder.gguf"}, r"backbone"),
        *(
            (["SASRec", "LLMSTAR"], {"max_prompt_tokens": n}, rf"max_prompt_tokens: .* takes \d+ tokens, and {n} are allowed")
            for n in (1, 20, 60)
        ),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_anything_is_trained(run, tmp_path, models, settings, message):
    with pytest.raises(UserError, match=message):
        run(models, **settings)
    assert not any((tmp_path / "saved").glob("*/*.safetensors"))


def test_a_folder_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="checkpoint_dir: .* cannot be written"):
        run(["SASRec"], checkpoint_dir=str(tmp_path / "file" / "saved"))


def test_one_models_failure_is_its_row(run, tmp_path, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("nothing to divide\nby")

    monkeypatch.setattr("recbole.model.sequential_recommender.gru4rec.GRU4Rec.__init__", broken)
    rows = run(["GRU4Rec", "SASRec"])
    assert rows[0]["error"] == "ZeroDivisionError: nothing to divide"
    assert rows[1]["model"] == "SASRec" and rows[1]["metrics"]
    logs = "".join(file.read_text() for file in Path("log").rglob("*.log"))
    assert "Traceback (most recent call last)" in logs and "ZeroDivisionError" in logs


def test_a_loss_that_is_no_number_costs_its_model_alone(run, monkeypatch):
    monkeypatch.setattr(
        "recbole.model.general_recommender.bpr.BPR.calculate_loss",
        lambda model, rows: model.user_embedding.weight.sum() * float("nan"),
    )
    rows = run(["SASRec", "BPR", "Pop"])
    assert [row["model"] for row in rows if row.get("error")] == ["BPR"] and "nan" in rows[1]["error"]
    assert rows[0]["metrics"] and rows[2]["metrics"]


def test_a_history_length_beyond_all_histories_costs_nothing(make_model):
    """Words such as "Item No.7" are made for as many places as a history has, not for as many as the key allows."""
    sizes = []
    for length in (10**9, 50):
        _, model, splits = make_model("LLMSTAR", history_length=length, MAX_ITEM_LIST_LENGTH=50)
        sizes.append(model.form.prompts.settings.history_length)
    assert sizes == [50, 50]


@pytest.mark.parametrize(
    ("models", "settings", "message"),
    [
        (["SASRec", "LLMSTAR"], {"head_hidden_size": 10**12}, r"head_hidden_size: layers of width 10{12} .* set it lower"),
        (["SASRec", "LLMSTAR"], {"teacher_settings": {"clip_grad_norm": {"max_norm": -1}}}, r"max_norm must be a number > 0"),
        (["SASRec", "LLMSTAR"], {"teacher_settings": {"item_inter_num_interval": "5,inf"}}, r"must be an interval"),
    ],
)  # fmt: skip
def test_sizes_and_teachers_are_checked_before_anything_is_trained(run, tmp_path, models, settings, message):
    with pytest.raises(UserError, match=message):
        run(models, **settings)
    assert not any((tmp_path / "saved").glob("*/*.safetensors"))


@pytest.mark.parametrize("kind", ["dangling link", "circle", "pipe"])
def test_a_folder_of_checkpoints_that_is_none(run, tmp_path, kind):
    place = tmp_path / "odd"
    if kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to(place if kind == "circle" else tmp_path / "file" / "saved")
        (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="checkpoint_dir: .* cannot be written"):
        run(["SASRec"], checkpoint_dir=str(place))


def test_checkpoints_are_not_written_to_the_data(run, chain_data, tmp_path):
    (tmp_path / "link").symlink_to(chain_data / "chain")
    with pytest.raises(UserError, match="checkpoint_dir: .* is the folder of the data set"):
        run(["SASRec"], checkpoint_dir=str(tmp_path / "link"))


def test_a_disk_with_too_little_room(run, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**20))
    with pytest.raises(UserError, match="checkpoint_dir: the disk of .* has 1 MB left"):
        run(["SASRec"])


@pytest.mark.parametrize("context", [8, 64])
def test_an_llm_whose_context_holds_no_item(run, tmp_path, monkeypatch, context):
    read = preflight.load_text_side
    monkeypatch.setattr(preflight, "load_text_side", lambda config: replace(read(config), context_length=context))
    with pytest.raises(UserError, match=rf"takes \d+ tokens, and {context} are allowed .*take an LLM of longer context"):
        run(["SASRec", "LLMSTAR"])
    assert not any((tmp_path / "saved").glob("*/*.safetensors"))


def test_what_models_and_seeds_share_is_looked_at_once(chain_data, tmp_path, monkeypatch):
    calls: Counter[str] = Counter()

    def counting(name: str):
        function = getattr(preflight, name)

        @functools.wraps(function)
        def counted(*arguments):
            calls[name] += 1
            return function(*arguments)

        monkeypatch.setattr(preflight, name, counted)

    catalogues = []
    encode = preflight.encode_text
    monkeypatch.setattr(
        preflight,
        "encode_text",
        functools.wraps(encode)(lambda tokenizer, texts: catalogues.append(len(texts)) or encode(tokenizer, texts)),
    )
    for name in ("lines_of", "load_text_side", "fetch_backbone", "check_folder", "check_candidates"):
        counting(name)
    models = ["SASRec", "LLMSTAR", "LLMSRec", "ALLMRec"]
    given = {**SETTINGS, "data_path": str(chain_data), "protocol": "retrieval"}
    configs = [configure(name, "chain", models, seed, None, given) for seed in (1, 2, 3) for name in models]
    preflight.check(configs, SharedData())
    assert set(calls.values()) == {1} and len(calls) == 5
    assert [number for number in catalogues if number > 40] == [41]  # 40 items and the padding


def test_the_small_data_set_runs_under_the_default_protocol():
    folder = Path(__file__).parents[1] / "dataset"
    config = configure("LLMSTAR", "toy-chain", ["LLMSTAR"], None, None, {"data_path": str(folder), "backbone": "tiny"})
    assert (config["protocol"], config["eval_args"]["mode"]["test"]) == ("retrieval", "uni39")
    preflight.check([config], SharedData())
    for given, mode in (({"protocol": "full"}, "full"), ({"protocol": "generation", "recommend_by": "generation"}, "uni19")):
        settings = {"data_path": str(folder), "backbone": "tiny", **given}
        assert configure("TALLRec", "toy-chain", ["TALLRec"], None, None, settings)["eval_args"]["mode"]["test"] == mode
    settings = {"data_path": str(folder), "backbone": "tiny", "eval_args": {"mode": "uni42"}}
    assert configure("LLMSTAR", "toy-chain", ["LLMSTAR"], None, None, settings)["eval_args"]["mode"]["test"] == "uni42"
