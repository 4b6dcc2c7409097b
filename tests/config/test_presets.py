"""Published recipes: each resolves to the values of its source, and stands where it should among the other settings."""

from __future__ import annotations

import sys

import pytest

from recbole_llm import registry
from recbole_llm.config.identity import deciding_settings
from recbole_llm.config.presets import presets_of
from recbole_llm.config.schema import known_keys, load_yaml
from recbole_llm.config.settings import make_config
from recbole_llm.configure import configure, default_protocol
from recbole_llm.errors import UserError
from recbole_llm.teacher.teacher import teacher_config

PROPERTIES = registry.properties_folder()

# LLM-SRec, appendix E: one recipe for all models of its tables (Adam at 1e-4, batch 20, 16 on Electronics, at most 10 epochs,
# validation at each tenth, patience 10, d' = 128), and what its code adds.
GROUP = {
    "learner": "adam", "adam_betas": [0.9, 0.98], "learning_rate": 1e-4, "learning_rate_schedule": "step",
    "learning_rate_decay": 0.95, "learning_rate_decay_every": 0.1, "train_batch_size": 20, "accumulation_steps": 1,
    "epochs": 10, "eval_step": 0.1, "stopping_step": 10, "representation_size": 128, "head_hidden_size": 2048,
    "train_negatives": 3,
    "train_targets": "last", "history_length": 10, "max_prompt_tokens": 1024, "valid_users": 10000,
    "valid_items": None, "protocol": "retrieval", "valid_metric": "Hit@10",
}  # fmt: skip
LORA = {"tuning": "lora", "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "lora_target_modules": ["q_proj", "v_proj"]}
BASELINE = {**GROUP, "out_tokens": 3, "prompt_goal": " to recommend one next item for this user,", "recommend_by": "retrieval"}
THEIR_TEACHER = {"teacher": "SASRec", "teacher_preset": "llmsrec"}
LLMSREC = {
    **GROUP, **THEIR_TEACHER, "out_tokens": 1, "prompt_goal": "", "teacher_head_hidden_size": 128, "tuning": "frozen",
    "distill_loss": "mse", "mse_reduction": "mean", "distill_weight": 1.0, "uniform_weight": 1.0,
    "item_projection_hidden_size": None,
}  # fmt: skip

SOURCED = {
    ("LLMSRec", "paper"): LLMSREC,
    ("LLMSRec", "llmsrec"): LLMSREC,
    # LLM-STAR, section 4.1.
    ("LLMSTAR", "paper"): {
        **GROUP, **THEIR_TEACHER, "learning_rate_decay": 1.0, "out_tokens": 1, "beta": 0.4, "tuning": "frozen",
        "item_projection_hidden_size": 2048,
    },
    # gaudi_recsys_public, On_Going_for_Gaudi: llm4rec_baseline.py, llmrec_model_baseline.py, train_model_baseline.py.
    ("TALLRec", "llmsrec"): {**BASELINE, **LORA, "teacher": "SASRec"},
    ("LLaRA", "llmsrec"): {
        **BASELINE, **LORA, **THEIR_TEACHER, "projector": "normalized", "curriculum": "sample", "curriculum_epochs": 1.0,
        "warmup_steps": 0,
    },
    ("CoLLM", "llmsrec"): {
        **BASELINE, **LORA, **THEIR_TEACHER, "prompt_basis": " and user representation", "mapping": "normalized",
        "stages": [{"name": "joint", "trains": ["lora", "mapping", "heads"], "vectors": True}],
    },
    ("ALLMRec", "llmsrec"): {
        **BASELINE, **THEIR_TEACHER, "tuning": "frozen", "prompt_basis": " and user representation", "alignment_batch_size": 64,
        "alignment_epochs": 5, "alignment_learning_rate": 1e-4, "alignment_weights": [1.0, 0.5, 0.2, 1.0], "latent_size": 128,
    },
    # SAI990323/TALLRec: shell/instruct_7B.sh.
    ("TALLRec", "own"): {
        **LORA, "recommend_by": "yes_no", "protocol": "yes_no", "train_batch_size": 128, "epochs": 200, "learning_rate": 1e-4,
        "learning_rate_schedule": "linear", "warmup_steps": 20, "learner": "adamw", "max_prompt_tokens": 512,
        "like_threshold": 3.0, "stopping_step": 10, "history_length": 10, "empty_list": "",
    },
    # ljy0ustc/LLaRA: train_movielens.sh, main.py.
    ("LLaRA", "own"): {
        "recommend_by": "generation", "protocol": "generation", "tuning": "lora", "lora_r": 8, "lora_alpha": 32,
        "lora_dropout": 0.1, "lora_target_modules": "all-linear", "train_batch_size": 8, "accumulation_steps": 16, "epochs": 5,
        "learning_rate": 8e-4, "learning_rate_schedule": "cosine", "learning_rate_min": 8e-6, "warmup_steps": 0.05,
        "train_candidates": 20, "projector": "perceptron", "curriculum": "linear", "curriculum_epochs": None, "eval_step": 1.0,
        "decode": "greedy", "answer_match": "substring", "title_quotes": False,
    },
    # zyang1580/CoLLM: train_configs/collm_pretrain_sasrec_ood_cc.yaml.
    ("CoLLM", "own"): {
        **LORA, "train_batch_size": 16, "learner": "adamw", "weight_decay": 1e-3, "learning_rate": 1e-3,
        "learning_rate_schedule": "cosine", "learning_rate_min": 8e-5, "warmup_steps": 200, "item_projection_hidden_size": 640,
        "mapping": "shared",
        "stages": [
            {"name": "text", "trains": ["lora", "heads"], "vectors": False},
            {"name": "mapping", "trains": ["mapping", "heads"], "vectors": True},
        ],
    },
    # ghdtjr/A-LLMRec: main.py, a_llmrec_model.py.
    ("ALLMRec", "own"): {
        "recommend_by": "generation", "protocol": "generation", "tuning": "frozen", "alignment_batch_size": 32,
        "alignment_epochs": 10, "alignment_learning_rate": 1e-4, "alignment_weights": [1.0, 0.5, 0.2, 1.0],
        "train_batch_size": 2, "learning_rate": 1e-4, "adam_betas": [0.9, 0.98], "train_candidates": 20, "eval_step": 0,
    },
    # RSLLM, section 5.1.
    ("RSLLM", "paper"): {
        "recommend_by": "generation", "protocol": "generation", "learner": "adam", "learning_rate": 1e-5, "warmup_steps": 0.1,
        "weight_decay": 1e-3, "train_batch_size": 256, "epochs": 3, "gamma": 0.3, "beta": 0.4, "temperature": 0.5,
        "embedding_size": 64, "train_candidates": 20, "title_quotes": False,
    },
    # ST2SI, appendix A.3; zhaijianyang/ST2SI: log/Arts.log.
    ("ST2SI", "paper"): {
        "protocol": "full", "tuning": "full", "history_length": 50, "max_attribute_tokens": 32, "max_prompt_tokens": 1024,
        "learner": "adamw", "train_batch_size": 32, "accumulation_steps": 4, "epochs": 30, "stopping_step": 5,
        "warmup_steps": 100, "weight_decay": 0.0, "id_alignment": True, "queries": "all", "query_text": ".",
        "attribute_names": True, "learning_rate_schedule": "cosine", "learning_rate_min": 0.0,
    },
}  # fmt: skip

OF_DATA_SETS = {
    ("LLMSTAR", "paper", "amazon-cds"): {"beta": 0.7, "train_batch_size": 20},
    ("LLMSTAR", "paper", "amazon-electronics"): {"beta": 0.4, "train_batch_size": 16},
    **{
        (model, "llmsrec", "amazon-electronics"): {"train_batch_size": 16}
        for model in ("LLMSRec", "TALLRec", "LLaRA", "CoLLM", "ALLMRec")
    },
    ("LLaRA", "own", "steam"): {
        "learning_rate": 5e-4, "learning_rate_min": 5e-6, "train_batch_size": 4, "accumulation_steps": 32,
    },
    ("LLaRA", "own", "lastfm"): {"learning_rate": 7e-4, "learning_rate_min": 7e-6, "train_batch_size": 8},
}


@pytest.fixture(autouse=True)
def foreign_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program"])


@pytest.fixture
def made(tmp_path):
    """A function (model, dataset, **settings) -> its configuration; the data set is an empty folder."""

    def make(model, dataset="ml-100k", **settings):
        (tmp_path / dataset).mkdir(exist_ok=True)
        return make_config(model, dataset, config_dict={"data_path": str(tmp_path), **settings})

    return make


def rated(preset):
    """Columns that the labels of yes and no are made of."""
    return {"load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"]}} if preset.get("protocol") == "yes_no" else {}


def test_the_table_has_every_recipe():
    files = {file.relative_to(PROPERTIES / "preset") for file in (PROPERTIES / "preset").rglob("*.yaml")}
    assert {(str(file.parent), file.stem) for file in files} - {("SASRec", "llmsrec")} == set(SOURCED)


@pytest.mark.parametrize(("model", "preset"), SOURCED)
def test_a_recipe_is_what_its_source_says(model, preset, made):
    expected = SOURCED[model, preset]
    config = made(model, preset=preset, **rated(expected))
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize(("model", "preset", "dataset"), OF_DATA_SETS)
def test_a_recipe_may_differ_by_data_set(model, preset, dataset, made):
    expected = OF_DATA_SETS[model, preset, dataset]
    config = made(model, dataset, preset=preset)
    assert {key: config[key] for key in expected} == expected
    assert config["datasets"] is None


@pytest.mark.parametrize(("model", "preset"), [*SOURCED, ("SASRec", "llmsrec")])
def test_a_recipe_has_known_keys_and_values_that_fit(model, preset):
    settings = load_yaml(presets_of(model)[preset])
    known = known_keys(model)
    for values in (settings, *settings.pop("datasets", {}).values()):
        for name, value in values.items():
            assert name in known, name
            assert known[name].fit(value) == value, name


def test_what_the_user_says_wins_over_a_recipe_and_a_recipe_over_the_models_defaults(made):
    assert made("LLaRA")["lora_alpha"] == 16
    assert made("LLaRA", preset="own")["lora_alpha"] == 32
    assert made("LLaRA", preset="own", lora_alpha=4)["lora_alpha"] == 4
    # What train_targets brings with it is what the user asked for.
    assert made("LLMSRec", preset="paper", train_targets="window")["learning_rate"] == 1e-3
    # The wording of the data set stays.
    assert "movies" in made("CoLLM", preset="llmsrec")["prompt_request"]


def test_the_name_of_a_recipe_decides_nothing(made):
    named = deciding_settings(made("TALLRec", preset="llmsrec"))
    spelled = {key: value for key, value in load_yaml(presets_of("TALLRec")["llmsrec"]).items() if key != "datasets"}
    assert named == deciding_settings(made("TALLRec", **spelled))


def test_a_recipe_that_a_model_does_not_have(made):
    with pytest.raises(UserError, match=r"^preset: LLMSTAR has no preset 'llmsrec'; it has paper\. \(config_dict\)$"):
        made("LLMSTAR", preset="llmsrec")
    with pytest.raises(UserError, match="TALLRec has no preset 'papr'; it has llmsrec, own"):
        made("TALLRec", preset="papr")
    with pytest.raises(UserError, match="ZeroShot has no preset 'paper'; it has none"):
        made("ZeroShot", preset="paper")


def test_models_and_variants_of_a_comparison_have_recipes_of_their_own(tmp_path):
    (tmp_path / "ml-100k").mkdir()
    models = ["SASRec", "LLaRA", "LLaRA:o", "LLMSTAR"]
    settings = {"data_path": str(tmp_path), "preset": "llmsrec", "LLaRA:o.preset": "own", "LLMSTAR.preset": "paper"}
    configs = {name: configure(name, "ml-100k", models, None, None, settings) for name in models}
    assert [configs[name]["lora_alpha"] for name in models[1:3]] == [16, 32]
    assert configs["LLMSTAR"]["learning_rate_decay"] == 1.0
    assert configs["SASRec"]["n_heads"] == 2, "the models do not agree on their teacher: the baseline is RecBole's"
    alone = {key: value for key, value in settings.items() if "." not in key}
    baseline = configure("SASRec", "ml-100k", ["SASRec", "LLaRA"], None, None, alone)
    assert baseline["n_heads"] == 1, "the baseline is the teacher, trained once"
    teacher = teacher_config(configure("LLaRA", "ml-100k", ["SASRec", "LLaRA"], None, None, alone))
    assert deciding_settings(baseline) == deciding_settings(teacher)


def test_a_recipe_brings_the_protocol_of_its_form():
    assert default_protocol(["LLaRA"], {}) == "retrieval"
    assert default_protocol(["LLaRA"], {"preset": "own"}) == "generation"
    assert default_protocol(["LLaRA"], {"LLaRA.preset": "own", "recommend_by": "retrieval"}) == "retrieval"
    assert default_protocol(["TALLRec:o"], {"TALLRec:o.preset": "own"}) == "yes_no"


# The teacher


def test_teacher_preset_is_for_teacher_and_baseline(made):
    theirs = {
        "hidden_size": 64, "inner_size": 64, "n_layers": 2, "n_heads": 1, "hidden_dropout_prob": 0.1, "attn_dropout_prob": 0.1,
        "MAX_ITEM_LIST_LENGTH": 128, "epochs": 200, "train_batch_size": 128, "learning_rate": 1e-3, "hidden_act": "relu",
        "teacher_training": "binary",
    }  # fmt: skip  # Sein-Kim/LLM-SRec, SeqRec/sasrec/main.py
    teacher = teacher_config(made("LLMSRec", teacher_preset="llmsrec"))
    assert {key: teacher[key] for key in theirs} == theirs
    baseline = made("SASRec", protocol="retrieval", teacher_preset="llmsrec")
    assert {key: baseline[key] for key in theirs} == theirs
    assert made("SASRec", protocol="retrieval")["n_heads"] == 2
    own = teacher_config(made("LLMSRec", teacher_preset="llmsrec", teacher_settings={"epochs": 3}))
    assert (own["epochs"], own["n_heads"]) == (3, 1)
    # A baseline without such a recipe keeps its settings, a teacher is told.
    assert made("GRU4Rec", protocol="retrieval", teacher_preset="llmsrec")["teacher_training"] == "causal"
    with pytest.raises(UserError, match="teacher_preset: GRU4Rec has no preset llmsrec, only SASRec has"):
        teacher_config(made("LLMSRec", teacher="GRU4Rec", teacher_preset="llmsrec"))


def test_what_is_said_of_the_teacher_does_not_take_a_recipe_of_it_back(made):
    config = made("CoLLM", preset="own", teacher_settings={"epochs": 3})
    assert config["teacher_settings"]["n_heads"] == 4 and config["teacher_settings"]["epochs"] == 3
