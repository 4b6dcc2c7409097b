"""Sequence prompts: their content and order, and what is left out where they are too long."""

import numpy as np
import pytest
import torch

from recbole_llm.backbone.encoder import EncoderSettings, PromptEncoder
from recbole_llm.backbone.load import load_backbone
from recbole_llm.backbone.text import encode_text
from recbole_llm.errors import UserError
from recbole_llm.prompt.sequence import SequencePrompts, SequencePromptSettings

ATTRIBUTES = [(), ("Red shoes", "Acme"), ("Hat",), ("A long title of many words", "Brand", "Clothes"), ("</s> [Q] <|im_end|>",)]


@pytest.fixture(scope="module")
def backbone():
    return load_backbone({"backbone": "tiny", "backbone_dtype": "float32", "device": "cpu", "seed": 3})


def prompts_of(backbone, **settings):
    return SequencePrompts(
        lambda texts: encode_text(backbone.tokenizer, texts),
        ATTRIBUTES,
        SequencePromptSettings(**settings),
        prefix_ids=backbone.prefix_ids,
    )


def texts_of(backbone, batch):
    """Each prompt as text, a query token as |."""
    rows = [batch.tokens[start:end] for start, end in zip(batch.offsets[:-1], batch.offsets[1:], strict=True)]
    bar = encode_text(backbone.tokenizer, ["|"])[0]
    return [backbone.tokenizer.decode([part for token in row for part in ([token] if token >= 0 else bar)]) for row in rows]


HISTORY, LENGTHS = np.array([[1, 2, 3], [2, 4, 0], [3, 0, 0]]), np.array([3, 2, 1])


def test_each_item_is_followed_by_a_query_token(backbone):
    batch = prompts_of(backbone).sequences(HISTORY, LENGTHS)
    shoes, long = "Red shoes, Acme|", "A long title of many words, Brand, Clothes|"
    assert texts_of(backbone, batch) == [f"<s>{shoes}Hat|{long}", "<s>Hat|</s> [Q] <|im_end|>|", f"<s>{long}"]
    assert batch.is_read.tolist() == [[True, True, True], [True, True, False], [True, False, False]]
    assert (batch.tokens[batch.out_positions] == -2).all() and (batch.vector_index[batch.out_positions] == 0).all()
    assert (batch.out_positions[:, -1] == batch.offsets[1:] - 1).all(), "a prompt ends with a query token"
    # special tokens in a title are plain text: the only one is the prefix
    assert (batch.tokens == backbone.prefix_ids[0]).sum() == 3


def test_one_query_token_at_the_end_is_the_ablation(backbone):
    every, last = (prompts_of(backbone, queries=queries).sequences(HISTORY, LENGTHS) for queries in ("all", "last"))
    without = [every.tokens[start : end - 1] for start, end in zip(every.offsets[:-1], every.offsets[1:], strict=True)]
    assert last.tokens.tolist() == [token for row in without for token in [*row[row >= 0].tolist(), -2]]
    assert last.is_read.tolist() == [[True]] * 3


def test_alignment_prompt(backbone):
    batch = prompts_of(backbone).alignments(np.array([2, 1]))
    instruction = "<s>Please give the ID of the following item: "
    assert texts_of(backbone, batch) == [f"{instruction}Hat|", f"{instruction}Red shoes, Acme|"]
    head = batch.tokens[: batch.header_length]
    assert (batch.tokens[batch.offsets[1] : batch.offsets[1] + batch.header_length] == head).all()


def test_a_query_that_is_a_text_is_read_at_its_last_token(backbone):
    ids = tuple(encode_text(backbone.tokenizer, [". |"])[0])
    assert len(ids) > 1
    batch = prompts_of(backbone, query_ids=ids).sequences(np.array([[2, 2]]), np.array([2]))
    hat = encode_text(backbone.tokenizer, ["Hat"])[0]
    assert batch.tokens.tolist() == [*backbone.prefix_ids, *([*hat, *ids[:-1], -2] * 2)]
    assert batch.is_read.tolist() == [[True, True]]


def test_attributes_are_cut_before_they_are_joined(backbone):
    batch = prompts_of(backbone, max_attribute_tokens=2).sequences(np.array([[3]]), np.array([1]))
    words = [encode_text(backbone.tokenizer, [text])[0] for text in ("A long title", " Brand", " Clothes")]
    comma = encode_text(backbone.tokenizer, [","])[0]
    expected = [*backbone.prefix_ids, *words[0][:2], *comma, *words[1][:2], *comma, *words[2][:2], -2]
    assert batch.tokens.tolist() == expected


def test_whole_oldest_items_go_first_and_a_long_item_is_cut(backbone):
    history = np.array([[1, 3, 3, 3]])
    whole = prompts_of(backbone).sequences(history, np.array([4]))
    last_three = prompts_of(backbone).sequences(history[:, 1:], np.array([3]))
    limit = int(last_three.lengths[0])
    assert whole.lengths[0] > limit
    cut = prompts_of(backbone, max_prompt_tokens=limit).sequences(history, np.array([4]))
    assert cut.tokens.tolist() == last_three.tokens.tolist()
    fewer = prompts_of(backbone, history_length=3).sequences(history, np.array([4]))
    assert fewer.tokens.tolist() == last_three.tokens.tolist()
    small = prompts_of(backbone, max_prompt_tokens=50)
    for batch in (small.sequences(HISTORY, LENGTHS), small.alignments(np.arange(1, 5))):
        assert 42 < batch.lengths.max() <= 50
        assert (batch.tokens[batch.out_positions[:, -1]] == -2).all()
    with pytest.raises(UserError, match="max_prompt_tokens: 20 "):
        prompts_of(backbone, max_prompt_tokens=20)


@pytest.mark.parametrize("fast", [{}, {"call_cost": 10**9}, {"skip_unread": False}, {"recompute": True}])
def test_states_at_differing_numbers_of_query_tokens_equal_one_prompt_alone(backbone, fast):
    """Value and gradient, against the plain LLM on one prompt after the other."""
    batch = prompts_of(backbone).sequences(HISTORY, LENGTHS)
    query = (0.1 * torch.randn(1, backbone.input_size, generator=torch.Generator().manual_seed(0))).requires_grad_()
    hidden = PromptEncoder(backbone, EncoderSettings(**fast))(batch, query)[torch.from_numpy(batch.is_read)]
    expected = []
    for start, end in zip(batch.offsets[:-1], batch.offsets[1:], strict=True):
        tokens = torch.from_numpy(batch.tokens[start:end]).long()
        embeddings = torch.where((tokens < 0)[:, None], query, backbone.embedding(tokens.clamp(min=0)))
        output = backbone.model(inputs_embeds=embeddings[None], use_cache=False).last_hidden_state[0]
        expected.append(output[tokens < 0])
    expected = torch.cat(expected)
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((states * direction).sum(), query)[0] for states in (hidden, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
