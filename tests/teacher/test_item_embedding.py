"""Item vectors as the item embeddings of RecBole's models: where they start, what is trained, what is kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import recbole_llm
from recbole_llm import preflight
from recbole_llm.backbone.item_vectors import transformed
from recbole_llm.config.settings import make_config
from recbole_llm.data.shared import SharedData
from recbole_llm.errors import UserError
from recbole_llm.loading import load_data_and_model
from recbole_llm.teacher import stock
from recbole_llm.teacher.item_embedding import VectorEmbedding, catalogue_vectors, has_item_embedding, use_item_vectors
from recbole_llm.teacher.teacher import obtain_teacher

WIDTH = {"SASRec": "hidden_size", "GRU4Rec": "embedding_size", "Caser": "embedding_size", "BERT4Rec": "hidden_size"}


@pytest.fixture
def settings(chain_data, tmp_path):
    return {
        "protocol": "retrieval", "data_path": str(chain_data), "checkpoint_dir": str(tmp_path / "saved"), "epochs": 1,
        "eval_args": {"mode": "uni9"}, "topk": [5], "valid_metric": "Hit@5", "show_progress": False, "use_gpu": False,
        "MAX_ITEM_LIST_LENGTH": 5, "train_batch_size": 512,
    }  # fmt: skip


@pytest.fixture
def vectors_file(tmp_path):
    file = tmp_path / "vectors.npy"
    np.save(file, np.random.default_rng(5).normal(size=(40, 12)))
    return str(file)


def config_of(name, settings, **changed):
    return make_config(name, "chain", config_dict={**settings, **({WIDTH[name]: 8} if name in WIDTH else {}), **changed})


def built(config):
    """The model as RecBole builds it, its data, and the vectors."""
    from recbole.utils import get_model, init_seed

    splits = SharedData().splits(config)
    train = stock.training_data(config, splits)
    stock._dataloaders(config, splits, train)
    init_seed(3, True)
    return get_model(config["model"])(config, train), splits, catalogue_vectors(config, splits["train"])


@pytest.mark.parametrize("name", sorted(WIDTH))
def test_embeddings_start_from_the_whitened_vectors_at_the_model_s_own_scale(name, settings, vectors_file):
    config = config_of(name, settings, item_vectors=vectors_file)
    model, splits, found = built(config)
    before = model.item_embedding.weight.detach().clone()
    use_item_vectors(model, config, found.vectors)
    after = model.item_embedding.weight.detach()
    items = after[1:41]
    assert torch.isclose(items.std(), before[1:41].std(), rtol=1e-4)
    covariance = (items - items.mean(dim=0)).T @ (items - items.mean(dim=0)) / 40
    assert torch.allclose(covariance, covariance[0, 0] * torch.eye(8), atol=1e-4 * float(covariance[0, 0]) + 1e-9)
    assert torch.equal(after[0], before[0]) and torch.equal(after[41:], before[41:])  # padding, BERT4Rec's [MASK]
    assert isinstance(model.item_embedding.weight, torch.nn.Parameter)
    # The order of the .item file is that of the items' numbers here; RecBole's is that of their first interaction.
    raw = np.load(vectors_file)[[int(token) - 1 for token in splits["train"].field2id_token["item_id"][1:]]]
    assert np.allclose(found.vectors, raw)


def test_a_scale_of_one_s_own_and_no_transformation(settings, vectors_file):
    config = config_of("SASRec", settings, item_vectors=vectors_file, item_vectors_transform="none", item_vectors_std=0.5,
                       hidden_size=12)  # fmt: skip
    model, _, found = built(config)
    use_item_vectors(model, config, found.vectors)
    items = model.item_embedding.weight.detach()[1:]
    assert torch.isclose(items.std(), torch.tensor(0.5), rtol=1e-4)
    assert np.allclose(items / items[0, 0], found.vectors / found.vectors[0, 0], rtol=1e-3)


@pytest.mark.parametrize("transform", ["none", "zca"])
def test_vectors_of_another_width_are_refused(settings, vectors_file, transform):
    config = config_of("SASRec", settings, item_vectors=vectors_file, item_vectors_transform=transform)
    model, _, found = built(config)
    with pytest.raises(UserError, match="keeps the 12 numbers of a vector, and SASRec's item embeddings have 8"):
        use_item_vectors(model, config, found.vectors)


def test_where_there_are_fewer_components_than_the_model_is_wide_the_others_stay_random_or_are_zero(settings, vectors_file):
    for use in ("initialize", "freeze"):
        config = config_of("SASRec", settings, item_vectors=vectors_file, hidden_size=16, item_vectors_use=use)
        model, _, found = built(config)
        before = model.item_embedding.weight.detach().clone()
        use_item_vectors(model, config, found.vectors)
        rest = model.item_embedding.weight.detach()[1:, 12:]
        assert torch.equal(rest, before[1:, 12:] if use == "initialize" else torch.zeros(40, 4))


@pytest.mark.parametrize("use", ["freeze", "project"])
def test_a_vector_embedding_is_an_embedding_of_its_table_in_value_and_gradient(settings, vectors_file, use):
    config = config_of("SASRec", settings, item_vectors=vectors_file, item_vectors_use=use, item_vectors_projection="mlp",
                       n_heads=1)  # fmt: skip
    model, splits, found = built(config)
    own_scale = model.item_embedding.weight.detach()[1:].std()
    use_item_vectors(model, config, found.vectors)
    vector_embedding = model.item_embedding
    assert isinstance(vector_embedding, VectorEmbedding)
    if use == "project":
        assert torch.isclose(vector_embedding.weight[1:].std(), own_scale, rtol=1e-3)
    table = vector_embedding.weight.detach().clone()
    loss = losses_and_gradients_of(model, splits)
    trained = {name for name, value in vector_embedding.named_parameters() if value.grad is not None}
    of_projection = {f"projection.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")}
    assert trained == {"own"} | (of_projection if use == "project" else set())

    model.item_embedding = torch.nn.Embedding.from_pretrained(table, freeze=False, padding_idx=0)
    plain = losses_and_gradients_of(model, splits)
    gradient = model.item_embedding.weight.grad
    assert torch.isclose(loss, plain)
    assert torch.allclose(vector_embedding.own.grad, gradient[:1], atol=1e-7)
    if use == "project":
        last = vector_embedding.projection[2]
        assert torch.allclose(last.bias.grad, gradient[1:].sum(dim=0), atol=1e-6)


def losses_and_gradients_of(model, splits):
    rows = splits["train"].inter_feat[slice(0, 16)]
    model.eval()
    windows = torch.cat([rows["item_id"][:, None], rows["item_id_list"]], dim=1)
    loss = stock.all_positions_loss(model, windows)
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize(
    "name, use",
    [("SASRec", "initialize"), ("SASRec", "project"), ("BERT4Rec", "freeze"), ("Caser", "project"), ("BPR", "freeze")],
)
def test_a_trained_model_is_found_again_and_read_without_its_vectors(name, use, settings, vectors_file):
    given = {**settings, "item_vectors": vectors_file, "item_vectors_use": use}
    config = config_of(name, given)
    splits = SharedData().splits(config)
    trained = stock.train_or_load(config, splits, "causal")
    assert not trained.loaded and stock.train_or_load(config_of(name, given), splits, "causal").loaded
    if use == "freeze":
        found = catalogue_vectors(config, splits["train"])
        kept, width = trained.model.item_embedding.vectors, trained.model.item_embedding.embedding_dim
        white = transformed(found.vectors, "whiten", width)
        assert np.allclose(kept[:, : white.shape[1]] / kept[0, 0], white / white[0, 0], rtol=1e-3)
    Path(vectors_file).unlink()
    _, model, *_ = load_data_and_model(trained.folder)
    assert torch.equal(model.item_embedding.weight, trained.model.item_embedding.weight)


def test_identity_is_of_the_vectors_and_of_what_is_made_of_them(settings, vectors_file, tmp_path):
    def folder(**changed):
        config = config_of("SASRec", settings, epochs=1, **changed)
        return stock.train_or_load(config, SharedData().splits(config), "causal").folder.name

    copy = tmp_path / "copy.npy"
    copy.write_bytes(Path(vectors_file).read_bytes())
    plain, first = folder(), folder(item_vectors=vectors_file)
    assert folder(item_vectors=str(copy), sentence_encoder="other", item_vectors_hidden_size=3) == first != plain
    assert folder(item_vectors_transform="pca", backbone="tiny") == plain  # not read without item_vectors
    assert folder(item_vectors=vectors_file, item_vectors_transform="pca") != first
    np.save(copy, np.load(copy) + np.eye(40, 12))
    assert folder(item_vectors=str(copy)) != first


def test_without_item_vectors_a_model_has_the_identity_that_it_had(settings):
    from recbole_llm.config.identity import deciding_settings

    assert not set(deciding_settings(config_of("SASRec", settings))) & {"item_vectors_use", "sentence_encoder", "backbone"}


def test_a_teacher_of_texts(settings, tiny_settings, vectors_file):
    given = {**tiny_settings, "teacher_settings": {**tiny_settings["teacher_settings"], "item_vectors": vectors_file,
                                                    "item_vectors_use": "project"}}  # fmt: skip
    config = make_config("LLMSRec", "chain", config_dict=given)
    teacher, run = obtain_teacher(config, SharedData().splits(config))
    assert teacher.item_vectors.shape == (41, 8)
    assert torch.equal(teacher.item_vectors, run.model.item_embedding.weight)


def test_items_that_nobody_has_in_training_are_told_apart_by_their_vectors(settings, tmp_path):
    """An item's score is that of its twin, which has the same vector, whether or not it occurs in training."""
    vectors = np.random.default_rng(5).normal(size=(40, 12))
    vectors[1] = vectors[0]
    np.save(tmp_path / "twins.npy", vectors)
    config = config_of("SASRec", settings, item_vectors=str(tmp_path / "twins.npy"), item_vectors_use="project")
    splits = SharedData().splits(config)
    model = stock.train_or_load(config, splits, "causal").model
    tokens = splits["train"].field2id_token["item_id"].tolist()
    scores = model.full_sort_predict(splits["test"].inter_feat[slice(0, 4)]).view(4, -1)
    assert torch.allclose(scores[:, tokens.index("1")], scores[:, tokens.index("2")])


# ---- Mistakes


def test_models_without_item_embeddings_are_refused_before_training(settings, vectors_file):
    from recbole.utils import get_model

    have = {name for name in ("SASRec", "FPMC", "BPR", "Pop", "EASE", "FEARec", "S3Rec") if has_item_embedding(get_model(name))}
    assert have == {"SASRec", "BPR", "FEARec", "S3Rec"}
    with pytest.raises(UserError, match="FPMC has no item_embedding"):
        preflight.check([config_of("FPMC", settings, item_vectors=vectors_file)], SharedData())


@pytest.mark.parametrize(
    "value, sentence",
    [("texts", "did you mean 'text'"), ("v.pt", "must be text, llm or a .npy"), ("no.npy", "there is no file no.npy")],
)
def test_a_source_that_is_none(settings, value, sentence):
    with pytest.raises(UserError, match=sentence):
        preflight.check([config_of("SASRec", settings, item_vectors=value)], SharedData())


def test_a_teacher_s_vectors_are_checked_before_training(tiny_settings):
    given = {**tiny_settings, "teacher_settings": {"item_vectors": "no.npy"}}
    with pytest.raises(UserError, match="there is no file no.npy"):
        preflight.check([make_config("LLMSRec", "chain", config_dict=given)], SharedData())


def test_recbole_s_own_runner_refuses_them_and_runs_without(settings, vectors_file):
    from recbole.quick_start import run_recbole

    own = {**settings, "metrics": ["Hit"], "hidden_size": 8, "inner_size": 8}
    with pytest.raises(UserError, match="RecBole's own runner builds SASRec without them"):
        run_recbole("SASRec", "chain", config_dict={**own, "item_vectors": vectors_file}, saved=False)
    assert run_recbole("SASRec", "chain", config_dict=own, saved=False)["test_result"]


def test_weights_that_lack_the_vectors_are_refused(settings, vectors_file):
    config = config_of("SASRec", settings)
    folder = stock.train_or_load(config, SharedData().splits(config), "causal").folder
    other = config_of("SASRec", settings, item_vectors=vectors_file, item_vectors_use="freeze")
    with pytest.raises(UserError, match="do not fit SASRec"):
        stock.load(folder, other, SharedData().splits(other))


def test_a_comparison_has_rows_of_both(settings, vectors_file, tmp_path):
    own = {key: value for key, value in settings.items() if key != "protocol"}
    rows = recbole_llm.compare(
        ["SASRec", "SASRec:text"], "chain",
        settings={**own, "hidden_size": 8, "inner_size": 8, "SASRec:text.item_vectors": vectors_file},
    )  # fmt: skip
    assert [row["model"] for row in rows] == ["SASRec", "SASRec:text"] and len({row["checkpoint"] for row in rows}) == 2
    record = json.loads((Path(rows[1]["checkpoint"]) / "run.json").read_text())
    assert record["settings"]["item_vectors"] == vectors_file
