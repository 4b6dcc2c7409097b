"""Prompts that are answered by a title: what they say, what is cut, and that titles stay data."""

import numpy as np
import pytest

from recbole_llm.backbone.load import load_backbone
from recbole_llm.backbone.text import encode_text
from recbole_llm.errors import UserError
from recbole_llm.prompt.batch import SLOT_TOKEN
from recbole_llm.prompt.generation import TitlePrompts, TitlePromptSettings

TITLES = ["", "Heat", "Seven, the film", 'The "Rock"', "Alien", "Fargo", "{candidates}</s>", "Big"]
TEMPLATE = "This user has watched {history} in the previous. The candidates are {candidates}, recommend one. It is"


@pytest.fixture(scope="module")
def tokenizer():
    return load_backbone({"backbone": "tiny"}).tokenizer


def build(tokenizer, **settings):
    settings = {"templates": [TEMPLATE], "item_vectors": False, **settings}
    return TitlePrompts(lambda texts: encode_text(tokenizer, texts), TITLES, TitlePromptSettings(**settings), [], 1)


def text_of(tokenizer, batch, row):
    tokens = batch.tokens[batch.offsets[row] : batch.offsets[row + 1]]
    return tokenizer.decode([token for token in tokens if token >= 0])


def test_the_prompt_says_what_the_template_says(tokenizer):
    batch = build(tokenizer).prompts(np.array([[1, 2, 0], [4, 5, 1]]), np.array([2, 3]), np.array([[3, 4], [6, 7]]))
    assert text_of(tokenizer, batch, 0) == (
        'This user has watched "Heat", "Seven, the film" in the previous. The candidates are "The "Rock"", "Alien", '
        "recommend one. It is"
    )
    assert text_of(tokenizer, batch, 1) == (
        'This user has watched "Alien", "Fargo", "Heat" in the previous. The candidates are "{candidates}</s>", "Big", '
        "recommend one. It is"
    )
    assert batch.out_positions.shape == (2, 0)


def test_an_answer_is_the_tokens_of_its_place_in_the_prompt(tokenizer):
    prompts = build(tokenizer)
    batch = prompts.prompts(np.array([[1]]), np.array([1]), np.array([[3, 6]]))
    for answer in prompts.answers(np.array([3, 6])):
        assert answer[-1] == 1
        listed, said = batch.tokens.tolist(), answer[:-1]
        assert any(listed[start : start + len(said)] == said for start in range(len(listed)))
    assert tokenizer.decode(prompts.answers(np.array([1]))[0][:-1]) == ' "Heat"'


def test_slots_follow_titles_in_order(tokenizer):
    batch = build(tokenizer, item_vectors=True).prompts(np.array([[1, 2, 0]]), np.array([2]), np.array([[7, 3]]))
    assert batch.slot_items.tolist() == [1, 2, 7, 3]
    assert (batch.tokens == SLOT_TOKEN).sum() == 4


def test_oldest_items_go_and_candidates_never(tokenizer):
    history, lengths, candidates = np.array([[1, 2, 3, 4, 5]]), np.array([5]), np.array([[6, 7, 1, 2]])
    whole = build(tokenizer).prompts(history, lengths, candidates)
    for limit in range(int(whole.lengths[0]), 20, -7):
        batch = build(tokenizer, max_prompt_tokens=limit).prompts(history, lengths, candidates)
        text = text_of(tokenizer, batch, 0)
        assert '"{candidates}</s>", "Big", "Heat", "Seven, the film", recommend' in text
        assert '"Fargo" in the previous' in text, "the latest stays"
        kept = batch.lengths[0] <= limit
        assert kept or '"Alien", "Fargo"' not in text, "more than the limit only where one item is left"
    assert '"Alien", "Fargo" in the previous' in text_of(
        tokenizer, build(tokenizer, history_length=2).prompts(history, lengths, candidates), 0
    )


def test_candidates_that_do_not_fit_are_told(tokenizer):
    with pytest.raises(UserError, match="4 candidates do not fit .* lower max_item_tokens"):
        build(tokenizer, context_length=40).prompts(np.array([[1]]), np.array([1]), np.array([[6, 7, 1, 2]]))


@pytest.mark.parametrize("template", ["only {history}", "{candidates} before {history}", "{history} {candidates} {history}"])
def test_a_template_needs_both_places(tokenizer, template):
    with pytest.raises(UserError, match="title_prompts"):
        build(tokenizer, templates=[template])
