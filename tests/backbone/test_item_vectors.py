"""Vectors of items' texts: where they come from, in whose order, and what whitening makes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recbole_llm.backbone import item_vectors as module
from recbole_llm.backbone.item_vectors import (
    VectorSource,
    item_vectors,
    pooled_states_of_texts,
    read_item_vectors,
    transformed,
    write_item_vectors,
)
from recbole_llm.backbone.load import load_backbone
from recbole_llm.errors import UserError

ITEMS, LINES = ["[PAD]", "b", "a", "c"], ["a", "x", "b", "c"]  # internal order; order of the .item file


@pytest.fixture
def vectors():
    generator = np.random.default_rng(3)
    return (generator.normal(size=(50, 6)) @ generator.normal(size=(6, 6)) + 5).astype(np.float32)


@pytest.fixture
def source(tmp_path):
    def make(name="llm", **changed):
        values = dict(
            item_vectors=name, item_vectors_rows="item_file", item_vectors_pooling="mean", sentence_encoder="none",
            backbone="tiny", backbone_layers=None, backbone_dtype="float32", backbone_revision=None,
            checkpoint_dir=str(tmp_path), dataset="data", device=torch.device("cpu"), seed=1,
        )  # fmt: skip
        return VectorSource(**{**values, **changed})

    return make


# ---- Whitening


def test_whitened_components_have_variance_one_and_are_not_correlated(vectors):
    white = transformed(vectors, "whiten", 4)
    assert white.shape == (50, 4)
    assert np.allclose(white.mean(axis=0), 0, atol=1e-5)
    assert np.allclose(white.T @ white / 50, np.eye(4), atol=1e-4)


def test_components_are_those_of_the_singular_value_decomposition(vectors):
    centered = vectors - vectors.mean(axis=0)
    _, sizes, axes = np.linalg.svd(centered, full_matrices=False)
    reduced, white = transformed(vectors, "pca", 3), transformed(vectors, "whiten", 3)
    assert np.allclose(np.abs(reduced), np.abs(centered @ axes[:3].T), atol=1e-3)
    assert np.allclose(reduced, white * (sizes[:3] / np.sqrt(50)), atol=1e-3)


def test_zca_is_the_inverse_square_root_of_the_covariance(vectors):
    centered = (vectors - vectors.mean(axis=0)).astype(np.float64)
    values, axes = np.linalg.eigh(centered.T @ centered / 50)
    assert np.allclose(transformed(vectors, "zca"), centered @ (axes / np.sqrt(values)) @ axes.T, atol=1e-3)


def test_none_keeps_vectors_and_all_components_keep_distances(vectors):
    assert transformed(vectors, "none", 2) is vectors
    rotated = transformed(vectors, "pca")
    assert np.allclose(np.linalg.norm(rotated[0] - rotated[1]), np.linalg.norm(vectors[0] - vectors[1]), rtol=1e-4)


def test_a_small_catalogue_has_fewer_components_than_it_has_numbers():
    few = np.random.default_rng(0).normal(size=(4, 9)).astype(np.float32)
    assert transformed(few, "whiten", 9).shape == (4, 3)
    assert np.isfinite(transformed(few, "zca")).all()


# ---- An LLM's states


@pytest.fixture(scope="module")
def tiny():
    return load_backbone({"backbone": "tiny", "backbone_dtype": "float32"})


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_pooled_states_are_those_of_each_text_alone(tiny, pooling):
    texts = ["The Brass Observatory", "a", "The Brass Observatory", "", "Ümläut and a longer title, of many more tokens"]
    found = pooled_states_of_texts(tiny, texts, pooling)
    for text, vector in zip(texts, found, strict=True):
        ids = tiny.prefix_ids + tiny.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not text:
            assert not vector.any()
            continue
        with torch.no_grad():
            states = tiny.model(input_ids=torch.tensor([ids])).last_hidden_state[0, len(tiny.prefix_ids) :]
        expected = states.mean(dim=0) if pooling == "mean" else states[-1]
        assert np.allclose(vector, expected, atol=1e-5)


def test_vectors_are_computed_once_and_again_for_other_texts_or_another_pooling(source, monkeypatch):
    calls = []
    encoded = module._encoded
    monkeypatch.setattr(module, "_encoded", lambda *arguments: calls.append(1) or encoded(*arguments))
    texts = ["", "red", "green", "blue"]
    first = item_vectors(source(), ITEMS, texts, LINES)
    assert np.array_equal(item_vectors(source(), ITEMS, texts, LINES), first) and len(calls) == 1
    assert not np.array_equal(item_vectors(source(), ITEMS, ["", "red", "green", "grey"], LINES), first) and len(calls) == 2
    item_vectors(source(item_vectors_pooling="last"), ITEMS, texts, LINES)
    assert len(calls) == 3


def test_a_damaged_stored_file_is_named(source):
    texts = ["", "red", "green", "blue"]
    item_vectors(source(), ITEMS, texts, LINES)
    source().stored_file(texts[1:]).write_bytes(b"\x93NUMPY")
    with pytest.raises(UserError, match="damaged: remove it"):
        item_vectors(source(), ITEMS, texts, LINES)


# ---- A user's file


def test_rows_are_those_of_the_items_whatever_the_file_s_order(tmp_path):
    table = np.arange(8, dtype=np.float32).reshape(4, 2)
    np.save(tmp_path / "v.npy", table)
    assert read_item_vectors(tmp_path / "v.npy", ITEMS, LINES).tolist() == [[4, 5], [0, 1], [6, 7]]
    assert read_item_vectors(tmp_path / "v.npy", ITEMS, LINES, "internal").tolist() == [[2, 3], [4, 5], [6, 7]]
    write_item_vectors(tmp_path / "v.safetensors", LINES, table)
    assert read_item_vectors(tmp_path / "v.safetensors", ITEMS, LINES).tolist() == [[4, 5], [0, 1], [6, 7]]


def bad_files(folder):
    good = np.arange(8, dtype=np.float32).reshape(4, 2)
    np.save(folder / "few.npy", good[:3])
    np.save(folder / "objects.npy", np.array([{}], dtype=object))
    np.save(folder / "words.npy", np.full((4, 2), "a"))
    np.save(folder / "hole.npy", np.where(good == 4, np.nan, good))
    np.save(folder / "large.npy", good.astype(np.float64) * 1e300)
    np.save(folder / "same.npy", np.ones((4, 2)))
    np.savez(folder / "several.npz", good)
    (folder / "several.npz").rename(folder / "several.npy")
    (folder / "none.npy").write_bytes(b"no array")
    (folder / "none.safetensors").write_bytes(b"no tensors")
    write_item_vectors(folder / "lacking.safetensors", ["a", "c"], good[:2])
    write_item_vectors(folder / "twice.safetensors", ["a", "a"], good[:2])


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("few.npy", r"shape \(3, 2\), and item_vectors_rows: item_file needs \[4, width\]"),
        ("objects.npy", "cannot be read as a NumPy array"),
        ("words.npy", "not vectors of numbers"),
        ("hole.npy", "item 'b'"),
        ("large.npy", "no float32 number"),
        ("same.npy", "all vectors in .* are the same"),
        ("several.npy", "several arrays"),
        ("none.npy", "cannot be read"),
        ("none.safetensors", "cannot be read as safetensors"),
        ("lacking.safetensors", "no vector for 1 of 3 items: 'b'"),
        ("twice.safetensors", "names an item twice"),
        ("absent.npy", "there is no file"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_sentence(tmp_path, name, sentence):
    bad_files(tmp_path)
    with pytest.raises(UserError, match=sentence):
        read_item_vectors(tmp_path / name, ITEMS, LINES)


def test_an_item_without_a_line_in_the_item_file_is_named(tmp_path):
    np.save(tmp_path / "v.npy", np.arange(4.0).reshape(2, 2))
    with pytest.raises(UserError, match=r"the .item file has no line for 2 of 3 items: 'b', 'c'"):
        read_item_vectors(tmp_path / "v.npy", ITEMS, ["a", "x"])
