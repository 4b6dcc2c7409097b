"""Search among vectors, titles that are typed, and questions that wait for each other."""

from __future__ import annotations

import asyncio
import importlib.util
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_llm.errors import UserError
from recbole_llm.serving import index as indexes
from recbole_llm.serving.batching import Batcher, BusyError
from recbole_llm.serving.index import ExactIndex, FaissIndex, make_index, recall
from recbole_llm.serving.titles import Titles

needs_faiss = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss is not installed")


def vectors(count: int, size: int, seed: int = 0, groups: int = 0) -> torch.Tensor:
    """Random vectors, or around some centers, the padding's in row 0."""
    rng = np.random.default_rng(seed)
    made = rng.normal(size=(count + 1, size))
    if groups:
        made = made * 0.5 + rng.normal(size=(groups, size))[rng.integers(groups, size=count + 1)]
    made[0] = 0
    return torch.from_numpy(made.astype(np.float32))


def test_exact_search_is_sorting_by_the_product(monkeypatch):
    items, users = vectors(50, 4), vectors(3, 4, seed=1)[1:]
    monkeypatch.setattr(indexes, "_SCORES", 60)  # one user at a time
    excluded = [np.array([3, 7]), np.arange(1, 49), np.zeros(0, dtype=np.int64)]
    for (found, scores), user, left_out, count in zip(
        ExactIndex(items).search(users, [5, 5, 100], excluded), users, excluded, [5, 2, 50], strict=True
    ):
        products = (items @ user).tolist()
        order = [item for item in sorted(range(1, 51), key=lambda item: -products[item]) if item not in left_out]
        assert found.tolist() == order[:count] and scores.tolist() == pytest.approx([products[item] for item in order[:count]])


@needs_faiss
@pytest.mark.parametrize("count", [5_000, pytest.param(50_000, marks=pytest.mark.slow)])
def test_faiss_finds_what_exact_search_does(count):
    """Users near items, as those of a trained model are, and others than those that it was tuned for."""
    items = vectors(count, 32, groups=200)
    rng = np.random.default_rng(1)
    users = items[torch.from_numpy(rng.integers(1, count + 1, size=600))] + 0.5 * vectors(599, 32, seed=2)
    approximate, exact = FaissIndex(items, users[:128]), ExactIndex(items)
    nothing = [np.zeros(0, dtype=np.int64)] * 472
    truth = exact.search(users[128:], [10] * 472, nothing)
    found = approximate.search(users[128:], [10] * 472, nothing)
    assert recall([best for best, _ in truth], np.array([best for best, _ in found])) >= 0.99
    assert approximate.recall >= 0.99 and approximate.read < approximate.lists / 2, "it looks at a part of the items"
    (best, scores), *_ = approximate.search(users[128:129], [10], [truth[0][0][:4]])
    assert not set(best) & set(truth[0][0][:4]) and len(best) == 10
    assert scores.tolist() == pytest.approx((items[torch.from_numpy(best)] @ users[128]).tolist(), rel=1e-5)


@needs_faiss
def test_faiss_in_a_small_catalog_is_exact():
    items, users = vectors(40, 4), vectors(5, 4, seed=1)[1:]
    nothing = [np.zeros(0, dtype=np.int64)] * 5
    found, wanted = (index.search(users, [10] * 5, nothing) for index in (FaissIndex(items, users), ExactIndex(items)))
    assert [best.tolist() for best, _ in found] == [best.tolist() for best, _ in wanted]


def test_the_kind_of_search(monkeypatch):
    monkeypatch.setattr(indexes, "FROM_ITEMS", 30)
    monkeypatch.setattr(indexes.importlib.util, "find_spec", lambda name: None)
    assert make_index(vectors(40, 4), "auto", None).name == "exact"
    with pytest.raises(UserError, match="pip install .*faiss"):
        make_index(vectors(40, 4), "faiss", None)
    with pytest.raises(UserError, match="search is 'fast'"):
        make_index(vectors(40, 4), "fast", None)
    monkeypatch.undo()
    assert make_index(vectors(40, 4), "auto", None).name == "exact"
    if importlib.util.find_spec("faiss"):
        monkeypatch.setattr(indexes, "FROM_ITEMS", 30)
        assert make_index(vectors(40, 4), "auto", lambda: vectors(5, 4)[1:]).name.startswith("FAISS")


def test_titles_by_what_people_type():
    texts = ["", "Toy Story", "The Toy", "History of Toys", "GoldenEye", "1984", "Ant", "Straße", "Toy Story"]
    titles = Titles(["[PAD]", *map(str, range(1, 5)), "77", "1984", "ß", "9"], texts)
    asked = ("toy  STORY ", "3", "1984", "77", "STRASSE", "nothing", "")
    assert [titles.find(name) for name in asked] == [1, 3, 5, 5, 7, None, None]
    assert titles.complete("toy", 10) == [1, 8, 2, 3], "beginnings, then words, then parts"
    assert titles.complete("toy", 2) == [1, 8]
    assert titles.complete("story", 10) == [1, 8, 3] and titles.complete("zz", 10) == []
    assert titles.complete("", 3) == [1, 2, 3] and titles.complete("[pad]", 3) == []
    assert titles.nearest("GoldenEyes") == "GoldenEye" and titles.nearest("xyz") is None


TITLES = st.lists(st.text("aA bß", min_size=1, max_size=6).filter(str.strip), min_size=1, max_size=8)


@settings(max_examples=50, deadline=None)
@given(TITLES, st.text("aAbß ", max_size=3))
def test_completion_finds_every_title_that_holds_what_was_typed(texts, query):
    titles = Titles([str(n) for n in range(len(texts) + 1)], ["", *texts])

    def folded(text):
        return " ".join(text.casefold().split())

    expected = {number for number, text in enumerate(texts, 1) if folded(query) in folded(text)}
    found = titles.complete(query, 100)
    assert set(found) == expected and len(found) == len(expected)


def test_while_a_batch_is_computed_the_next_one_gathers():
    def answer(questions):
        time.sleep(0.2)
        return [10 * question for question in questions]

    async def ask():
        batcher = Batcher(answer, most=3, seconds=0.02, queue=10)
        batcher.start()
        first = asyncio.create_task(batcher.ask(0))
        await asyncio.sleep(0.1)
        rest = [asyncio.create_task(batcher.ask(question)) for question in range(1, 6)]
        await asyncio.sleep(0)
        gone = asyncio.create_task(batcher.ask(6))
        await asyncio.sleep(0)
        gone.cancel()
        found = await asyncio.gather(first, *rest)
        await batcher.stop()
        return found, batcher.batches

    found, batches = asyncio.run(ask())
    assert found == [0, 10, 20, 30, 40, 50] and batches == [1, 3, 2], "a question whose asker went away is left out"


def test_the_first_question_of_a_batch_waits_for_others():
    async def ask():
        batcher = Batcher(lambda questions: questions, most=2, seconds=5, queue=10)
        batcher.start()
        first = asyncio.create_task(batcher.ask("a"))
        await asyncio.sleep(0.05)
        found = [await batcher.ask("b"), await first]
        await batcher.stop()
        return found, batcher.batches

    assert asyncio.run(ask()) == (["b", "a"], [2])


def test_a_full_queue_and_an_error_of_a_batch():
    def answer(questions):
        if "bad" in questions:
            raise ValueError("not this")
        return questions

    async def ask():
        batcher = Batcher(answer, most=2, seconds=0, queue=2)
        waiting = [asyncio.create_task(batcher.ask(question)) for question in ("bad", "a", "b")]
        await asyncio.sleep(0)
        with pytest.raises(BusyError):
            await waiting[2]
        batcher.start()
        found = await asyncio.gather(*waiting[:2], return_exceptions=True)
        again = await batcher.ask("c")
        await batcher.stop()
        return found, again

    found, again = asyncio.run(ask())
    assert all(isinstance(error, ValueError) for error in found) and again == "c"
