"""A trained model as an object: answers for users and histories, of LLM recommenders and of RecBole's own models."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

import recbole_llm
from recbole_llm.errors import UserError
from recbole_llm.quick_start import compare
from recbole_llm.recommend import ITEM_VECTORS, load


@pytest.fixture(scope="session")
def llm(trained):
    return load(trained["LLMSRec"])


@pytest.fixture(params=["LLMSRec", "SASRec"])
def model(request, trained):
    return load(trained[request.param])


def assert_same(found, expected):
    """The same items; scores to the last digits of float32, which move with where tensors lie in memory."""
    for best, wanted in zip(found, expected, strict=True):
        assert [item[:2] for item in best] == [item[:2] for item in wanted]
        assert [item.score for item in best] == pytest.approx([item.score for item in wanted], rel=1e-4)


def test_users_and_their_histories_get_the_same_items(model):
    """A history that ends when the data ends, where no date is shown, is that of the user."""
    for user in ("u1", "u9"):
        (by_user,) = model.recommend(users=user, topk=5)
        titles = model.history_of(user)
        assert len(by_user) == 5 and not {item.title for item in by_user} & set(titles)
        if model.config["model"] == "SASRec":
            (by_titles,) = model.recommend(histories=titles, topk=5)
            assert [item.item for item in by_titles] == [item.item for item in by_user]


def test_the_history_of_a_user_is_the_whole_one(model, chain_data):
    lines = [line.split("\t") for line in (chain_data / "chain" / "chain.inter").read_text().splitlines()[1:]]
    titles = dict(zip(model._tokens.tolist(), model.dataset.item_texts, strict=True))
    for user in ("u1", "u2", "u60"):
        mine = sorted((line for line in lines if line[0] == user), key=lambda line: float(line[2]))
        assert model.history_of(user) == [titles[line[1]] for line in mine]


def test_many_are_as_each_alone(model):
    together = model.recommend(users=["u1", "u2", "u3"], topk=4)
    for user, best in zip(("u1", "u2", "u3"), together, strict=True):
        assert_same(model.recommend(users=user, topk=4), [best])
    assert model.recommend(users=[]) == []


def test_filters_and_candidates(llm):
    history = llm.history_of("u1")
    everything = llm.recommend(users="u1", topk=1000, filter=None)[0]
    assert len(everything) == llm.model.n_items - 1
    (without,) = llm.recommend(users="u1", topk=1000)
    assert {item.title for item in without} == {item.title for item in everything} - set(history)
    even = llm.recommend(users="u1", topk=1000, filter=lambda item, title: int(item.lstrip("i")) % 2 == 0)[0]
    assert [item.item for item in even] == [item.item for item in everything if int(item.item.lstrip("i")) % 2 == 0]
    some = llm.recommend(users="u1", candidates=[everything[7].title, everything[3].item], filter=None)[0]
    assert [item.item for item in some] == [everything[3].item, everything[7].item]


def test_item_vectors_are_kept_and_belong_to_their_weights(trained, tmp_path):
    folder = tmp_path / trained["LLMSRec"].name
    for path in trained.values():
        shutil.copytree(path, tmp_path / path.name, dirs_exist_ok=True)
    (folder / ITEM_VECTORS).unlink(missing_ok=True)
    first = load(folder)
    expected = first.recommend(users="u1")
    assert first.model.item_table.encoded == first.model.n_items - 1 and (folder / ITEM_VECTORS).is_file()
    second = load(folder)
    assert_same(second.recommend(users="u1"), expected)
    assert second.model.item_table.encoded == 0
    record = json.loads((folder / "recbole_llm.json").read_text())
    record["settings"]["prompt_goal"] = "another goal"
    (folder / "recbole_llm.json").write_text(json.dumps(record))
    third = load(folder)
    third.recommend(users="u1")
    assert third.model.item_table.encoded == third.model.n_items - 1


def test_a_damaged_file_of_item_vectors_is_made_again(trained, tmp_path):
    for path in trained.values():
        shutil.copytree(path, tmp_path / path.name)
    file = tmp_path / trained["LLMSRec"].name / ITEM_VECTORS
    file.write_bytes(b"\0" * 100)
    assert_same(load(file.parent).recommend(users="u1"), load(trained["LLMSRec"]).recommend(users="u1"))
    assert file.stat().st_size > 100


def test_weights_that_change_empty_the_table_taken_over(llm):
    llm.recommend(users="u1")
    table = llm.model.item_table
    before = table.whole().clone()
    parameter = next(iter(llm.model.item_head.parameters()))
    with torch.no_grad():
        parameter.add_(0.1)
        assert not torch.equal(table.whole(), before)
        parameter.sub_(0.1)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "give either users or histories"),
        ({"users": "u1", "histories": [["x"]]}, "give either users or histories"),
        ({"users": "u99999"}, "has no user 'u99999'"),
        ({"users": "u1", "topk": 0}, "topk is 0"),
        ({"users": "u1", "filter": "all"}, "filter: 'all'"),
        ({"histories": [["No such title"]]}, "no item with the title or id 'No such title'"),
        ({"histories": [[]]}, "at least one title"),
    ],
)
def test_mistakes(llm, arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        llm.recommend(**arguments)


def test_models_without_sequences(tiny_settings):
    keys = ("data_path", "checkpoint_dir", "topk", "valid_metric", "eval_args", "use_gpu")
    settings = {key: tiny_settings[key] for key in keys}
    rows = compare(["BPR", "Pop"], "chain", settings={**settings, "epochs": 1, "show_progress": False})
    matrix = recbole_llm.load(rows[0]["checkpoint"])
    assert len(matrix.recommend(users=["u1", "u2"], topk=3)[1]) == 3
    with pytest.raises(UserError, match="BPR knows users and no histories"):
        matrix.recommend(histories=[["i1"]])
    with pytest.raises(UserError, match="Pop keeps no weights"):
        recbole_llm.load(rows[1]["checkpoint"])


def test_titles_that_no_item_has_stand_in_the_prompt_as_text(llm, caplog):
    known = llm.history_of("u1")[-2:]
    with pytest.raises(UserError, match="no item with the title or id 'Brand New Thing'"):
        llm.recommend(histories=[[*known, "Brand New Thing"]])
    (best,) = llm.recommend(histories=[[*known, "Brand New Thing"]], topk=3, unknown_titles="text")
    assert len(best) == 3 and "'Brand New Thing' is no item of chain" in caplog.text
    prompts = llm.model.prompts
    number = llm._texts["Brand New Thing"]
    items = np.array([[*llm._items_of(known, "history"), number]])
    batch = prompts.user_prompts(prompts.select_histories(items, np.array([3]), None))
    assert batch.slot_items.tolist() == items[0, :2].tolist(), "its slot is left out"
    text = llm.model.backbone.tokenizer.decode(batch.tokens[batch.tokens >= 0])
    assert 'Brand New Thing"' in text.replace(" ", " ") and number >= llm.model.n_items
    (again,) = llm.recommend(histories=[[*known, "Brand New Thing"]], topk=3, unknown_titles="text")
    assert_same([again], [best])
    (other,) = llm.recommend(histories=[[*known, "Something Else"]], topk=3, unknown_titles="text")
    assert [item.score for item in other] != [item.score for item in best], "the text is read"


def test_a_stock_model_reads_no_text(trained):
    with pytest.raises(UserError, match="unknown_titles: SASRec reads items alone"):
        load(trained["SASRec"]).recommend(histories=[["Brand New Thing"]], unknown_titles="text")
