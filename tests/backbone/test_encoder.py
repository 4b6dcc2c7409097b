"""Each fast path of the encoder equals the plain path, in value and in gradient."""

import numpy as np
import pytest
import torch

from recbole_llm.backbone.encoder import EncoderSettings, PromptEncoder
from recbole_llm.backbone.load import load_backbone
from recbole_llm.backbone.text import encode_text
from recbole_llm.prompt.batch import PromptBatch
from recbole_llm.prompt.retrieval import PromptBuilder, PromptSettings

TITLES = [""] + [f"Item {'very ' * (number % 5)}long title {number}" for number in range(1, 30)] + ["[UserOut]</s><|im_end|>"]
PLAIN = {"share_header": False, "share_prefix": False, "skip_unread": False, "micro_batch_tokens": 1, "call_cost": 0}


@pytest.fixture(scope="module")
def backbone():
    return load_backbone({"backbone": "tiny", "backbone_dtype": "float32", "device": "cpu", "seed": 3})


def prompts_of(backbone, **settings):
    return PromptBuilder(
        lambda texts: encode_text(backbone.tokenizer, texts),
        TITLES,
        PromptSettings(**settings),
        format_dates=lambda times: [f"2001-01-{int(time):02d}" for time in times],
        prefix_ids=backbone.prefix_ids,
    )


def original_histories(prompts):
    rng = np.random.default_rng(0)
    lengths = np.array([10, 3, 1, 7, 10, 5])
    items = np.where(np.arange(10) < lengths[:, None], rng.integers(1, 31, (6, 10)), 0)
    return prompts.select_histories(items, lengths, rng.integers(1, 28, (6, 10)).astype(float))


def perturbed_batch(prompts):
    from recbole_llm.data.perturbation import draw_negatives

    histories = original_histories(prompts)
    items, parents = draw_negatives(histories.items, histories.lengths, np.random.default_rng(1))
    assert len(parents) > 10
    return prompts.perturbed_prompts(histories, items, parents)


def encode(backbone, batch: PromptBatch, **settings):
    """Hidden states and their gradient at the vectors, for a fixed random direction."""
    encoder = PromptEncoder(backbone, EncoderSettings(**settings))
    generator = torch.Generator().manual_seed(0)
    count = len(batch.vector_items) + batch.out_positions.shape[1]
    vectors = (0.1 * torch.randn(count, backbone.input_size, generator=generator)).requires_grad_()
    hidden = encoder(batch, vectors)
    direction = torch.randn(hidden.shape, generator=generator)
    backbone.zero_grad()
    (hidden * direction).sum().backward()
    weights = {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}
    return hidden.detach(), vectors.grad, weights, encoder


FAST = {
    "buckets": {"share_header": False, "share_prefix": False, "skip_unread": False},
    "header": {**PLAIN, "share_header": True},
    "prefix": {"share_header": False, "share_prefix": True, "skip_unread": False},
    "unread": {**PLAIN, "skip_unread": True},
    "all": {},
    "small micro-batches": {"micro_batch_tokens": 300, "call_cost": 5},
    "recompute": {"recompute": True, "micro_batch_tokens": 500},
}


@pytest.mark.parametrize("path", FAST)
def test_fast_path_equals_plain_path(backbone, path):
    batch = perturbed_batch(prompts_of(backbone, out_tokens=2))
    hidden, gradient, _, _ = encode(backbone, batch, **PLAIN)
    fast_hidden, fast_gradient, _, _ = encode(backbone, batch, **FAST[path])
    assert hidden.abs().max() > 0.1 and gradient.abs().max() > 1e-3, "the comparison must be about something"
    torch.testing.assert_close(fast_hidden, hidden, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(fast_gradient, gradient, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_fast_path_equals_plain_path_in_the_gradients_of_a_trained_llm(tuning):
    backbone = load_backbone(
        {"backbone": "tiny", "backbone_dtype": "float32", "device": "cpu", "seed": 3, "tuning": tuning, "lora_dropout": 0.0}
    )
    batch = perturbed_batch(prompts_of(backbone))
    hidden, gradient, weights, _ = encode(backbone, batch, **PLAIN)
    fast_hidden, fast_gradient, fast_weights, _ = encode(backbone, batch)
    torch.testing.assert_close(fast_hidden, hidden, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(fast_gradient, gradient, rtol=1e-3, atol=2e-5)
    assert weights and weights.keys() == fast_weights.keys()
    for name, expected in weights.items():
        torch.testing.assert_close(fast_weights[name], expected, rtol=2e-3, atol=1e-4, msg=name)


def test_plain_path_is_the_llm_on_one_prompt(backbone):
    """The reference of the other tests, against the LLM itself."""
    prompts = prompts_of(backbone)
    batch = prompts.item_prompts(np.array([3, 30]))
    vectors = torch.randn(3, backbone.input_size, generator=torch.Generator().manual_seed(1))
    hidden = PromptEncoder(backbone, EncoderSettings(**PLAIN))(batch, vectors)
    for row in range(2):
        tokens = batch.tokens[batch.offsets[row] : batch.offsets[row + 1]]
        embeddings = backbone.embedding(torch.from_numpy(tokens).long().clamp(min=0))
        embeddings[np.flatnonzero(tokens == -1)] = vectors[row]
        embeddings[-1] = vectors[2]
        expected = backbone.causal_lm(
            inputs_embeds=embeddings[None], output_hidden_states=True
        ).hidden_states[-1][0, -1]
        torch.testing.assert_close(hidden[row, 0], expected, rtol=1e-4, atol=1e-5)


def test_shared_work_is_not_done_twice(backbone):
    batch = perturbed_batch(prompts_of(backbone))
    _, _, _, plain = encode(backbone, batch, **PLAIN)
    _, _, _, fast = encode(backbone, batch, call_cost=0)
    assert plain.counts.computed == batch.lengths.sum()
    needed = (batch.lengths - np.where(batch.parent >= 0, batch.shared, batch.header_length)).sum()
    assert fast.counts.computed - fast.counts.padding == needed
    assert needed < 0.8 * plain.counts.computed
    assert plain.counts.padding == 0


def test_frozen_header_is_computed_once(backbone, monkeypatch):
    prompts = prompts_of(backbone)
    encoder = PromptEncoder(backbone, EncoderSettings())
    calls = []
    forward = type(backbone).forward
    monkeypatch.setattr(
        type(backbone), "forward", lambda self, *args, **kwargs: (calls.append(1), forward(self, *args, **kwargs))[1]
    )
    vectors = torch.zeros(4, backbone.input_size)
    batch = prompts.item_prompts(np.array([1, 2, 3]))
    encoder(batch, vectors)
    first = len(calls)
    encoder(batch, vectors)
    assert len(calls) - first == first - 1


def test_padding_never_reaches_a_hidden_state(backbone):
    """A prompt gives the same hidden state alone and beside a much longer one."""
    prompts = prompts_of(backbone)
    histories = original_histories(prompts)
    batch = prompts.user_prompts(histories)
    hidden, *_ = encode(backbone, batch, call_cost=10**9)  # all in one micro-batch
    alone, *_ = encode(backbone, batch, micro_batch_tokens=1, call_cost=0)
    torch.testing.assert_close(hidden, alone, rtol=1e-4, atol=1e-5)


def test_titles_with_special_tokens_are_plain_text(backbone):
    batch = prompts_of(backbone).item_prompts(np.array([30]))
    tokens = batch.tokens[batch.header_length :]
    assert not set(tokens.tolist()) & set(backbone.tokenizer.all_special_ids)
    assert (tokens < 0).sum() == 2  # one slot, one out token


def window_batch(prompts):
    """Windows of 10, 4 and 1 items, row by row one item longer; a longest title in between."""
    rng = np.random.default_rng(4)
    rows = [(window, length) for window, longest in enumerate((10, 4, 1)) for length in range(1, longest + 1)]
    windows, times = rng.integers(1, 31, (3, 10)), rng.integers(1, 28, (3, 10)).astype(float)
    which, lengths = np.array(rows).T
    items = np.where(np.arange(10) < lengths[:, None], windows[which], 0)
    return prompts.select_histories(items, lengths, times[which])


def alone(batch, n):
    """Prompt n as a batch of its own, row by row as the encoder would be given it without a window."""
    return batch.tokens[batch.offsets[n] : batch.offsets[n + 1]]


@pytest.mark.parametrize("path", ["all", "small micro-batches", "recompute", "prefix", "header apart"])
@pytest.mark.parametrize("branch_tokens", [64, 0])
def test_prompts_of_a_window_share_its_longest_and_equal_separate_ones(backbone, path, branch_tokens):
    prompts = prompts_of(backbone, out_tokens=2)
    batch = prompts.user_prompts(window_batch(prompts))
    assert (batch.parent >= 0).sum() == 9 + 3 and set(batch.parent[batch.parent >= 0]) == {9, 13}
    hidden, gradient, _, _ = encode(backbone, batch, **PLAIN)
    settings = {"header apart": {"share_header": False}}.get(path) or FAST.get(path)
    fast_hidden, fast_gradient, _, encoder = encode(backbone, batch, **settings, branch_tokens=branch_tokens)
    assert hidden.abs().max() > 0.1 and gradient.abs().max() > 1e-3
    torch.testing.assert_close(fast_hidden, hidden, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(fast_gradient, gradient, rtol=1e-3, atol=2e-5)
    assert encoder.counts.computed < (1.0 if path == "recompute" else 0.5) * batch.lengths.sum()


def test_a_window_whose_prompts_drop_items_shares_what_is_the_same(backbone):
    """Where the budget drops the oldest items, a shorter prompt of the window still begins with them."""
    prompts = prompts_of(backbone, max_prompt_tokens=400)
    histories = window_batch(prompts)
    assert (histories.lengths[:10] < np.arange(1, 11)).any(), "items are dropped"
    batch = prompts.user_prompts(histories)
    for n in np.flatnonzero(batch.parent >= 0):
        whole, part, shared = alone(batch, batch.parent[n]), alone(batch, n), batch.shared[n]
        assert (whole[:shared] == part[:shared]).all() and shared < len(part)
    assert set(batch.parent[:10]) != {-1}, "something is shared"
    hidden, gradient, _, _ = encode(backbone, batch, **PLAIN)
    fast_hidden, fast_gradient, _, _ = encode(backbone, batch)
    torch.testing.assert_close(fast_hidden, hidden, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(fast_gradient, gradient, rtol=1e-3, atol=2e-5)


def test_prompts_of_a_window_are_those_of_their_histories(backbone):
    """Each is built again alone: ranks, dates and all."""
    prompts = prompts_of(backbone)
    histories = window_batch(prompts)
    batch = prompts.user_prompts(histories)
    for n in range(len(batch)):
        one = prompts.user_prompts(type(histories)(*(table[n : n + 1] for table in vars(histories).values())))
        assert one.parent[0] == -1 and (alone(batch, n) == one.tokens).all()


def test_a_window_and_its_perturbed_end_equal_separate_prompts(backbone):
    from recbole_llm.data.perturbation import draw_negatives

    prompts = prompts_of(backbone)
    histories, last = window_batch(prompts), np.array([9, 13, 14])
    items, parents = draw_negatives(histories.items[last], histories.lengths[last], np.random.default_rng(1))
    batch = prompts.perturbed_prompts(histories, items, last[parents])
    assert (batch.parent[batch.parent >= 0][:, None] == last).any(axis=1).all()
    hidden, gradient, _, _ = encode(backbone, batch, **PLAIN)
    for settings in ({}, {"branch_tokens": 0}, {"branch_tokens": 10**6}, {"micro_batch_tokens": 300, "call_cost": 5}):
        fast_hidden, fast_gradient, _, _ = encode(backbone, batch, **settings)
        torch.testing.assert_close(fast_hidden, hidden, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(fast_gradient, gradient, rtol=1e-3, atol=2e-5)


def test_a_history_that_goes_on_in_the_next_row_keeps_its_perturbed_prompts(backbone):
    """A prompt that others share cannot itself stand in the row of another."""
    prompts = prompts_of(backbone)
    histories = window_batch(prompts)
    batch = prompts.perturbed_prompts(histories, histories.items[[8]], np.array([8]))
    assert batch.parent[8] == -1 and batch.parent[-1] == 8 and batch.parent[7] == 8


def test_another_date_or_item_is_another_history(backbone):
    prompts = prompts_of(backbone)
    items, times = np.array([[3, 0, 0], [3, 4, 0], [3, 4, 5]]), np.array([[1.0, 0, 0], [1, 2, 0], [1, 2, 3]])

    def parents(items, times):
        return prompts.user_prompts(prompts.select_histories(items, np.array([1, 2, 3]), times)).parent.tolist()

    assert parents(items, times) == [2, 2, -1]
    assert parents(items, times + [[0], [1], [0]]) == [-1, -1, -1]
    items[1, 0] = 6
    assert parents(items, times) == [-1, -1, -1]


def test_prompts_that_begin_with_the_users_vector_share_nothing(backbone):
    prompts = prompts_of(backbone, user_vector=True)
    assert (prompts.user_prompts(window_batch(prompts)).parent == -1).all()
