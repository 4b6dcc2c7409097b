"""What decides what a model becomes, and what of a run holds for its teacher, its baselines and its pre-training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from recbole_llm.config.identity import (
    data_settings,
    deciding_settings,
    own_training_keys,
    settings_for_pretraining,
    settings_for_teacher,
)
from recbole_llm.config.schema import Key, known_keys
from recbole_llm.config.settings import make_config
from recbole_llm.data.shared import SharedData
from recbole_llm.quick_start import compare
from recbole_llm.run_model import run_folder
from recbole_llm.teacher.teacher import teacher_config

# Other values where one that is made up would be refused.
OTHER = {
    "teacher": "GRU4Rec",
    "teacher_settings": {"n_layers": 1},
    "normalize_all": None,
    "load_col": {"inter": ["user_id", "item_id", "timestamp", "rating"]},
    "clip_grad_norm": {"max_norm": 1.0},
    "valid_metric": "NDCG@10",
    "metrics": ["NDCG", "Hit", "MRR"],
    "topk": [10, 20, 50],
    "eval_args": {"mode": "uni9"},
    "backbone": "tiny",
    "gpu_id": "1",
    "timestamp_format": "none",
}
# What RecBole sets, or refuses; keys of one protocol; and the recipes, which test_presets.py is about.
OF_CUTS = {"valid_from": 0.5, "test_from": 0.95, "unseen": "keep", "test_targets": "all"}
NOT_GIVEN = {"train_neg_sample_args", "repeatable", "like_threshold", "preset", *OF_CUTS} | {
    name for name, key in known_keys("LLMSTAR").items() if key.section == "Processes"
}
SET_BY_RECBOLE = {"device", "single_spec", "local_rank", "nproc", "world_size", "group_offset", "offset", "ip", "port"}


@pytest.fixture(autouse=True)
def no_gpu_chosen(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def another(key: Key) -> Any:
    """A value of a key that is not its default."""
    value = key.default
    if key.name in OTHER:
        return OTHER[key.name]
    if key.choices:
        return next(choice for choice in key.choices if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value / 2 if "float" in key.types and value else value + 1
    if isinstance(value, list) or key.types[:1] == ("list",):
        return [*(value or []), "z"] if not value or isinstance(value[0], str) else [entry / 2 for entry in value]
    if key.types[:1] == ("bool",):
        return True
    if key.types[:1] == ("float",):
        return 0.5
    if key.types[:1] == ("dict",):
        return {**(value or {}), "z": 1}
    return 3 if key.types[:1] == ("int",) else f"{value}z"


def keys_of(model: str, *marks: str) -> list[Key]:
    """The keys of our files that a run of ``model`` accepts, with one of these marks."""
    known = known_keys(model).values()
    skipped = NOT_GIVEN | SET_BY_RECBOLE
    return [key for key in known if key.mark in marks and (key.meaning or key.mark) and key.name not in skipped]


def ours(*marks: str) -> list[Key]:
    return [key for key in keys_of("LLMSTAR", *marks) if key.type and not key.where.startswith("recbole")]


def config_of(model: str = "LLMSTAR", dataset: str = "ml-100k", **settings: Any):
    return make_config(model, dataset, config_dict=settings)


def name(key: Key) -> str:
    return key.name


DECIDING = ["", "data", "training", "text", "teacher"]


# --- a run --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain():
    return config_of()


@pytest.mark.parametrize("key", keys_of("LLMSTAR", "cost", "output"), ids=name)
def test_a_run_is_found_again_whatever_it_costs_or_shows(plain, key):
    changed = config_of(**{key.name: another(key)})
    assert run_folder(changed, "data").name == run_folder(plain, "data").name


@pytest.mark.parametrize("key", ours(*DECIDING), ids=name)
def test_a_run_with_another_deciding_setting_is_another(plain, key):
    changed = config_of(**{key.name: another(key)})
    assert run_folder(changed, "data").name != run_folder(plain, "data").name


@pytest.mark.parametrize("key", OF_CUTS)
def test_the_cuts_in_time_decide_what_a_run_and_its_teacher_become(key):
    plain, changed = config_of(protocol="temporal"), config_of(protocol="temporal", **{key: OF_CUTS[key]})
    assert run_folder(changed, "data").name != run_folder(plain, "data").name
    assert deciding_settings(teacher_config(changed)) != deciding_settings(teacher_config(plain))


def test_a_run_is_found_by_its_settings_however_they_were_given(plain):
    given = config_of(beta=0.4, epochs=10, prompt_goal="")
    assert run_folder(given, "data") == run_folder(plain, "data")
    assert run_folder(plain, "data") != run_folder(plain, "other data")
    assert run_folder(config_of(seed=1), "data") != run_folder(plain, "data")
    assert run_folder(plain, "data").parent == Path("saved")


def test_a_run_belongs_to_what_the_file_beside_its_data_says(tmp_path):
    """A file that is edited between a kill and the next start makes another run."""
    file = tmp_path / "mine" / "mine.yaml"
    file.parent.mkdir()
    folders = set()
    for text in ("", "item_text: [brand]\n", "user_inter_num_interval: '[9,inf)'\n", "title_words: [film, see, saw]\n"):
        file.write_text(text)
        config = make_config("LLMSTAR", "mine", config_dict={"data_path": str(tmp_path)})
        folders.add(run_folder(config, "data").name)
    assert len(folders) == 4


# --- a teacher ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher():
    return deciding_settings(teacher_config(config_of()))


@pytest.mark.parametrize("key", keys_of("LLMSTAR", "cost", "output", "text"), ids=name)
def test_a_teacher_is_found_again_whatever_a_run_costs_shows_or_says(teacher, key):
    changed = config_of(**{key.name: another(key)})
    assert deciding_settings(teacher_config(changed)) == teacher


def test_a_teacher_does_not_depend_on_the_words_of_the_dataset(teacher):
    assert {"title_words", "prompt_sentence", "item_text"} <= known_keys("LLMSTAR").keys()
    assert not {"title_words", "prompt_sentence", "item_text", "teacher_training"} & teacher.keys()
    assert {"n_layers", "MAX_ITEM_LIST_LENGTH", "eval_args", "seed"} <= teacher.keys()


def test_a_stock_model_of_other_item_attributes_is_another(chain_data, tmp_path):
    """FDSA reads brands: one that was trained on other brands is not taken for it, one of the same is."""
    settings = {
        "protocol": "retrieval", "data_path": str(tmp_path / "data"), "selected_features": ["brand"], "epochs": 1,
        "hidden_size": 8, "inner_size": 16, "n_layers": 1, "eval_args": {"mode": "uni9"}, "topk": [5], "valid_metric": "Hit@5",
        "load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "title", "brand"]},
        "use_gpu": False, "show_progress": False,
    }  # fmt: skip
    shutil.copytree(chain_data, tmp_path / "data")
    file = tmp_path / "data" / "chain" / "chain.item"
    head, *lines = file.read_text().splitlines()
    folders = []
    for brands in ("ab", "ba", "ab"):
        branded = [f"{line}\t{brands[number % 2]}" for number, line in enumerate(lines)]
        file.write_text("\n".join([f"{head}\tbrand:token", *branded]) + "\n")
        folders.append(compare(["FDSA"], "chain", settings=settings)[0]["checkpoint"])
    assert folders[0] == folders[2] != folders[1]


@pytest.mark.parametrize("settings", [{"title_words": ["film", "see", "saw"]}, {"micro_batch_tokens": 64, "topk": [1, 2, 5]}])
def test_a_teacher_is_trained_once(make_model, settings):
    first = make_model("LLMSRec")[1].teacher_run
    again = make_model("LLMSRec", **settings)[1].teacher_run
    assert not first.loaded and again.loaded and again.folder == first.folder


@pytest.mark.parametrize(
    "settings",
    [
        {"teacher_settings": {"epochs": 7}},
        {"teacher_settings": {"hidden_size": 32}},
        {"teacher_settings": {"learning_rate": 0.1}},
        {"teacher_settings": {"valid_users": 7}},
        {"candidate_sampling": "recbole"},
        {"seed": 1},
        {"MAX_ITEM_LIST_LENGTH": 20},
        {"eval_args": {"mode": "uni9"}},
        {"valid_metric": "NDCG@10"},
        {"teacher": "GRU4Rec"},
    ],
    ids=str,
)
def test_a_teacher_of_other_settings_is_another(teacher, settings):
    assert deciding_settings(teacher_config(config_of(**settings))) != teacher


def test_what_of_a_run_holds_for_its_teacher():
    held = {"seed": 1, "topk": [10, 5], "item_text": ["class"], "show_progress": False, "resume": True}
    held["candidate_sampling"] = "recbole"
    own = {"valid_users": 7, "valid_items": 9, "results_file": "x", "per_user_file": "x", "epochs": 2}
    about = {"teacher": "GRU4Rec", "teacher_training": "prefix", "teacher_checkpoint": "x", "title_words": ["a", "b", "c"]}
    assert settings_for_teacher(config_of(**held, **own, **about)) == held


def test_a_baseline_has_training_settings_of_its_own():
    keys = own_training_keys()
    assert {"epochs", "learning_rate", "train_batch_size", "stopping_step"} <= keys
    assert {"valid_users", "valid_items"} <= keys and not {"seed", "topk", "protocol", "item_text"} & keys


# --- a pre-training -----------------------------------------------------------------------------------------------------


NOT_FOR_PRETRAINING = (
    "pretrain_datasets pretrain_settings pretrained head tuning windows epochs train_batch_size accumulation_steps "
    "learning_rate learning_rate_schedule learning_rate_decay learning_rate_decay_every learning_rate_min warmup_steps "
    "eval_step stopping_step"
).split()


def test_the_keys_of_one_training_are_marked():
    assert {key.name for key in known_keys("ST2SI").values() if key.mark == "training"} == set(NOT_FOR_PRETRAINING)


def test_what_of_a_run_holds_for_its_pre_training():
    held = {"seed": 1, "lora_r": 2, "valid_users": 7, "learner": "sgd", "checkpoint_dir": "x", "micro_batch_tokens": 64}
    own = {"epochs": 2, "tuning": "ilp", "windows": "fixed", "results_file": "x", "merge_adapter": True, "head": "x"}
    assert settings_for_pretraining(config_of("ST2SI", **held, **own)) == held


# --- data ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ours("cost", "output", "training", "teacher"), ids=name)
def test_data_do_not_depend_on_the_model(plain, key):
    assert data_settings(config_of(**{key.name: another(key)})) == data_settings(plain)


@pytest.mark.parametrize(
    "settings",
    [
        {"item_text": ["class"]},
        {"item_text_separator": " "},
        {"item_representation": "id"},
        {"timestamp_format": "none"},
        {"MAX_ITEM_LIST_LENGTH": 9},
        {"eval_args": {"mode": "full"}},
        {"user_inter_num_interval": "[9,inf)"},
    ],
    ids=str,
)
def test_other_data_are_other_data(plain, settings):
    assert data_settings(config_of(**settings)) != data_settings(plain)


def test_labels_are_a_part_of_the_data():
    first, other = (config_of("TALLRec", protocol="yes_no", recommend_by="yes_no", like_threshold=at) for at in (3.0, 4.0))
    assert data_settings(first) != data_settings(other)


def test_one_dataset_for_all_models_of_a_run(chain_data):
    data = SharedData()
    given = {"protocol": "retrieval", "data_path": str(chain_data)}
    first = data.splits(config_of("SASRec", "chain", **given))
    again = data.splits(config_of("LLMSTAR", "chain", backbone="tiny", prompt_goal="x", epochs=3, **given))
    other = data.splits(config_of("LLMSTAR", "chain", item_representation="id", **given))
    assert first is again and first is not other
