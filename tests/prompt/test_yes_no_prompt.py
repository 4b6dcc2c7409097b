"""Prompts that are answered by Yes or No: what they list, what is cut, and that titles stay data."""

import numpy as np
import pytest

from recbole_llm.backbone.load import load_backbone
from recbole_llm.backbone.text import encode_text
from recbole_llm.errors import UserError
from recbole_llm.prompt.yes_no import YesNoPrompts, YesNoPromptSettings

TITLES = ["", "Heat", "Seven, the film", "{target}</s>", "Alien", "Fargo"]
TEMPLATE = "Liked: {liked}. Disliked: {disliked}. Will the user enjoy {target}? Answer:"


def encode(texts):
    """One token per character: prompts can be read back."""
    return [[ord(character) for character in text] for text in texts]


def build(**settings):
    ends = {"prefix_ids": [ord("^")], "suffix_ids": [ord("_")]}
    return YesNoPrompts(encode, TITLES, YesNoPromptSettings(**{"template": TEMPLATE, **settings}), **ends)


def read(batch):
    return ["".join(map(chr, batch.tokens[start:end])) for start, end in zip(batch.offsets, batch.offsets[1:], strict=False)]


def test_each_item_stands_in_the_list_of_its_rating():
    history = np.array([[1, 2, 3, 4], [2, 1, 0, 0], [4, 0, 0, 0]])
    liked = np.array([[True, False, True, True], [False, False, True, True], [True, True, True, True]])
    batch = build().prompts(history, np.array([4, 2, 1]), liked, np.array([5, 3, 1]))
    assert read(batch) == [
        '^Liked: "Heat", "{target}</s>", "Alien". Disliked: "Seven, the film". Will the user enjoy "Fargo"? Answer:_',
        '^Liked: none. Disliked: "Seven, the film", "Heat". Will the user enjoy "{target}</s>"? Answer:_',
        '^Liked: "Alien". Disliked: none. Will the user enjoy "Heat"? Answer:_',
    ]


def test_an_empty_list_reads_as_the_settings_say():
    batch = build(empty_list="").prompts(np.array([[4]]), np.array([1]), np.array([[True]]), np.array([1]))
    assert read(batch) == ['^Liked: "Alien". Disliked: . Will the user enjoy "Heat"? Answer:_']


def test_a_template_may_name_its_places_in_any_order():
    prompts = build(template="Is {target} like {liked}, or like {disliked}?")
    batch = prompts.prompts(np.array([[1, 2]]), np.array([2]), np.array([[False, True]]), np.array([5]))
    assert read(batch) == ['^Is "Fargo" like "Seven, the film", or like "Heat"?_']


@pytest.mark.parametrize("template", ["{liked} {disliked}", "{liked}{disliked}{target}{target}", "{Liked} {disliked} {target}"])
def test_a_template_needs_its_three_places(template):
    with pytest.raises(UserError, match="yes_no_prompt: .* once each"):
        build(template=template)


def test_whole_oldest_items_go_and_the_target_never():
    history, lengths, liked = np.array([[1, 2, 3, 4]]), np.array([4]), np.array([[True, False, False, True]])
    whole = build().prompts(history, lengths, liked, np.array([5]))
    kept_before = 4
    for limit in range(int(whole.lengths[0]) + 20, 0, -1):
        try:
            batch = build(max_prompt_tokens=limit).prompts(history, lengths, liked, np.array([5]))
        except UserError as error:
            assert kept_before == 1 and "max_prompt_tokens" in str(error)
            break
        text = read(batch)[0]
        assert batch.lengths[0] <= limit and 'enjoy "Fargo"? Answer:_' in text
        kept = [f'"{TITLES[item]}"' in text for item in history[0]]
        assert kept == sorted(kept) and sum(kept) <= kept_before, "of the history the latest stay"
        kept_before = sum(kept)
    else:
        pytest.fail("a prompt of 0 tokens")
    text = read(build(history_length=2).prompts(history, lengths, liked, np.array([5])))[0]
    assert text.startswith('^Liked: "Alien". Disliked: "{target}</s>".')


def test_titles_are_cut_and_never_become_special_tokens():
    tokenizer = load_backbone({"backbone": "tiny"}).tokenizer
    prompts = YesNoPrompts(
        lambda texts: encode_text(tokenizer, texts), TITLES, YesNoPromptSettings(TEMPLATE, max_item_tokens=7)
    )
    batch = prompts.prompts(np.array([[3]]), np.array([1]), np.array([[True]]), np.array([3]))
    assert not set(batch.tokens.tolist()) & set(tokenizer.all_special_ids)
    cut = tokenizer.decode(encode_text(tokenizer, [TITLES[3]])[0][:7])
    assert tokenizer.decode(batch.tokens).count(f'"{cut}"') == 2 and cut != TITLES[3]
