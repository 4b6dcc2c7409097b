"""TIGER: its ids, its likelihoods against the whole T5, and the search over the ids that exist."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from recbole.utils import get_model, init_seed

from recbole_llm.config.settings import make_config
from recbole_llm.data.shared import SharedData
from recbole_llm.errors import UserError
from recbole_llm.evaluation.stock_scores import stock_scores
from recbole_llm.recommend import load
from recbole_llm.teacher.stock import data_identity, train_or_load
from recbole_llm.trainer.semantic_ids import QuantizerSettings, ResidualQuantizer, semantic_ids, tell_apart

SIZES = {
    "codebook_size": 8, "rqvae_hidden_sizes": [16], "rqvae_latent_size": 4, "rqvae_epochs": 2, "rqvae_learning_rate": 0.01,
    "user_tokens": 5, "hidden_size": 8, "inner_size": 16, "n_layers": 2, "n_heads": 2, "head_size": 4, "epochs": 1,
    "beam_size": None,
}  # fmt: skip
QUANTIZER = QuantizerSettings(2, 4, (8,), 3, 0.25, 5, 16, 0.1)


class Encoder:
    def encode(self, texts, batch_tokens=8192):
        return torch.randn(len(texts), 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def make(chain_data, tmp_path, monkeypatch):
    """A function (**settings) -> configuration, the model with its ids, in evaluation mode, and the splits."""
    monkeypatch.setattr("recbole_llm.model.tiger.load_sentence_encoder", lambda name, device: Encoder())

    def build(**settings):
        given = {
            "data_path": str(chain_data), "checkpoint_dir": str(tmp_path / "saved"), "protocol": "retrieval", "use_gpu": False,
            "show_progress": False, "eval_args": {"mode": "uni9"}, "topk": [1, 5], "valid_metric": "Hit@5",
        }  # fmt: skip
        config = make_config("TIGER", "chain", config_dict={**given, **SIZES, **settings})
        splits = SharedData().splits(config)
        init_seed(1, True)
        model = get_model("TIGER")(config, splits["train"]).eval()
        model.make_ids()
        return config, model, splits

    return build


# The ids


def test_each_level_codes_what_the_one_before_left():
    torch.manual_seed(0)
    model = ResidualQuantizer(5, QUANTIZER)
    with torch.no_grad():
        model.codebooks[0] = torch.tensor([[0.0, 0, 0], [4, 0, 0], [9, 9, 9], [8, 8, 8]])
        model.codebooks[1] = torch.tensor([[0.0, 0, 0], [1, 0, 0], [9, 9, 9], [7, 7, 7]])
    codes, residuals, vectors = model.quantize(torch.tensor([[4.9, 0.0, 0.0]]))
    assert codes.tolist() == [[1, 1]]
    torch.testing.assert_close(residuals[0], torch.tensor([[4.9, 0.0, 0.0], [0.9, 0.0, 0.0]]))
    torch.testing.assert_close(vectors.sum(1), torch.tensor([[5.0, 0.0, 0.0]]))


def test_the_gradient_passes_straight_through_the_codes():
    torch.manual_seed(0)
    model = ResidualQuantizer(5, QUANTIZER)
    vectors = torch.randn(9, 5)
    model.begin_codebooks(vectors)
    reconstruction, _ = model(vectors)
    reconstruction.backward()
    assert all(weight.grad.abs().sum() > 0 for weight in model.encoder.parameters())
    assert model.codebooks.grad is None or not model.codebooks.grad.any()
    chosen = model.quantize(model.encoder(vectors))[2].sum(1)
    expected = (model.decoder(chosen) - vectors).square().sum(1).mean()
    torch.testing.assert_close(reconstruction, expected)


def test_items_of_the_same_codes_are_told_apart():
    codes = np.array([[1, 2], [0, 0], [1, 2], [1, 2], [0, 1]])
    assert tell_apart(codes, 3).tolist() == [[1, 2, 0], [0, 0, 0], [1, 2, 1], [1, 2, 2], [0, 1, 0]]
    with pytest.raises(UserError, match="3 items have the same semantic id"):
        tell_apart(codes, 2)


def test_ids_repeat_and_leave_the_global_randomness_alone():
    vectors = torch.randn(20, 5, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(5)
    settings = replace(QUANTIZER, codebook_size=16)
    first = semantic_ids(vectors, settings, seed=1, device="cpu")
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert (semantic_ids(vectors, settings, seed=1, device="cpu") == first).all()
    assert len(np.unique(first, axis=0)) == 20 and first.min() >= 0 and first.max() < 16


def test_items_of_one_text_differ_in_the_last_code_alone():
    vectors = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))[torch.tensor([0, 1, 2, 3, 4, 5, 2])]
    codes = semantic_ids(vectors, replace(QUANTIZER, codebook_size=16), seed=1, device="cpu")
    assert (codes[2, :2] == codes[6, :2]).all() and codes[6, 2] > codes[2, 2]


# The encoder-decoder


def rows_of(model, splits, count=3):
    return splits["test"].inter_feat[torch.arange(count)]


def test_likelihoods_are_those_of_the_whole_t5(make):
    """Tuple by tuple, by transformers' own forward pass over the user's token and the codes of the latest items."""
    _, model, splits = make(history_length=3)
    rows, candidates = rows_of(model, splits), torch.tensor([[3, 8], [5, 1], [2, 9]])
    scores = model.score_candidates(rows, candidates)
    for row in range(3):
        length = int(rows["item_length"][row])
        items = rows["item_id_list"][row, :length][-3:]
        user = model.first_user + int(rows["user_id"][row]) % 5
        inputs = torch.cat([torch.tensor([user]), model.codes[items].flatten()])[None]
        for column in range(2):
            labels = model.codes[candidates[row, column]][None]
            with torch.no_grad():
                logits = model.transformer(input_ids=inputs, labels=labels).logits[0]
            expected = logits.log_softmax(-1)[torch.arange(4), labels[0]].sum()
            torch.testing.assert_close(scores[row, column], expected, rtol=1e-4, atol=1e-4)


def test_the_loss_is_that_of_the_whole_t5(make):
    _, model, splits = make()
    rows = splits["train"].inter_feat[torch.tensor([2])]
    length = int(rows["item_length"][0])
    user = model.first_user + int(rows["user_id"][0]) % 5
    inputs = torch.cat([torch.tensor([user]), model.codes[rows["item_id_list"][0, :length]].flatten()])[None]
    expected = model.transformer(input_ids=inputs, labels=model.codes[rows["item_id"]]).loss
    torch.testing.assert_close(model.calculate_loss(rows), expected, rtol=1e-4, atol=1e-5)


def test_neither_the_target_nor_what_stands_behind_a_history_is_seen(make):
    _, model, splits = make()
    rows = rows_of(model, splits)
    scores = model.full_sort_predict(rows)
    behind = torch.arange(rows["item_id_list"].shape[1]) >= rows["item_length"][:, None]
    rows["item_id_list"][behind] = 7
    rows["item_id"][:] = 1
    torch.testing.assert_close(model.full_sort_predict(rows), scores)


def test_the_search_finds_what_ranking_all_items_finds(make):
    """A beam as wide as the catalog is exact; a narrow one finds existing items with their likelihoods, best first."""
    _, model, splits = make(beam_size=64)
    rows = rows_of(model, splits)
    items = torch.arange(1, model.n_items).expand(3, -1)
    exact = model.score_candidates(rows, items)
    torch.testing.assert_close(model.full_sort_predict(rows)[:, 1:], exact, rtol=1e-4, atol=1e-4)
    found, scores = model.beam_search(rows)
    assert sorted(found[0][found[0] > 0].tolist()) == list(range(1, model.n_items))

    _, model, splits = make(beam_size=4)
    found, scores = model.beam_search(rows)
    assert found.shape == (3, 4) and (found > 0).all() and (scores[:, :-1] >= scores[:, 1:]).all()
    torch.testing.assert_close(scores, model.score_candidates(rows, found), rtol=1e-4, atol=1e-4)
    full = model.full_sort_predict(rows)
    assert torch.equal(full.argmax(1), found[:, 0]) and ((full > -1e8).sum(1) == 4).all() and torch.isinf(full[:, 0]).all()


def test_candidates_are_ranked_by_their_likelihood_under_any_beam(make):
    _, model, splits = make(beam_size=2)
    rows, candidates = rows_of(model, splits), torch.tensor([[3, 8], [5, 1], [2, 9]])
    torch.testing.assert_close(stock_scores(model)(rows, candidates), model.score_candidates(rows, candidates))
    few = model.score_candidates(rows, candidates)
    object.__setattr__(model.settings, "score_tokens", 1)  # one row at a time
    torch.testing.assert_close(model.score_candidates(rows, candidates), few, rtol=1e-4, atol=1e-5)


def test_it_is_trained_kept_and_recommends(make, monkeypatch):
    config, _, splits = make()
    run = train_or_load(config, splits)
    assert not run.loaded and run.model.codes[1:].min() > 0 and 0 <= run.valid_result["hit@5"] <= 1
    monkeypatch.setattr("recbole_llm.model.tiger.load_sentence_encoder", None)  # the ids are kept with the weights
    again = train_or_load(config, splits)
    assert again.loaded and torch.equal(again.model.codes, run.model.codes)
    loaded = load(run.folder)
    (found,) = loaded.recommend(users=loaded.dataset.field2id_token["user_id"][3], topk=3)
    assert len(found) == 3


def test_other_texts_are_other_data(make):
    config, _, splits = make()
    before = data_identity(config, splits)
    splits["train"].text_fingerprint = "other"
    assert data_identity(config, splits) != before
