"""What the published recipes need of the models: keys that their defaults leave alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from recbole_llm.errors import UserError
from recbole_llm.loss.binary import binary_loss
from recbole_llm.teacher.stock import BinaryTraining, negatives_of

LORA = {"tuning": "lora", "lora_dropout": 0.0}


def rows_of(split, count=4):
    return split.inter_feat[torch.arange(count)]


# LLaRA


def test_a_curriculum_by_users_shows_each_user_one_kind_of_prompt(make_model):
    _, model, splits = make_model("LLaRA", curriculum="sample", curriculum_epochs=1.0, **LORA)
    rows, seen = rows_of(model._dataset, 6), []

    def loss(part):
        seen.append((model.hybrid, part["user_id"].tolist()))
        return (torch.tensor(1.0 if model.hybrid else 5.0),)

    model.form.loss = loss
    model.progress = 0.25  # of two epochs: half of the first
    assert model.share_hybrid == 0.5
    total = model.calculate_loss(rows)[0]
    users = dict(seen)
    assert sorted(users[True] + users[False]) == sorted(rows["user_id"].tolist()), "both kinds, each user once"
    assert total.item() == pytest.approx((len(users[True]) + 5 * len(users[False])) / 6)
    assert model.hybrid, "evaluation shows the vectors"
    seen.clear()
    model.progress = 0.5
    model.calculate_loss(rows)
    assert seen == [(True, rows["user_id"].tolist())], "after the first epoch all are hybrid"


def test_a_mixed_batch_has_the_mean_of_its_rows_losses(make_model):
    _, model, _ = make_model("LLaRA", curriculum="sample", **LORA)
    rows = rows_of(model._dataset, 4)
    model.progress = 0.0
    model.seed_step(0)
    text = model.calculate_loss(rows)[0]
    model.settings = replace(model.settings, curriculum="linear")
    model.seed_step(0)
    model.rng.random(4)  # what the users' draws take
    torch.testing.assert_close(text, model.calculate_loss(rows)[0], atol=1e-2, rtol=1e-2)


def test_the_projector_may_be_normalized(make_model):
    kinds = ("perceptron", "normalized")
    plain, normalized = (make_model("LLaRA", projector=kind, **LORA)[1].item_projection for kind in kinds)
    assert not any(isinstance(layer, nn.LayerNorm) for layer in plain)
    assert [type(layer) for layer in normalized] == [nn.Linear, nn.LayerNorm, nn.LeakyReLU, nn.Linear]


# A-LLMRec


def test_the_sentence_encoder_may_read_other_fields(make_model, monkeypatch):
    read = []

    class Encoder:
        def encode(self, texts, batch_tokens=8192):
            read.append(list(texts))
            return torch.randn(len(texts), 12, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr("recbole_llm.model.allmrec.load_sentence_encoder", lambda name, device: Encoder())
    settings = {"latent_size": 8, "alignment_epochs": 1}
    _, model, _ = make_model("ALLMRec", sentence_text=["title", "title"], **settings)
    title = model._dataset.item_texts[1]
    assert read[0][:2] == ["", f"{title}, {title}"] and model.prompts is not None
    with pytest.raises(UserError, match="set the key sentence_text to fields that it has"):
        make_model("ALLMRec", sentence_text=["description"], **settings)
    with pytest.raises(UserError, match="alignment_weights: give four numbers"):
        make_model("ALLMRec", alignment_weights=[1.0], **settings)


def test_stage_one_has_a_batch_a_rate_and_weights_of_its_own(make_model, sentence_encoder, monkeypatch):
    given = {}

    def train(*args, **kwargs):
        given.update(kwargs)
        raise UserError("seen")

    monkeypatch.setattr("recbole_llm.model.allmrec.train_alignment", train)
    with pytest.raises(UserError, match="seen"):
        make_model("ALLMRec", alignment_batch_size=7, alignment_learning_rate=0.5, alignment_weights=[1, 2, 3, 4])
    assert (given["batch_size"], given["learning_rate"]) == (7, 0.5)
    assert list(given["weights"].values()) == [1.0, 2.0, 3.0, 4.0]
    assert list(given["weights"]) == [
        "matching_weight", "item_reconstruction_weight", "text_reconstruction_weight", "recommendation_weight"
    ]  # fmt: skip


# Wording


def test_a_request_may_name_the_users_representation_where_it_is_shown(make_model):
    for name, shown in (("CoLLM", True), ("TALLRec", False)):
        _, model, splits = make_model(name, prompt_basis=" and user representation", tuning="lora")
        batch = model.prompts.user_prompts(model.histories(rows_of(splits["test"], 1)))
        text = model.backbone.tokenizer.decode([token for token in batch.tokens.tolist() if token >= 0])
        basis = " and user representation" if shown else ""
        assert text.endswith(
            f". Based on this sequence of purchases{basis}, to recommend one next item for this user, generate user "
            "representation token:"
        )
        if shown:  # the first step of CoLLM shows texts alone
            model.show_vectors(False)
            batch = model.prompts.user_prompts(model.histories(rows_of(splits["test"], 1)))
            text = model.backbone.tokenizer.decode([token for token in batch.tokens.tolist() if token >= 0])
            assert "user representation from" not in text and " and user representation" not in text


# The teacher's loss


def test_binary_loss_by_torchs_own():
    positive, negative = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([0.0, 3.0, -2.0])
    expected = functional.binary_cross_entropy_with_logits(positive, torch.ones(3))
    expected = expected + functional.binary_cross_entropy_with_logits(negative, torch.zeros(3))
    torch.testing.assert_close(binary_loss(positive, negative), expected)


def test_negatives_of_a_window_are_none_of_its_items():
    windows = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [1, 1, 1, 1]])
    drawn = torch.stack([negatives_of(windows, 8, np.random.default_rng(seed)) for seed in range(200)])
    for row, known in enumerate(({1, 2, 3, 4}, {5, 6}, {1})):
        assert set(drawn[:, row].ravel().tolist()) == set(range(1, 8)) - known


def test_a_teacher_by_binary_cross_entropy_learns(make_model, monkeypatch):
    sizes, plain = [], BinaryTraining.batch_loss

    def counted(self, windows):
        sizes.append(len(windows))
        return plain(self, windows)

    monkeypatch.setattr(BinaryTraining, "batch_loss", counted)
    tiny = {"hidden_size": 8, "inner_size": 16, "n_layers": 1, "epochs": 3, "train_batch_size": 32}
    models = [make_model("LLMSRec", teacher_preset="llmsrec", teacher_settings=tiny)[1] for _ in range(2)]
    assert models[1].teacher_run.loaded, "kept, and found again"
    assert sizes == [32, 28] * 3, "60 users, 32 of them a step"
    losses = [point["losses"]["loss"] for point in models[0].teacher_run.curve]
    assert losses[-1] < losses[0] < 1.5, "1.386 where nothing is known"
    assert models[0].teacher.length == 128
    _, other, _ = make_model("LLMSRec", teacher_settings={**tiny, "teacher_training": "causal"})
    assert other.teacher_run.folder != models[0].teacher_run.folder
