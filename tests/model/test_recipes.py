"""What the published recipes need of the models: keys that their defaults leave alone."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from recbole.utils import get_trainer
from torch import nn
from torch.nn import functional

from recbole_llm.config.settings import VALID_USERS
from recbole_llm.errors import UserError
from recbole_llm.loss.binary import binary_loss
from recbole_llm.loss.sequence_anchor import bounded_anchor
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


# CoLLM


def test_users_and_items_may_share_one_mapping(make_model, tmp_path):
    _, model, splits = make_model("CoLLM", mapping="shared", **LORA)
    assert [type(layer) for layer in model.item_projection] == [nn.Linear, nn.ReLU, nn.Linear]
    assert model.user_projection is model.item_projection
    assert not any(name.startswith("user_projection") for name in model.trained_parameters()), "kept once"
    sum(model.calculate_loss(rows_of(model._dataset))).backward()
    both = model.item_projection[0].weight.grad.clone()
    model.zero_grad()
    model.user_inputs = lambda interaction: torch.zeros(len(interaction), model.backbone.input_size)
    sum(model.calculate_loss(rows_of(model._dataset))).backward()
    assert not torch.allclose(both, model.item_projection[0].weight.grad), "users move it as well"
    _, plain, _ = make_model("CoLLM", **LORA)
    assert "user_projection.0.weight" in plain.trained_parameters()


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


def test_binary_training_leaves_out_padding_and_has_the_loss_of_the_whole(make_model, monkeypatch):
    _, model, _ = make_model("LLMSRec", teacher_settings={"epochs": 1, "hidden_size": 8, "inner_size": 16, "n_layers": 1})
    trainer, sasrec = object.__new__(BinaryTraining), model.teacher.model
    trainer.model = sasrec
    windows = torch.zeros(8, 42, dtype=torch.long)
    for row, length in enumerate((3, 40, 4, 2, 3, 3, 4, 2)):
        windows[row, :length] = torch.arange(1, length + 1)
    windows[:, -1] = 5  # how the negatives are drawn
    widths, plain = [], sasrec.forward
    monkeypatch.setattr(sasrec, "forward", lambda items, lengths: widths.append(items.shape[1]) or plain(items, lengths))
    trimmed = trainer.batch_loss(windows)
    monkeypatch.setattr("recbole_llm.teacher.stock.can_trim", lambda kind: False)
    torch.testing.assert_close(trainer.batch_loss(windows), trimmed)
    assert widths == [3, 39, 40]


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


# LLM-STAR's open choices


def test_a_bounded_anchor_is_no_longer_than_its_user():
    positive, user = torch.tensor([[3.0, 4.0], [0.3, 0.4]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]], requires_grad=True)
    bounded = bounded_anchor(positive, user)
    torch.testing.assert_close(bounded, torch.tensor([[0.6, 0.8], [0.3, 0.4]]))
    assert not bounded.requires_grad, "the user's length is a constant"


def test_confidence_over_its_mean_keeps_the_strength_of_the_loss(make_model):
    losses = {}
    for name, settings in {"plain": {}, "mean": {"confidence_scale": "mean"}, "none": {"confidence": "none"}}.items():
        _, model, _ = make_model("LLMSTAR", **settings)
        model.seed_step(0)
        losses[name] = model.calculate_loss(rows_of(model._dataset, 20))[1].item()
    assert losses["plain"] < 0.9 * losses["mean"] and losses["mean"] == pytest.approx(losses["none"], rel=0.15)
    _, model, _ = make_model("LLMSTAR", similarity="dot", anchor_norm="bounded", windows_shuffled=None)
    assert torch.isfinite(sum(model.calculate_loss(rows_of(model._dataset, 20))))


# Negatives, the user's vector, validations


def test_training_negatives_may_be_what_the_user_takes_later(make_model):
    for kind in ("training", "all"):
        _, model, splits = make_model("LLMSRec", negatives_leave_out=kind, train_negatives=5)
        later: dict = {}
        for phase in ("valid", "test"):
            rows = splits[phase].inter_feat
            for user, item in zip(rows["user_id"].tolist(), rows["item_id"].tolist(), strict=True):
                later.setdefault(user, set()).add(item)
        train = dict(zip(model._dataset.inter_feat["user_id"].tolist(), model._dataset.inter_feat["item_id_list"], strict=True))
        found = False
        for step in range(20):
            model.seed_step(step)
            rows = model._dataset.inter_feat
            for user, drawn in zip(rows["user_id"].tolist(), model.training_candidates(rows)[:, 1:], strict=True):
                known = set(train[user].tolist())
                assert not known & set(drawn.tolist()), "never an item of the training"
                found |= bool((later[user] - known) & set(drawn.tolist()))
        assert found is (kind == "training")


def test_llmsrec_may_show_the_users_representation(make_model):
    _, plain, splits = make_model("LLMSRec")
    _, model, _ = make_model("LLMSRec", user_vector=True)
    rows = rows_of(splits["test"], 2)
    texts = []
    for one in (plain, model):
        batch = one.prompts.user_prompts(one.histories(rows))
        tokens = batch.tokens[: batch.offsets[1]]
        texts.append(one.backbone.tokenizer.decode([token for token in tokens.tolist() if token >= 0]))
        assert (tokens == -3).sum() == (one is model)
    assert texts[0].endswith(". Based on this sequence of purchases, generate user representation token:")
    assert texts[1].startswith("<s>This is user representation from recommendation models: , and this user has made")
    assert texts[1].endswith("sequence of purchases and user representation, generate user representation token:")
    assert len(model.calculate_loss(rows_of(model._dataset, 3))) == 3
    assert "user_projection.0.weight" in model.trained_parameters()


def test_validations_take_more_users_where_there_is_a_gpu_and_say_how_well_they_know(make_model, caplog):
    assert VALID_USERS == {True: 2000, False: 150}
    config, model, splits = make_model("TALLRec", valid_users="auto", epochs=1, tuning="lora")
    assert config["valid_users"] == 150
    trainer = get_trainer(config["MODEL_TYPE"], "TALLRec")(config, model)
    with caplog.at_level("INFO"):
        trainer._tell_sample(SimpleNamespace(_dataset=splits["valid"]))
    assert "Validations take 60 of 60 users: the standard error of a hit rate there is up to 0.065" in caplog.text
