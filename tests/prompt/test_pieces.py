"""Prompts that are too long lose whole oldest items, whichever kind of prompt they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_llm.prompt import pieces
from recbole_llm.prompt.batch import OUT_TOKEN
from recbole_llm.prompt.generation import TitlePrompts, TitlePromptSettings
from recbole_llm.prompt.pieces import PieceTable, latest_that_fit
from recbole_llm.prompt.retrieval import PromptBuilder, PromptSettings
from recbole_llm.prompt.sequence import SequencePrompts, SequencePromptSettings
from recbole_llm.prompt.yes_no import YesNoPrompts, YesNoPromptSettings

ITEMS = 8


@given(
    rows=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=4),
    room=st.integers(-3, 40),
    right_aligned=st.booleans(),
)
def test_the_latest_items_that_fit(rows, room, right_aligned):
    sizes, inside = np.full((len(rows), 7), 99), np.zeros((len(rows), 7), dtype=bool)
    for row, items in enumerate(rows):
        place = slice(7 - len(items), 7) if right_aligned else slice(0, len(items))
        sizes[row, place], inside[row, place] = items, True
    shown = latest_that_fit(sizes, inside, np.full(len(rows), room))
    assert (shown == latest_that_fit(sizes, inside, room)).all()
    assert not (shown & ~inside).any()
    for row, items in enumerate(rows):
        count = int(shown[row].sum())
        assert shown[row][inside[row]].tolist() == [False] * (len(items) - count) + [True] * count
        assert count >= 1 and (count == 1 or sum(items[-count:]) <= room)
        assert count == len(items) or sum(items[-count - 1 :]) > room


def encode(texts):
    """One token per character, so that prompts can be read back."""
    return [[ord(character) for character in text] for text in texts]


def read(batch) -> str:
    return "".join(chr(token) for token in batch.tokens if token >= 0)


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=ITEMS, max_size=ITEMS),
    history=st.lists(st.integers(1, ITEMS), min_size=1, max_size=12),
    most_tokens=st.integers(110, 330),
    most_items=st.integers(1, 10),
)
def test_every_kind_of_prompt_keeps_whole_latest_items(lengths, history, most_tokens, most_items):
    # Item 3 of 4 letters reads "<cc>": no title is part of another, nor of the wording.
    titles = ["", *(f"<{chr(ord('A') + item) * length}>" for item, length in enumerate(lengths))]
    rows, count = np.array([history]), np.array([len(history)])
    limits = {"history_length": most_items, "max_prompt_tokens": most_tokens}
    target = np.array([[1]])
    title_prompts = TitlePrompts(
        encode, titles, TitlePromptSettings(["Had{history}. Pick{candidates}."], **limits, context_length=999), [], 0
    )
    yes_no = YesNoPrompts(encode, titles, YesNoPromptSettings("{liked}, bad{disliked}, is{target}?", **limits))
    sequence_settings = SequencePromptSettings(**limits, max_attribute_tokens=40)  # no title is cut by itself
    sequences = SequencePrompts(encode, [[title] for title in titles], sequence_settings)
    retrieval = PromptBuilder(encode, titles, PromptSettings("Had:", ". Next:", **limits))
    batches = {
        "generation": title_prompts.prompts(rows, count, target),
        "yes_no": yes_no.prompts(rows, count, np.ones_like(rows, dtype=bool), target[0]),
        "sequence": sequences.sequences(rows, count),
        "retrieval": retrieval.user_prompts(retrieval.select_histories(rows, count, None)),
    }
    for kind, batch in batches.items():
        text = read(batch)
        if kind in ("generation", "yes_no"):  # the target is listed behind the history
            place = text.rindex(titles[1])
            text = text[:place] + text[place + len(titles[1]) :]
        shown = [f"<{part.split('>')[0]}>" for part in text.split("<")[1:]]
        assert 1 <= len(shown) <= most_items, kind
        assert shown == [titles[item] for item in history[-len(shown) :]], kind
        assert len(batch.tokens) <= most_tokens or len(shown) == 1, kind
        if kind in ("sequence", "retrieval"):
            assert batch.tokens[-1] == OUT_TOKEN, kind


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_texts_are_tokenized_some_at_a_time(monkeypatch, at_once):
    monkeypatch.setattr(pieces, "_TEXTS_AT_ONCE", at_once)
    asked = []

    def encode(texts):
        asked.append(len(texts))
        return [[ord(letter) for letter in text] for text in texts]

    table = PieceTable(encode)
    table.append([[1, 2]])
    numbers = table.append_texts(["abcd", "", "ef"], 3)
    assert max(asked) <= at_once and numbers.tolist() == [1, 2, 3]
    assert table.gather(numbers)[0].tolist() == [97, 98, 99, 101, 102]
    assert table.append_texts([], 3).tolist() == []
