"""LLM-Rec: its texts, its loss by hand, and what a window costs."""

import numpy as np
import pytest
import torch

from recbole_llm.errors import UserError
from recbole_llm.loading import load_data_and_model
from recbole_llm.recommend import ITEM_VECTORS, load


@pytest.fixture
def make(make_model):
    return lambda **settings: make_model("LLMRec", train_negatives=3, **settings)


def texts_of(model, batch):
    tokens = [batch.tokens[slice(*bounds)] for bounds in zip(batch.offsets, batch.offsets[1:], strict=False)]
    assert all((row[:-1] >= 0).all() and row[-1] < 0 for row in tokens)  # the end alone is given as a vector
    return [model.backbone.tokenizer.decode(row[:-1]) for row in tokens]


def plain_state(model, text, limit=40):
    """The state at </s> behind a text, by the plain LLM."""
    backbone, ids = model.backbone, []
    for item in text:
        ids += backbone.tokenizer(item + "; ", add_special_tokens=False)["input_ids"][:limit]
    ids = torch.tensor([[*backbone.prefix_ids, *ids, backbone.tokenizer.eos_token_id]])
    return backbone.model(input_ids=ids, use_cache=False).last_hidden_state[0, -1]


def test_prompts_are_the_items_texts_alone(make):
    _, model, splits = make(history_length=3)
    rows = splits["test"].inter_feat[torch.arange(4)]
    titles = splits["test"].item_texts
    expected = []
    for items, length in zip(rows["item_id_list"].tolist(), rows["item_length"].tolist(), strict=True):
        expected.append("<s>" + "".join(f"{titles[item]}; " for item in items[:length][-3:]))
    assert texts_of(model, model.prompts.user_prompts(model.histories(rows))) == expected
    assert texts_of(model, model.prompts.item_prompts(np.array([1, 7]))) == [f"<s>{titles[item]}; " for item in (1, 7)]


def test_loss_and_scores_by_hand(make):
    """-log softmax of <h_u, h_i> over the target and its negatives, from one plain forward pass for each text."""
    _, model, _ = make(tuning="frozen", max_item_tokens=12)
    model.eval()
    rows, titles = model._dataset.inter_feat[torch.arange(3)], model._dataset.item_texts
    model.seed_step(4)
    candidates = model.training_candidates(rows)
    assert candidates.shape == (3, 4)
    losses, scores = [], []
    for row in range(3):
        history = rows["item_id_list"][row, : rows["item_length"][row]].tolist()[-10:]
        user = plain_state(model, [titles[item] for item in history], 12)
        logits = torch.stack([user @ plain_state(model, [titles[item]], 12) for item in candidates[row]])
        scores.append(logits)
        losses.append(-logits.log_softmax(0)[0])
    model.seed_step(4)
    torch.testing.assert_close(model.calculate_loss(rows)[0], torch.stack(losses).mean(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.score(rows, torch.from_numpy(candidates)), torch.stack(scores), rtol=1e-4, atol=1e-4)


def test_a_titles_length_is_cut_with_its_end(make):
    _, model, _ = make(max_item_tokens=2)
    short, whole = (texts_of(model, prompts.item_prompts(np.array([3])))[0] for prompts in (model.prompts, make()[1].prompts))
    assert whole.startswith(short) and whole.endswith("; ") and not short.endswith("; ")


def test_an_llm_without_an_end_of_text_token_is_refused(make, monkeypatch):
    from recbole_llm.backbone import built_in, load

    def without_end():
        tokenizer = built_in.make_tiny_tokenizer()
        tokenizer.eos_token = None
        return tokenizer

    monkeypatch.setattr(load, "make_tiny_tokenizer", without_end)
    with pytest.raises(UserError, match="backbone: its tokenizer has no end-of-text token"):
        make()


def test_the_published_settings_are_the_defaults():
    from recbole_llm.config.settings import make_config

    config = make_config("LLMRec", "ml-100k")
    assert config["train_batch_size"] * config["accumulation_steps"] == 96
    assert (config["train_negatives"], config["learning_rate"], config["adam_eps"]) == (10, 5e-5, 1e-4)
    assert config["train_targets"] == "all" and config["tuning"] == "full"


@pytest.mark.slow
def test_stored_item_vectors_are_as_wide_as_the_states(make, tiny_settings, tmp_path):
    """And so a second process reads them, and encodes nothing."""
    from recbole_llm import cli

    settings = {
        **{key: tiny_settings[key] for key in ("data_path", "checkpoint_dir", "eval_args", "topk", "valid_metric", "use_gpu")},
        **{"model": "SASRec,LLMRec", "dataset": "chain", "LLMRec.epochs": 1, "SASRec.epochs": 1, "LLMRec.eval_step": 1},
        **{"show_progress": False, "backbone": "tiny", "LLMRec.train_targets": "last", "train_negatives": 3},
    }
    assert cli.main(["run", *(f"--{key}={value}" for key, value in settings.items())]) == 0
    (folder,) = (tmp_path / "saved").glob("LLMRec-*")
    first = load(folder)
    history = [first.history_of("u1")]
    found = first.recommend(histories=history, topk=3)
    assert (folder / ITEM_VECTORS).is_file()
    again = load(folder)
    assert [item.item for item in again.recommend(histories=history, topk=3)[0]] == [item.item for item in found[0]]
    assert again.model.item_table.encoded == 0
    assert load_data_and_model(folder)[1].item_table.encoded == 0
    unknown = again.recommend(histories=[[*history[0], "The Unknown Story"]], topk=3, unknown_titles="text")
    assert len(unknown[0]) == 3
