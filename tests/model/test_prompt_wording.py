"""What the prompts of the models say, to the letter, with the wording of the dataset and the settings."""

import torch

from recbole_llm.config import make_config
from recbole_llm.quick_start import SharedData


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
    assert model.fingerprint == titled.fingerprint


def test_models_of_one_comparison_may_differ_in_it(tiny_settings):
    data = SharedData()
    titled, ids = (
        data.splits(make_config("LLMSRec", "chain", config_dict={**tiny_settings, "item_representation": kind}))["test"]
        for kind in ("title", "id")
    )
    assert titled.item_texts != ids.item_texts == ["", *ids.field2id_token["item_id"][1:]]
