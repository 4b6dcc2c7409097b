"""Settings: precedence, mistakes named in a sentence, nothing evaluated, nothing left behind."""

from __future__ import annotations

import copy
import os
import pickle
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from recbole.config import Config
from recbole.data.dataset import Dataset, SequentialDataset
from recbole.utils import argument_list

from recbole_llm import registry
from recbole_llm.config import settings
from recbole_llm.config.command_line import parse_command_line
from recbole_llm.config.help import help_text
from recbole_llm.config.schema import MARKS, Key, forms_of, keys_of_file, known_keys, read_schema
from recbole_llm.config.settings import datasets_in, make_config, settings_for
from recbole_llm.errors import UserError

PROPERTIES = registry.properties_folder()
QUICKSTART = PROPERTIES / "quickstart.yaml"  # settings of a run, not defaults
RECBOLE = PROPERTIES / "recbole.yaml"  # marks of RecBole's own keys
# Settings of published recipes, see test_presets.py, and ranges of a search, see test_tune.py.
PRESETS = {*(PROPERTIES / "preset").rglob("*.yaml"), *(PROPERTIES / "tune").rglob("*.yaml")}
DATA = os.environ.get("RECBOLE_LLM_DATA")
CODE = "__import__('os').environ.__setitem__('RECBOLE_LLM_EVALUATED', '1')"


@pytest.fixture(autouse=True)
def foreign_command_line(monkeypatch):
    """RecBole reads sys.argv: the test runner's own options must not decide what these tests see."""
    monkeypatch.setattr(sys, "argv", ["program"])
    monkeypatch.delenv("RECBOLE_LLM_EVALUATED", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def properties(tmp_path, monkeypatch) -> Path:
    """A copy of properties/ that a test may change."""
    folder = tmp_path / "properties"
    shutil.copytree(PROPERTIES, folder)
    monkeypatch.setattr(registry, "properties_folder", lambda: folder)
    return folder


def message(*args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        make_config(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and text[-1] in ".?)", text
    return text


# --- the YAML files are the schema ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file", sorted({*PROPERTIES.rglob("*.yaml")} - PRESETS - {QUICKSTART, RECBOLE}), ids=lambda file: file.stem
)
def test_every_key_of_ours_says_type_and_meaning_and_has_a_default_that_fits(file):
    group = file.relative_to(PROPERTIES).with_suffix("").as_posix()
    keys = keys_of_file(file, group) if file.stem in registry.BASELINES else read_schema()[group]
    assert set(keys) == set(yaml.safe_load(file.read_text(encoding="utf-8")) or {})
    above = {**read_schema()["stock"], **read_schema()["recbole"]} if file.stem in registry.BASELINES else {}
    for key in keys.values():
        if key.name in above and not key.meaning:  # said there
            continue
        assert key.type and key.meaning, f"{key.where}: '{key.name}' lacks its '# (type) meaning'"
        assert key.fit(key.default) == key.default, key.where


def test_files_of_one_kind_agree_on_a_key():
    shared: dict[str, Key] = {}
    for group, keys in read_schema().items():
        if group.startswith(("overall", "llm", "form/", "protocol/", "dataset/", "backbone/")):
            for name, key in keys.items():
                first = shared.setdefault(name, key)
                said, before = ((one.type, one.constraint, one.mark, one.meaning) for one in (key, first))
                assert said == before or (name in VARIED and said[:3] == before[:3]), f"{first.where}, {key.where}"


VARIED = ("metrics", "topk", "valid_metric")  # a protocol says what its own choice means


@pytest.mark.parametrize("file", sorted({*PROPERTIES.rglob("*.yaml")} - {QUICKSTART}), ids=lambda file: file.stem)
def test_every_mark_is_a_known_one(file):
    for key in keys_of_file(file, file.name).values():
        assert key.mark in MARKS, f"{key.where}: [{key.mark}]"


def test_recboles_own_keys_are_listed_with_its_defaults():
    config = Config(model="BPR", dataset="ml-100k", config_dict={})
    for key in keys_of_file(RECBOLE, "recbole.yaml").values():
        assert key.mark in ("cost", "output") and key.meaning, key.where
        assert config.internal_config_dict.get(key.name) == key.default, key.where
        assert key.name in read_schema()["recbole"] and read_schema()["recbole"][key.name].mark == key.mark


def test_a_models_file_holds_what_is_its_own_or_differs():
    schema = read_schema()
    for name in registry.MODELS:
        below = {**schema["overall"], **schema["llm"]}
        for form in forms_of(name):
            below.update(schema[f"form/{form}"])
        for key in schema[f"model/{name}"].values():
            lower = below.get(key.name)
            if key.name == "recommend_by":  # it says which of the forms, whose files have it as well, is the usual one
                continue
            same = lower and (key.default, key.type, key.constraint) == (lower.default, lower.type, lower.constraint)
            assert not same, f"{key.where}: {key.name}"


def test_a_key_given_again_keeps_what_is_said_of_it():
    schema = read_schema()
    again, first = schema["model/LLaRA"]["learning_rate"], schema["llm"]["learning_rate"]
    assert again.default == 8e-4 and first.default == 1e-4
    assert again.where.startswith("model/LLaRA.yaml:")
    for part in ("type", "constraint", "meaning", "mark", "section"):
        assert getattr(again, part) == getattr(first, part) != ""
    # A comment of its own leaves the mark as it is.
    own = schema["model/ST2SI"]["learning_rate"]
    assert (own.type, own.mark, own.section) == ("float or None", "training", "Training")
    assert schema["dataset/ml-100k"]["title_words"].mark == "text"


def test_a_form_brings_its_keys_and_is_a_choice_of_recommend_by():
    for name in registry.MODELS:
        forms, keys = forms_of(name), known_keys(name)
        for form, key in (("retrieval", "representation_size"), ("generation", "title_prompts"), ("yes_no", "yes_no_prompt")):
            assert (key in keys) == (form in forms), (name, key)
        assert "forms" not in keys
        if "recommend_by" in keys:
            assert keys["recommend_by"].choices == forms and keys["recommend_by"].default in forms
        else:
            assert forms in ([], ["retrieval"])
    assert "must be one of retrieval, generation, not 'yes_no'" in message(
        "LLaRA", "ml-100k", config_dict={"recommend_by": "yes_no"}
    )


def test_a_form_that_is_none(properties):
    (properties / "model" / "LLaRA.yaml").write_text("forms: [retrieval, chat]\n")
    said = "LLaRA.yaml: forms must be a list of any of generation, retrieval, yes_no, not 'chat'."
    assert said in message("LLaRA", "ml-100k")


def test_settings_are_checked_once_for_each_config(monkeypatch):
    calls = []
    checked = settings.validate
    monkeypatch.setattr(settings, "validate", lambda config: calls.append(config.model) or checked(config))
    make_config("LLMSTAR", "ml-100k")
    Config(model="SASRec", dataset="ml-100k", config_dict={"protocol": "full"})
    assert calls == ["LLMSTAR", "SASRec"]


def test_a_comment_becomes_a_key():
    key = read_schema()["overall"]["valid_users"]
    assert (key.type, key.constraint, key.default) == ("int or str or None", "> 0", None)
    assert key.where.startswith("overall.yaml:") and key.meaning.startswith("users in each validation")
    stock = read_schema()["recbole"]["learning_rate"]
    assert (stock.type, stock.constraint, stock.default) == ("float", "> 0", 0.001)


def test_a_comment_may_stand_on_the_line_above_and_a_value_may_contain_one(properties):
    (properties / "dataset" / "new.yaml").write_text(
        '# (int, in (0, 1e1]) size of a thing\nsize: 3\nseparator: " # "  # (str) between # things\nbare: 1\n'
    )
    keys = read_schema()["dataset/new"]
    assert (keys["size"].constraint, keys["size"].meaning) == ("in (0, 1e1]", "size of a thing")
    assert (keys["separator"].default, keys["separator"].meaning) == (" # ", "between # things")
    assert (keys["bare"].type, keys["bare"].meaning) == ("", "")


@pytest.mark.parametrize(
    ("kind", "constraint", "value", "expected"),
    [
        ("int", "> 0", 3.0, 3),
        ("int", "> 0", "3", 3),
        ("int", "> 0", np.int64(3), 3),
        ("float", "", 1, 1.0),
        ("float", "", "1e-4", 1e-4),
        ("float", "in [0, 1)", 0, 0.0),
        ("float", "in (0, 1]", 1, 1.0),
        ("float", ">= -1.5", -1.5, -1.5),
        ("int or None", "> 0", None, None),
        ("int or None", "> 0", "None", None),
        ("bool", "", "true", True),
        ("str", "one of a|b", "b", "b"),
        ("str", "", "[a]", "[a]"),
        ("list", "", "title", ["title"]),
        ("list", "", "[a, b]", ["a", "b"]),
        ("list", "", (1, 2), [1, 2]),
        ("list or int", "> 0", 5, 5),
        ("str or float", "> 0", "auto", "auto"),
        ("dict", "", "{a: 1}", {"a": 1}),
        ("", "", object, object),
    ],
)
def test_a_value_is_put_into_its_type(kind, constraint, value, expected):
    fitted = Key("key", kind, constraint).fit(value)
    assert fitted == expected and type(fitted) is type(expected)


@pytest.mark.parametrize(
    ("kind", "constraint", "value"),
    [
        ("int", "", 1.5),
        ("int", "", True),
        ("int", "", None),
        ("int", "> 0", 0),
        ("int", "> 0", CODE),
        ("float", "", "abc"),
        ("float", "", float("nan")),
        ("float", "", float("inf")),
        ("float", "in [0, 1)", 1),
        ("float", "in (0, 1]", 0),
        ("float", "< 1", 1),
        ("float", "<= 1", 1.1),
        ("bool", "", 1),
        ("bool", "", "maybe"),
        ("str", "", 1),
        ("str", "one of a|b", "A"),
        ("list", "", 5),
        ("list", "> 0", [1, 0]),
        ("list", "> 0", [1, "x"]),
        ("list", "one of a|b", ["a", "c"]),
        ("dict", "", []),
        ("dict", "", "{a: "),
    ],
)
def test_a_value_that_does_not_fit(kind, constraint, value):
    with pytest.raises(ValueError):
        Key("key", kind, constraint).fit(value)


# --- precedence -------------------------------------------------------------------------------------------------------


def test_our_files_lie_over_recboles():
    config = make_config("LLMSTAR", "ml-100k")
    assert config["normalize_all"] is False  # RecBole's file for ml-100k says True, which would destroy the dates
    assert config["load_col"] == {"inter": ["user_id", "item_id", "timestamp"]}
    assert config["item_text"] == ["movie_title"] and "movies" in config["prompt_sentence"]
    assert config["learning_rate"] == 1e-4 and isinstance(config["learning_rate"], float)
    assert config["eval_args"] == {
        "split": {"LS": "valid_and_test"},
        "order": "TO",
        "group_by": "user",
        "mode": {"valid": "uni99", "test": "uni99"},
    }
    assert config["train_neg_sample_args"]["distribution"] == "none"


@pytest.mark.parametrize(
    ("protocol", "mode", "metrics", "topk", "valid_metric"),
    [
        ("retrieval", "uni99", ["NDCG", "Hit"], [10, 20], "Hit@10"),
        ("generation", "uni19", ["Hit"], [1], "Hit@1"),
        ("full", "full", ["NDCG", "Recall", "MRR", "MRR@all"], [10], "NDCG@10"),
    ],
)
@pytest.mark.parametrize("model", ["LLMSRec", "SASRec"])
def test_the_protocols(model, protocol, mode, metrics, topk, valid_metric):
    config = make_config(model, "ml-100k", config_dict={"protocol": protocol})
    assert config["eval_args"]["mode"] == {"valid": mode, "test": mode}
    assert (config["metrics"], config["topk"], config["valid_metric"]) == (metrics, topk, valid_metric)
    assert config["eval_args"]["split"] == {"LS": "valid_and_test"} and config["repeatable"] is True


def test_each_layer_wins_over_those_below(properties, tmp_path):
    layers = [
        properties / "overall.yaml",
        properties / "protocol" / "retrieval.yaml",
        properties / "llm.yaml",
        properties / "form" / "retrieval.yaml",
        properties / "model" / "LLMSTAR.yaml",
        properties / "dataset" / "ml-100k.yaml",
        properties / "backbone" / "layered.yaml",
    ]
    layers[-1].parent.mkdir(exist_ok=True)
    for depth, path in enumerate(layers):
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(f"level_{level}: {depth}  # (int) a level\n" for level in range(depth, 10))
    own = tmp_path / "own.yaml"
    own.write_text("level_7: 7\nlevel_8: 7\nlevel_9: 7\n")
    config = make_config(
        "LLMSTAR",
        "ml-100k",
        config_file_list=[own],
        config_dict={"backbone": "layered", "level_8": 8, "level_9": 8},
        command_line={"level_9": 9},
    )
    # Layer n sets level_n and all after it, so that level_n ends with n only if every later layer was laid on top.
    assert [config[f"level_{level}"] for level in range(10)] == list(range(10))


def test_a_part_of_eval_args_leaves_the_rest():
    config = make_config("LLMSTAR", "ml-100k", config_dict={"eval_args": {"mode": {"valid": "uni9"}}})
    assert config["eval_args"]["split"] == {"LS": "valid_and_test"} and config["eval_args"]["order"] == "TO"
    assert config["eval_args"]["mode"] == {"valid": "uni9", "test": "uni9"}


def test_columns_follow_the_names_of_the_fields():
    config = make_config("LLMSTAR", "ml-100k", config_dict={"TIME_FIELD": "when"})
    assert config["load_col"] == {"inter": ["user_id", "item_id", "when"]}


def test_a_data_set_without_a_file_of_ours_keeps_its_timestamps(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "mine.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\na\tx\t0\n")
    config = make_config("LLMSRec", "mine", config_dict={"data_path": str(tmp_path)})
    assert config["normalize_all"] is False and config["item_text"] == ["title"]
    assert "purchases" in config["prompt_sentence"]


# --- stock models -----------------------------------------------------------------------------------------------------


def test_a_stock_model_without_protocol_is_recboles_own():
    config = make_config("BPR", "ml-100k", config_dict={"anything": 1})
    assert config["anything"] == 1 and config["topk"] == [10] and config["metrics"][0] == "Recall"
    assert config["protocol"] is None and config["normalize_all"] is True


def test_a_stock_model_keeps_the_negatives_its_loss_needs():
    def negatives(model, **extra):
        config = make_config(model, "ml-100k", config_dict={"protocol": "retrieval", **extra})
        return config["train_neg_sample_args"]["distribution"]

    assert negatives("SASRec") == "none"
    assert negatives("SINE") == "none"
    assert negatives("SASRec", loss_type="BPR") == "uniform"
    assert negatives("TransRec") == "uniform"
    assert negatives("BPR") == "uniform"
    assert make_config("BPR", "ml-100k", config_dict={"protocol": "full"})["repeatable"] is False


def test_a_stock_model_knows_the_keys_of_its_file_and_of_its_source():
    given = {"protocol": "full", "n_heads": 4, "tau": 0.5}
    config = make_config("FEARec", "ml-100k", config_dict=given)  # its file does not mention tau, its source reads it
    assert config["n_heads"] == 4 and config["tau"] == 0.5
    assert "n_head" in message("SASRec", "ml-100k", config_dict={"protocol": "full", "n_head": 4})


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"learning_rat": 1}, ["unknown key 'learning_rat'", "did you mean 'learning_rate'?"]),
        ({"zzzzzz": 1}, ["unknown key 'zzzzzz'", "--help"]),
        (
            {"protocol": "retrival"},
            ["protocol must be one of full, generation, retrieval, temporal, yes_no", "did you mean 'retrieval'?"],
        ),
        ({"protocol": ["full", "retrieval"]}, ["protocol must be one of"]),
        ({"beta": -1}, ["beta must be a number >= 0, not -1"]),
        ({"beta": "abc"}, ["beta must be a number >= 0, not 'abc'"]),
        ({"epochs": 1.5}, ["epochs must be a whole number > 0, not 1.5"]),
        ({"valid_users": 0}, ["valid_users must be a whole number > 0 or a text or None, not 0"]),
        ({"valid_users": "some"}, ["valid_users must be a whole number > 0, auto or None, not 'some'"]),
        ({"learning_rate_decay": 0}, ["must be a number in (0, 1], not 0"]),
        ({"tuning": "lroa"}, ["tuning must be one of frozen, lora, full, not 'lroa'; did you mean 'lora'?"]),
        ({"candidate_sampling": "x"}, ["must be one of non_interacted, recbole"]),
        ({"teacher_training": "prefx"}, ["must be one of causal, prefix, binary", "did you mean 'prefix'?"]),
        ({"item_text": 5}, ["item_text must be a list such as [a, b], not 5"]),
        ({"topk": [10, 0]}, ["topk must be a whole number > 0 or a list of values > 0"]),
        ({"topk": [1.5]}, ["topk must be whole numbers"]),
        ({"topk": []}, ["topk must name at least one"]),
        ({"topk": 5}, ["valid_metric Hit@10 is not measured", "topk [5]", "e.g. Hit@5"]),
        ({"valid_metric": "MRR@10"}, ["valid_metric MRR@10 is not measured", "e.g. NDCG@10"]),
        ({"metrics": ["NDGC"]}, ["there is no metric 'NDGC'; did you mean 'NDCG'?"]),
        ({"metrics": []}, ["metrics must name at least one"]),
        ({"metrics": ["AUC"]}, ["AUC judges predicted ratings"]),
        ({"eval_args": 5}, ["eval_args must be a mapping"]),
        ({"eval_args": {"mod": "full"}}, ["unknown key 'mod' in eval_args", "did you mean 'mode'?"]),
        ({"eval_args": {"mode": "unix"}}, ["mode must be full, or uni", "not 'unix'"]),
        ({"eval_args": {"mode": "uni0"}}, ["mode must be full, or uni"]),
        ({"eval_args": {"mode": "pop99"}}, ["take uni99, or candidate_sampling: recbole"]),
        ({"eval_args": {"mode": "labeled"}}, ["mode labeled needs metrics such as AUC"]),
        ({"eval_args": {"mode": {"tset": "full"}}}, ["unknown key 'tset' in eval_args.mode", "'test'"]),
        ({"eval_args": {"mode": {}}}, ["mode must name valid or test"]),
        ({"eval_args": {"order": "RO"}}, ["LLMSTAR is a sequential model and needs order TO"]),
        ({"eval_args": {"order": "T"}}, ["order must be TO"]),
        ({"eval_args": {"group_by": "item"}}, ["group_by must be user or none"]),
        ({"eval_args": {"split": {"LS": "x"}}}, ["split must be {LS: valid_and_test}"]),
        ({"eval_args": {"split": {"RS": "x"}}}, ["split must be {LS: valid_and_test}"]),
        ({"repeatable": False}, ["repeatable must be True"]),
        ({"train_neg_sample_args": {"distribution": "uniform"}}, ["draws its own training negatives"]),
        ({"train_neg_sample_args": {"dist": "uniform"}}, ["unknown key 'dist' in train_neg_sample_args"]),
        ({"clip_grad_norm": {"max_nrm": 1}}, ["unknown key 'max_nrm' in clip_grad_norm", "did you mean 'max_norm'?"]),
        ({"load_col": {"iner": ["a"]}}, ["unknown key 'iner' in load_col", "did you mean 'inter'?"]),
        ({"load_col": {"inter": "a"}}, ["columns of 'inter' must be a list"]),
        ({"load_col": {"inter": ["user_id", "item_id"]}}, ["lack 'timestamp', the TIME_FIELD"]),
        ({"normalize_all": True}, ["normalize_all would rescale 'timestamp'"]),
        ({"normalize_field": ["timestamp"]}, ["normalize_field would rescale 'timestamp'"]),
        ({"n_heads": 2}, ["a key of the teacher SASRec, not of LLMSTAR", "teacher_settings: {n_heads: ...}"]),
        ({"distill_weight": 2}, ["'distill_weight' is a key of LLMSRec, not of LLMSTAR"]),
        ({"teacher": "SASREC"}, ["RecBole has no model 'SASREC'; did you mean 'SASRec'?"]),
        ({"teacher": "LLMSRec"}, ["RecBole has no model 'LLMSRec'"]),
        ({"teacher": "BPR"}, ["BPR is no sequential model"]),
        ({"teacher_settings": {"n_head": 3}}, ["unknown key 'n_head' in teacher_settings", "did you mean 'n_heads'?"]),
        ({"teacher_settings": {"n_heads": "x"}}, ["n_heads must be a number"]),
        ({"seed": 2**32}, ["seed must be a whole number in [0, 4294967295], not 4294967296"]),
        ({"seed": None}, ["seed must be a whole number", "not None"]),
        ({"epochs": 10**24}, ["epochs must be a whole number > 0, not 1000000000000000000000000"]),
        ({"epochs": 10**5000}, ["epochs must be a whole number > 0, not a number of 16610 bits"]),
        ({"learning_rate": 10**400}, ["learning_rate must be a number > 0"]),
        ({"adam_betas": [0.9]}, ["adam_betas must be a list of two numbers in [0, 1)", "not [0.9]"]),
        ({"adam_betas": [0.9, 1.0]}, ["adam_betas must be a list of two numbers in [0, 1)"]),
        ({"adam_betas": [0.9, -0.5]}, ["adam_betas must be a list of two numbers in [0, 1)"]),
        ({"adam_betas": [0.9, "x"]}, ["adam_betas must be a list of two numbers in [0, 1)"]),
        ({"adam_betas": [0.9, float("nan")]}, ["adam_betas must be a list of two numbers in [0, 1)"]),
        ({"clip_grad_norm": {"max_norm": -1}}, ["clip_grad_norm: max_norm must be a number > 0, not -1"]),
        ({"clip_grad_norm": {"max_norm": "x"}}, ["clip_grad_norm: max_norm must be a number > 0, not 'x'"]),
        ({"clip_grad_norm": {"max_norm": 1.0, "norm_type": 0}}, ["clip_grad_norm: norm_type must be a number > 0, not 0"]),
        ({"clip_grad_norm": {}}, ["clip_grad_norm must name max_norm"]),
        ({"data_path": ""}, ["data_path must be a text", "not ''"]),
        ({"data_path": None}, ["data_path must be a text", "not None"]),
        ({"checkpoint_dir": " "}, ["checkpoint_dir must be a text"]),
        ({"teacher": ""}, ["teacher must be a text, not ''"]),
        ({"backbone": ""}, ["backbone must be a text, not ''"]),
        ({"USER_ID_FIELD": ""}, ["USER_ID_FIELD must be a text", "not ''"]),
        ({"seq_separator": ""}, ["seq_separator must be a text", "not ''"]),
        ({"metrics": [["Hit"]]}, ["metrics must be a list", "not [['Hit']]"]),
        ({"metrics": [None]}, ["metrics must be a list", "not [None]"]),
        ({"topk": [[1], [2]]}, ["topk must be"]),
        ({"lora_target_modules": [{"a": 1}]}, ["lora_target_modules must be"]),
        ({"lora_target_modules": [""]}, ["lora_target_modules must be"]),
        ({"metric_decimal_place": -1}, ["metric_decimal_place must be a whole number in [0, 15], not -1"]),
        ({"user_inter_num_interval": "5,inf"}, ["user_inter_num_interval must be an interval such as '[5,inf)'", "'5,inf'"]),
        ({"item_inter_num_interval": "[9,2]"}, ["item_inter_num_interval must be an interval", "not '[9,2]'"]),
        ({"user_inter_num_interval": "[1,2];x"}, ["user_inter_num_interval must be an interval"]),
        ({"val_interval": {"rating": "[nan,3]"}}, ["val_interval: rating must be an interval"]),
        ({"eval_args": {"split": {"RS": [0, 0, 0]}}}, ["split must be"]),
        ({"eval_args": {"split": {"RS": [0.8, 0.1, float("inf")]}}}, ["split must be"]),
    ],
)
def test_a_mistake_is_named_in_a_sentence(given, words):
    text = message("LLMSTAR", "ml-100k", config_dict=given)
    for part in [*words, "config_dict"]:
        assert part in text


@pytest.mark.parametrize(
    ("model", "given", "words"),
    [
        ("SASRec", {"beta": 1}, "'beta' is a key of LLMSTAR, RSLLM, not of SASRec"),
        ("LLMSRec", {"beta": 1}, "'beta' is a key of LLMSTAR, RSLLM, not of LLMSRec"),
        (
            "SASRec",
            {"train_neg_sample_args": {"distribution": "uniform"}},
            "SASRec with loss_type CE takes no negatives",
        ),
        ("SASRec", {"loss_type": "BPR", "train_neg_sample_args": None}, "SASRec learns from pairs of items"),
        ("BPR", {"train_neg_sample_args": None}, "BPR learns from pairs of items"),
        ("SASRec", {"epochs": "many"}, "epochs must be a whole number > 0, not 'many'"),
        ("SASRec", {"n_layers": "two"}, "n_layers must be a number"),
        ("BPR", {"train_neg_sample_args": {"distribution": "odd"}}, "train_neg_sample_args: distribution must be one of"),
        ("BPR", {"train_neg_sample_args": {"distribution": "uniform", "sample_num": -1}}, "sample_num must be a whole"),
        ("SASRec", {"history_length": 2}, "LLMSRec, LLMSTAR, "),
        ("BPR", {"metrics": ["AUC", "NDCG"]}, "cannot be used with ranking metrics"),
        ("BPR", {"metrics": ["AUC"], "valid_metric": "AUC"}, "take mode labeled"),
        (
            "SASRec",
            {"metrics": ["AUC"], "valid_metric": "AUC", "eval_args": {"mode": "labeled"}},
            "mode labeled needs protocol: yes_no",
        ),
    ],
)
def test_a_mistake_with_a_stock_model(model, given, words):
    assert words in message(model, "ml-100k", config_dict={"protocol": "full", **given})


@pytest.mark.parametrize(
    "given",
    [
        {"gpu_id": ""}, {"prompt_goal": ""}, {"item_text_separator": ""}, {"seq_separator": ","}, {"seed": 2**32 - 1},
        {"user_inter_num_interval": "[5, inf)"}, {"user_inter_num_interval": "(0,3];[7,1e3)"},
        {"user_inter_num_interval": None},
        {"clip_grad_norm": {"max_norm": 1, "norm_type": 2.0}}, {"adam_betas": "[0.8, 0.99]"}, {"adam_betas": (0, 0.5)},
    ],
)  # fmt: skip
def test_what_looks_odd_and_is_right(given):
    make_config("LLMSTAR", "ml-100k", config_dict=given)


def test_unknown_models_and_datasets(tmp_path):
    assert "did you mean 'LLMSTAR'?" in message("LLMSTARR", "ml-100k")
    (tmp_path / "amazon-toys").mkdir()
    (tmp_path / "amazon-toys" / "amazon-toys.inter").write_text("")
    (tmp_path / "no-dataset").mkdir()
    text = message("SASRec", "amazon-toy", config_dict={"protocol": "full", "data_path": str(tmp_path)})
    assert "did you mean 'amazon-toys'?" in text and "data_path holds amazon-toys;" in text
    # RecBole downloads this one by itself.
    assert make_config("LLMSRec", "amazon-books", config_dict={"data_path": str(tmp_path)})["dataset"] == "amazon-books"


def test_a_mistake_says_where_it_was_made(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("# a run\nprotocol: full\nbeta: much\n")
    assert f"({path}:3)." in message("LLMSTAR", "ml-100k", config_file_list=[path])
    assert "(config_dict)." in message("LLMSTAR", "ml-100k", [path], {"beta": "much"})
    assert "(command line)." in message("LLMSTAR", "ml-100k", [path], {"beta": 1}, {"beta": "much"})
    assert "(teacher_settings, " in message("LLMSTAR", "ml-100k", None, {"teacher_settings": {"n_heads": []}})
    assert make_config("LLMSTAR", "ml-100k", str(path), {"beta": 1})["protocol"] == "full"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"beta: 1\nbeta: 2\n", ":2: this is no valid YAML: the key 'beta' is given twice."),
        (b"eval_args: {mode: full, mode: uni9}\n", ":1: this is no valid YAML: the key 'mode' is given twice."),
        (b"a: 1\nb: [1, 2\n", ":3: this is no valid YAML"),
        (b"a: 1\n\xff: 2\n", ":2: the file is not UTF-8"),
        (b"a: \x00\n", "this is no valid YAML"),
        (b"- beta\n", "lines of the form 'key: value'"),
        (b"just words\n", "lines of the form 'key: value'"),
        (b"beta: !!python/object/apply:os.getcwd []\n", ":1: this is no valid YAML"),
    ],
)
def test_a_config_file_that_cannot_be_read(tmp_path, content, words):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    text = message("LLMSTAR", "ml-100k", config_file_list=[path])
    assert str(path) in text and words in text
    path.unlink()
    assert "cannot be read" in message("LLMSTAR", "ml-100k", config_file_list=[path])


def test_an_empty_config_file_changes_nothing(tmp_path):
    path = tmp_path / "empty.yaml"
    for content in ("", "# nothing\n", "~\n"):
        path.write_text(content)
        assert make_config("LLMSTAR", "ml-100k", config_file_list=[path])["beta"] == 0.4


# --- isolation --------------------------------------------------------------------------------------------------------


def test_no_string_is_evaluated(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text(f'prompt_request: "{CODE}"\n')
    config = make_config(
        "LLMSTAR",
        "ml-100k",
        config_file_list=[path],
        config_dict={"backbone": CODE},
        command_line=parse_command_line([f"--prompt_sentence={CODE}"]),
    )
    assert [config[key] for key in ("backbone", "prompt_sentence", "prompt_request")] == [CODE] * 3
    assert "epochs must be a whole number" in message("LLMSTAR", "ml-100k", config_dict={"epochs": CODE})
    assert "epochs must be a whole number" in message(
        "LLMSTAR", "ml-100k", command_line=parse_command_line([f"--epochs={CODE}"])
    )
    assert "RECBOLE_LLM_EVALUATED" not in os.environ
    # The same string through RecBole's own door is evaluated: the test would notice.
    Config(model="BPR", dataset="ml-100k", config_dict={"anything": CODE})
    assert os.environ.pop("RECBOLE_LLM_EVALUATED") == "1"


def test_words_that_recbole_would_evaluate_stay_words():
    # eval("key") in RecBole gives the name of the key at hand, eval("exit()") ends the program, eval("1-2") gives -1.
    for word in ("key", "exit()", "1-2", "os.path", "None of these"):
        assert (
            make_config("LLMSTAR", "ml-100k", config_dict={"prompt_sentence": word})["prompt_sentence"] == word
        )


def test_nothing_global_changes(monkeypatch):
    def state():
        lists = {name: list(value) for name, value in vars(argument_list).items() if isinstance(value, list)}
        resolvers = {first: len(entries) for first, entries in yaml.FullLoader.yaml_implicit_resolvers.items()}
        return lists, resolvers, dict(os.environ), list(sys.argv)

    monkeypatch.setattr(sys, "argv", ["pytest", "--beta=0.9", "--nonsense=1", "--epochs=abc", "tests"])
    before = state()
    given = {"eval_args": {"mode": "uni9"}, "teacher_settings": {"n_heads": 1}}
    config = make_config("LLMSTAR", "ml-100k", config_dict=given)
    with pytest.raises(UserError):
        make_config("LLMSTAR", "ml-100k", config_dict={"typo": 1})
    assert state() == before
    assert config["beta"] == 0.4 and config["nonsense"] is None and config["epochs"] == 10
    assert given == {"eval_args": {"mode": "uni9"}, "teacher_settings": {"n_heads": 1}}
    assert type(config) is Config
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert make_config("LLMSTAR", "ml-100k")["gpu_id"] == "3"
    assert make_config("LLMSTAR", "ml-100k", config_dict={"gpu_id": 1})["gpu_id"] == "1"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


def test_two_configs_share_nothing():
    first, second = make_config("LLMSTAR", "ml-100k"), make_config("LLMSTAR", "ml-100k")
    first["topk"].append(99)
    first["load_col"]["inter"].append("rating")
    assert second["topk"] == [10, 20] == make_config("LLMSTAR", "ml-100k")["topk"]
    assert second["load_col"]["inter"] == ["user_id", "item_id", "timestamp"]


def test_a_config_can_be_copied_and_sent_to_a_worker():
    config = make_config("LLMSTAR", "ml-100k", config_dict={"beta": 0.5})
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(other) is Config and other.final_config_dict == config.final_config_dict


def test_use_gpu_decides_the_device():
    config = make_config("LLMSTAR", "ml-100k", config_dict={"use_gpu": False})
    assert config["device"].type == "cpu" and config["use_gpu"] is False


# --- RecBole's own Config ---------------------------------------------------------------------------------------------


def test_recboles_own_config_gets_our_files_and_checks(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(sys, "argv", ["pytest", "--beta=0.7", "--maxfail=1", "-x"])
    config = Config(model="LLMSTAR", dataset="ml-100k", config_dict={"epochs": "3"})
    assert config["beta"] == 0.7 and config["epochs"] == 3 and config["item_text"] == ["movie_title"]
    # An option of a foreign program is no mistake, but it does not get into the settings either.
    assert config["maxfail"] is None and "'maxfail' is no key of LLMSTAR" in caplog.text
    with pytest.raises(UserError, match=re.escape("unknown key 'epoch' (config_dict); did you mean 'epochs'?")):
        Config(model="LLMSTAR", dataset="ml-100k", config_dict={"epoch": 3})
    path = tmp_path / "run.yaml"
    path.write_text("epoch: 3\n")
    with pytest.raises(UserError, match=re.escape("unknown key 'epoch' (config file)")):
        Config(model="LLMSTAR", dataset="ml-100k", config_file_list=[str(path)])
    monkeypatch.setattr(sys, "argv", ["pytest", "--beta=much"])
    with pytest.raises(UserError, match=re.escape("beta must be a number >= 0, not 'much' (command line).")):
        Config(model="LLMSTAR", dataset="ml-100k")


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_command_line():
    parsed = parse_command_line(
        [
            "--model=SASRec,LLMSTAR",
            "--dataset",
            "ml-100k",
            "--beta=-0.5",
            "--learning_rate",
            "1e-4",
            "--seed=1,2,3",
            "--topk=[5, 10]",
            "--eval_args={'mode': 'uni9'}",
            "--item_text=title",
            "--results_file=a=b.json",
            "--per_user_file=2024",
            "--prompt_request=. After this: go",
            "--valid_users=None",
            "--teacher_checkpoint=~",
            "--SASRec.epochs=5",
            "--resume",
            "--epochs",
            "-3",
            "--backbone=1",
            "--item_text_separator= | ",
            "--prompt_sentence='movies'",
            "--user=007",
        ]
    )
    assert parsed == {
        "model": "SASRec,LLMSTAR",
        "dataset": "ml-100k",
        "beta": -0.5,
        "learning_rate": 1e-4,
        "seed": "1,2,3",
        "topk": [5, 10],
        "eval_args": {"mode": "uni9"},
        "item_text": "title",
        "results_file": "a=b.json",
        "per_user_file": "2024",
        "prompt_request": ". After this: go",
        "valid_users": None,
        "teacher_checkpoint": None,
        "SASRec.epochs": 5,
        "resume": True,
        "epochs": -3,
        "backbone": "1",
        "item_text_separator": " | ",
        "prompt_sentence": "movies",
        "user": "007",
    }
    assert parse_command_line(["-h"]) == parse_command_line(["--help"]) == {"help": True}
    assert parse_command_line([]) == {}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["LLMSTAR"], "cannot read 'LLMSTAR' on the command line; write --key=value."),
        (["-beta=1"], "cannot read '-beta=1'"),
        (["--=1"], "cannot read '--=1'"),
        (["--beta"], "--beta needs a value: write --beta=value."),
        (["--beta", "--epochs=3"], "--beta needs a value"),
        (["--beta=1", "--beta=2"], "--beta is given twice on the command line."),
        (["--topk=[1, 2"], "--topk: cannot read the value '[1, 2'"),
        (["--topk=!!python/name:os.system"], "--topk: cannot read the value"),
    ],
)
def test_a_command_line_that_cannot_be_read(words, said):
    with pytest.raises(UserError, match=re.escape(said)):
        parse_command_line(words)


def test_a_hyphen_for_an_underscore_is_pointed_out():
    parsed = parse_command_line(["--learning-rate=1"])
    assert "did you mean 'learning_rate'?" in message("LLMSTAR", "ml-100k", command_line=parsed)


def test_settings_go_to_the_models_that_know_them():
    models = ["SASRec", "LLMSRec", "LLMSTAR"]
    given = {"epochs": 3, "SASRec.epochs": 5, "beta": 0.5, "n_layers": 1, "typo": 1, "teacher": "GRU4Rec"}
    assert settings_for("SASRec", given, models) == {"epochs": 5, "n_layers": 1, "typo": 1}
    assert settings_for("LLMSRec", given, models) == {"epochs": 3, "typo": 1, "teacher": "GRU4Rec"}
    assert settings_for("LLMSTAR", given, models) == {"epochs": 3, "beta": 0.5, "typo": 1, "teacher": "GRU4Rec"}
    # What only LLM recommenders read does not disturb a stock model beside them.
    wording = {"prompt_goal": "x", "prompt_sentence": "x", "title_words": ["a", "b", "c"], "teacher_settings": {"n_heads": 1}}
    assert settings_for("SASRec", wording, models) == {} and settings_for("LLMSTAR", wording, models) == wording
    # Where nobody in the run knows a key, it stays and is reported.
    assert settings_for("LLMSRec", {"beta": 1}, ["LLMSRec"]) == {"beta": 1}
    with pytest.raises(UserError, match=re.escape("'SASREC' is no model of this run")):
        settings_for("LLMSTAR", {"SASREC.epochs": 5}, models)


def test_settings_of_a_variant():
    given = {"beta": 0.5, "LLMSTAR.epochs": 3, "LLMSTAR:plain.beta": 0, "LLMSTAR:plain.epochs": 4}
    models = ["LLMSTAR", "LLMSTAR:plain", "LLMSTAR:other"]
    assert settings_for("LLMSTAR", given, models) == settings_for("LLMSTAR:other", given, models) == {"beta": 0.5, "epochs": 3}
    assert settings_for("LLMSTAR:plain", given, models) == {"beta": 0, "epochs": 4}
    with pytest.raises(UserError, match="did you mean 'LLMSTAR:plain'"):
        settings_for("LLMSTAR", {"LLMSTAR:plane.beta": 0}, models)
    assert parse_command_line(["--LLMSTAR:plain.beta=0"]) == {"LLMSTAR:plain.beta": 0}


# --- help -------------------------------------------------------------------------------------------------------------


def fits(text: str) -> bool:
    return all(len(line) <= 100 for line in text.splitlines())


def test_help_fits_a_screen(tmp_path, properties):
    (properties / "backbone" / "made-up.yaml").write_text("backbone_layers: 4\n")
    (tmp_path / "my-own").mkdir()
    (tmp_path / "my-own" / "my-own.inter").write_text("")
    text = help_text(tmp_path)
    assert fits(text) and len(text.splitlines()) <= 40
    words = ["GRU4Rec", "ml-100k", "my-own", "made-up", "--help --model=", "micro_batch_tokens"]
    for word in [*registry.MODELS, *words]:
        assert word in text
    assert "steam-100k" not in text, "a dataset that is neither there nor fetched by RecBole"


@pytest.mark.parametrize("name", [*registry.MODELS, "SASRec", "FEARec"])
def test_help_on_a_model_describes_each_of_its_keys_once(name):
    text, known = help_text(model=name), known_keys(name)
    assert fits(text) and name in text.splitlines()[0]
    for key in known.values():
        if key.meaning and not key.where.startswith("protocol/"):
            assert len(re.findall(rf"^  {re.escape(key.name)} = ", text, re.MULTILINE)) == 1, key.name


def test_help_on_a_model_shows_sections_defaults_and_marks():
    text = help_text(model="CoLLM,LLMSTAR:b")
    headings = [line for line in text.splitlines() if line and not line.startswith(" ")]
    order = ["Stages", "Asked by retrieval", "Asked by generation", "Training", "Speed and memory", "Evaluation", "Data"]
    assert [line for line in headings if line in order][: len(order)] == order
    assert headings[-1] == "RecBole's own" and headings.count("Losses") == 1
    assert "  epochs = 5  (int, > 0) [training]\n      most epochs" in text
    assert "  beta = 0.4  (float, >= 0)\n      weight of L_seq" in text
    assert "  micro_batch_tokens = 8192  (int, > 0) [cost]\n" in text
    assert "  recommend_by = retrieval  (str, one of retrieval|generation)\n" in text
    with pytest.raises(UserError, match="did you mean 'CoLLM'"):
        help_text(model="COLLM")


def test_help_lists_all_models_that_run_and_all_datasets(monkeypatch, tmp_path):
    for library in ("lightgbm", "xgboost"):
        monkeypatch.setitem(sys.modules, library, None)
    for name in [name for name in sys.modules if name.startswith("recbole.model.exlib_recommender")]:
        monkeypatch.delitem(sys.modules, name)
    text = help_text(model="all")
    assert fits(text) and {"LLMSTAR", "SASRec", "BPR"} <= set(re.findall(r"\w+", text))
    assert "LightGBM" not in text and "XGBoost" not in text
    text = help_text(tmp_path, dataset="all")
    assert fits(text) and "ml-100k, " in text and "amazon-books" in text


# --- datasets ---------------------------------------------------------------------------------------------------------


def test_movielens_loads_with_true_dates():
    config = make_config("SASRec", "ml-100k", config_dict={"protocol": "retrieval"})
    dataset = SequentialDataset(config)
    assert (dataset.user_num - 1, dataset.item_num - 1, dataset.inter_num) == (943, 1682, 100_000)
    assert set(dataset.inter_feat.columns) == {"user_id", "item_id", "timestamp"}
    years = np.asarray(dataset.inter_feat["timestamp"], dtype="datetime64[s]").astype("datetime64[Y]").astype(str)
    assert set(years) == {"1997", "1998"}
    with open(Path(config["data_path"]) / "ml-100k.item", encoding="utf-8") as file:
        assert {"movie_title", "release_year"} <= {column.partition(":")[0] for column in next(file).split("\t")}


SAMPLES = ["amazon-scientific-2018", "amazon-beauty", "amazon-electronics-sample", "steam-100k", "ml-1m-titles"]


@pytest.mark.skipif(not DATA, reason="RECBOLE_LLM_DATA names no folder with public datasets")
@pytest.mark.parametrize("name", [*SAMPLES, "amazon-cds-200"])
def test_a_sample_dataset_has_the_columns_that_its_settings_name(name):
    config = make_config("SASRec", name, config_dict={"protocol": "retrieval", "data_path": DATA})

    def header(suffix):
        with open(Path(config["data_path"]) / f"{name}.{suffix}", encoding="utf-8") as file:
            return dict(column.split(":") for column in next(file).rstrip("\n").split("\t"))

    assert header("inter") == {"user_id": "token", "item_id": "token", "timestamp": "float"}
    assert config["load_col"] == {"inter": list(header("inter"))}
    assert set(config["item_text"]) <= set(header("item"))
    assert (config["timestamp_format"] == "none") == (name in ("amazon-scientific-2018", "amazon-cds-200"))


@pytest.mark.skipif(not DATA, reason="RECBOLE_LLM_DATA names no folder with public datasets")
def test_a_sample_dataset_loads():
    config = make_config("SASRec", "amazon-cds-200", config_dict={"protocol": "full", "data_path": DATA})
    dataset = Dataset(config)
    assert (dataset.user_num - 1, dataset.item_num - 1, dataset.inter_num) == (200, 902, 1600)
    assert dataset.inter_feat["timestamp"].max() > 1


def test_datasets_are_found_by_their_files(tmp_path):
    assert datasets_in(tmp_path / "missing") == []
    for name, file in (("b", "b.inter"), ("a", "a.train.inter"), ("c", "c.item")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("")
    assert datasets_in(tmp_path) == ["a", "b"]
