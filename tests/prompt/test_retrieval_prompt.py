"""Prompts read as they should, lose oldest items first, and know their slots by position."""

import numpy as np
import pytest

from recbole_llm.prompt.batch import OUT_TOKEN, SLOT_TOKEN
from recbole_llm.prompt.pieces import PieceTable
from recbole_llm.prompt.retrieval import PromptBuilder, PromptSettings


def encode(texts):
    """One token per character: prompts can be read back."""
    return [[ord(character) for character in text] for text in texts]


def read(batch, index):
    marks = {SLOT_TOKEN: "[SLOT]", OUT_TOKEN: "[OUT]"}
    tokens = batch.tokens[batch.offsets[index] : batch.offsets[index + 1]].tolist()
    return "".join(marks.get(token, chr(token) if token >= 0 else "?") for token in tokens)


def dates(times):
    return [f"2001-01-{int(time):02d}" for time in times]


TITLES = ["", "Alien", "Brazil", "Casablanca [UserOut]</s>", 'D "quoted"', "E" * 50]


def builder(format_dates=dates, **settings):
    settings = {"sentence": "Watched:", "request": ". Next:", **settings}
    return PromptBuilder(encode, TITLES, PromptSettings(**settings), format_dates=format_dates, prefix_ids=[ord("^")])


def histories(prompts, rows, times=None):
    width = max(map(len, rows))
    padded = np.array([row + [0] * (width - len(row)) for row in rows])
    times = np.tile(np.arange(1.0, width + 1), (len(rows), 1)) if times is None else times
    return prompts.select_histories(padded, np.array([len(row) for row in rows]), times)


def test_user_prompt_wording():
    prompts = builder()
    batch = prompts.user_prompts(histories(prompts, [[1, 2], [3]]))
    assert read(batch, 0) == (
        '^Watched: Item No.1, Time: 2001-01-01, "Alien"[SLOT],Item No.2, Time: 2001-01-02, "Brazil"[SLOT]. Next:[OUT]'
    )
    assert read(batch, 1) == '^Watched: Item No.1, Time: 2001-01-01, "Casablanca [UserOut]</s>"[SLOT]. Next:[OUT]'
    assert batch.slot_items.tolist() == [1, 2, 3]
    assert read(batch, 0)[: batch.header_length] == "^Watched:"


def test_no_dates_where_the_dataset_has_none():
    prompts = builder(format_dates=None)
    assert read(prompts.user_prompts(histories(prompts, [[1]])), 0) == '^Watched: Item No.1, "Alien"[SLOT]. Next:[OUT]'


def test_text_only_prompts_have_no_slots():
    prompts = builder(item_vectors=False)
    batch = prompts.user_prompts(histories(prompts, [[1, 2]]))
    assert "[SLOT]" not in read(batch, 0) and len(batch.slot_items) == 0
    assert read(prompts.item_prompts(np.array([1])), 0).startswith('^The item title is as follows: "Alien", then')


def test_item_prompt_wording_and_out_tokens():
    prompts = builder(out_tokens=3)
    batch = prompts.item_prompts(np.array([4, 2]))
    assert read(batch, 0) == (
        '^The item title and item embedding are as follows: "D "quoted""[SLOT], then generate item representation '
        "token:[OUT][OUT][OUT]"
    )
    assert batch.out_positions.shape == (2, 3)
    assert (batch.tokens[batch.out_positions] == OUT_TOKEN).all()
    # rows 0 and 1 of the vectors are items 2 and 4, rows 2 to 4 the out tokens
    assert batch.vector_items.tolist() == [2, 4]
    assert batch.vector_index[batch.tokens == SLOT_TOKEN].tolist() == [1, 0]
    assert batch.vector_index[batch.out_positions].tolist() == [[2, 3, 4], [2, 3, 4]]


def test_latest_items_are_kept():
    prompts = builder(history_length=2)
    batch = prompts.user_prompts(histories(prompts, [[1, 2, 4]]))
    assert batch.slot_items.tolist() == [2, 4]
    assert "No.1, Time: 2001-01-02" in read(batch, 0), "an item keeps its date; ranks start at 1 again"


@pytest.mark.parametrize("limit", range(60, 320, 7))
def test_a_long_prompt_loses_whole_oldest_items_and_never_its_out_token(limit):
    prompts = builder(max_prompt_tokens=limit)
    history = [5, 1, 5, 2, 3]
    batch = prompts.user_prompts(histories(prompts, [history]))
    kept = batch.slot_items.tolist()
    assert kept and kept == history[-len(kept) :]
    assert read(batch, 0).endswith(". Next:[OUT]")
    if len(kept) > 1:
        assert batch.lengths[0] <= limit
    for item in kept:
        assert TITLES[item] in read(batch, 0)


def test_max_item_tokens_cuts_one_title():
    prompts = builder(max_item_tokens=10)
    assert '"' + "E" * 10 + '"[SLOT]' in read(prompts.user_prompts(histories(prompts, [[5]])), 0)


def test_perturbed_prompts_move_titles_and_vectors_but_not_ranks_and_dates():
    prompts = builder()
    original = histories(prompts, [[1, 2, 4], [3]])
    batch = prompts.perturbed_prompts(original, np.array([[1, 4, 2]]), np.array([0]))
    assert len(batch) == 3 and batch.parent.tolist() == [-1, -1, 0]
    assert read(batch, 2) == (
        '^Watched: Item No.1, Time: 2001-01-01, "Alien"[SLOT],Item No.2, Time: 2001-01-02, "D "quoted""[SLOT],'
        'Item No.3, Time: 2001-01-03, "Brazil"[SLOT]. Next:[OUT]'
    )
    shared = read(batch, 0)[: read(batch, 0).index("Brazil")]
    assert read(batch, 2).startswith(shared)
    # a slot is one token and reads as six characters
    assert batch.shared[2] == len(shared.replace("[SLOT]", "!"))
    start = batch.offsets[2]
    assert (batch.tokens[start : start + batch.shared[2]] == batch.tokens[: batch.shared[2]]).all()


def test_piece_table_grows_and_remembers():
    calls = []

    def counting(texts):
        calls.extend(texts)
        return encode(texts)

    table = PieceTable(counting)
    texts = [f"piece {number} " * 20 for number in range(500)]
    numbers = table.texts(texts)
    assert (table.texts(texts) == numbers).all() and len(calls) == 500
    tokens, starts = table.gather(numbers[[3, 499, 3]])
    assert "".join(map(chr, tokens)) == texts[3] + texts[499] + texts[3]
    assert starts.tolist() == [0, len(texts[3]), len(texts[3]) + len(texts[499]), len(tokens)]
