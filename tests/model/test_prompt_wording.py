"""What the prompts of the models say, to the letter, with the wording of the dataset and the settings."""

import pytest
import torch

from recbole_llm.config.settings import make_config
from recbole_llm.data.prepare import generate_chain
from recbole_llm.data.shared import SharedData
from recbole_llm.registry import MODELS


def first_prompt(model, splits):
    """The user prompt of the first test row; vectors and out tokens left out."""
    batch = model.prompts.user_prompts(model.histories(splits["test"].inter_feat[torch.arange(1)]))
    return model.backbone.tokenizer.decode([token for token in batch.tokens[: batch.offsets[1]] if token >= 0])


# item_representation: id


def test_ids_stand_in_place_of_titles_and_the_teacher_stays(make_model):
    _, titled, splits = make_model("LLMSRec")
    _, model, ids = make_model("LLMSRec", item_representation="id")
    expected = first_prompt(titled, splits)
    tokens = ids["test"].field2id_token["item_id"]
    for item in splits["test"].inter_feat["item_id_list"][0]:
        expected = expected.replace(f'"{splits["test"].item_texts[item]}"', f'"{tokens[item]}"')
    assert first_prompt(model, ids) == expected and "The " not in expected
    assert model.teacher_run.loaded and model.teacher_run.folder == titled.teacher_run.folder
    assert model.fingerprint != titled.fingerprint  # other texts


def test_models_of_one_comparison_may_differ_in_it(tiny_settings):
    data = SharedData()
    titled, ids = (
        data.splits(make_config("LLMSRec", "chain", config_dict={**tiny_settings, "item_representation": kind}))["test"]
        for kind in ("title", "id")
    )
    assert titled.item_texts != ids.item_texts == ["", *ids.field2id_token["item_id"][1:]]


# The end of the user prompt


@pytest.fixture(scope="module")
def games(tmp_path_factory):
    """Generated data under a name that has wording of its own."""
    folder = tmp_path_factory.mktemp("games")
    generate_chain(folder, "steam-100k", users=20, items=30, seed=2, noise=0.1)
    return str(folder)


def of_first_user(splits, words):
    """What stands between the opening and the end of the first test row's prompt of text alone."""
    row = splits["test"].inter_feat[torch.arange(1)]
    shown = range(int(row["item_length"]))[-10:]
    items = [splits["test"].item_texts[row["item_id_list"][0, place]] for place in shown]
    dates = splits["test"].item_dates(row["timestamp_list"][0, list(shown)].numpy())
    listed = [f'Item No.{rank}, Time: {date}, "{item}"' for rank, (date, item) in enumerate(zip(dates, items, strict=True), 1)]
    return f"<s>This user has {words} in the following order: " + ",".join(listed)


@pytest.mark.parametrize(
    ("model", "goal"),
    [("TALLRec", " to recommend one next item for this user,"), ("LLaRA", " to recommend one next item for this user,"),
     ("LLMSRec", ""), ("LLMSTAR", "")],
)  # fmt: skip
def test_user_prompts_say_what_the_papers_code_says(make_model, games, model, goal):
    _, plain, splits = make_model(model)
    assert first_prompt(plain, splits) == (
        of_first_user(splits, "made a series of purchases")
        + f". Based on this sequence of purchases,{goal} generate user representation token:"
    )
    _, own, splits = make_model(model, "steam-100k", data_path=games)
    assert first_prompt(own, splits) == (
        of_first_user(splits, "played a series of games")
        + f". Based on this sequence of games,{goal} generate user representation token:"
    )


def test_the_baselines_of_llmsrec_name_their_goal():
    config_of = {name: make_config(name, "ml-100k") for name in MODELS if name != "ZeroShot"}
    with_goal = {name for name, config in config_of.items() if config["prompt_goal"]}
    assert with_goal == {"TALLRec", "LLaRA", "CoLLM", "ALLMRec", "RSLLM"}  # RSLLM stands beside them


def test_a_request_of_the_users_own_is_taken_as_it_is(make_model):
    _, model, splits = make_model("TALLRec", prompt_request=". What next?")
    assert first_prompt(model, splits).endswith('". What next?')
    _, model, splits = make_model("TALLRec", prompt_request=". Next,{goal} say:", prompt_goal=" please,")
    assert first_prompt(model, splits).endswith('". Next, please, say:')
