"""Loss, decoding and scores of titles equal what transformers makes of each whole prompt by itself."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch
import transformers
from test_llm import ARCHITECTURES, LLAMA, VOCABULARY
from transformers import AutoModelForCausalLM

from recbole_llm.backbone.backbone import Backbone
from recbole_llm.backbone.generation import TitleTrie, decoding, greedy, logits, score_titles, scoring, title_loss, vocabulary
from recbole_llm.backbone.load import load_backbone
from recbole_llm.errors import UserError
from recbole_llm.prompt.batch import SLOT_TOKEN, PromptBatch

STOP = 3
# Model types whose logits are more than the output head's, each in a way of its own.
SCALED = {
    "gemma2-capped": ("gemma2", ARCHITECTURES["gemma2"][1] | {"final_logit_softcapping": 0.5}),
    "cohere": ("cohere", LLAMA | {"logit_scale": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    "granite": ("granite", LLAMA | {"logits_scaling": 3.0}),
    "hyperclovax": ("hyperclovax", LLAMA | {"logits_scaling": 3.0}),
    "mixtral": ("mixtral", LLAMA | {"num_local_experts": 2, "sliding_window": None}),
}
# A head of its own: with that of the embeddings, random models repeat what they have read.
UNTIED = {
    name: (kind, settings | {"tie_word_embeddings": False}) for name, (kind, settings, *_) in ARCHITECTURES.items()
}
TYPES = UNTIED | SCALED
ALL = sorted(ARCHITECTURES)
ONE_BY_ONE = {"micro_batch_tokens": 1, "call_cost": 0}
ALL_AT_ONCE = {"micro_batch_tokens": 10**9, "call_cost": 10**9}
BUCKETS = {"micro_batch_tokens": 60, "call_cost": 5}
BATCHING = [ONE_BY_ONE, ALL_AT_ONCE, BUCKETS]


@pytest.fixture(scope="session")
def load(tmp_path_factory):
    """A function (name, **settings) -> the random model of an architecture; not to be changed."""

    @lru_cache
    def folder(name):
        path = tmp_path_factory.mktemp(name)
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(TYPES[name][0], **TYPES[name][1]))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(path)
        load_backbone({"backbone": "tiny"}).tokenizer.save_pretrained(path)
        return path

    @lru_cache
    def load(name, **settings) -> Backbone:
        source = name if name == "tiny" else str(folder(name))
        return load_backbone({"backbone": source, "backbone_dtype": "float32", "device": "cpu", "seed": 3, **settings})

    return load


@pytest.fixture
def tiny(load) -> Backbone:
    return load("tiny")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def title(rng, low=1, high=8) -> list[int]:
    return rng.integers(4, VOCABULARY, rng.integers(low, high)).tolist()


def make_batch(backbone, rng, lengths=(9, 4, 20, 1, 12, 9), slots=True) -> tuple[PromptBatch, torch.Tensor]:
    """Random prompts, and vectors for the slots that longer ones have; the same item in several of them."""
    prompts = [rng.integers(4, VOCABULARY, length) for length in lengths]
    items = []
    for prompt in prompts:
        for place in (1, len(prompt) - 1):  # also where the answer is predicted
            if slots and len(prompt) > 4:
                prompt[place] = SLOT_TOKEN
                items.append(rng.integers(10, 15))
    batch = PromptBatch.build(
        tokens=np.concatenate([[], *prompts]).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        slot_items=np.array(items, dtype=np.int64),
        out_tokens=0,
        header_length=0,
    )
    generator = torch.Generator().manual_seed(5)
    vectors = 0.5 * torch.randn(len(batch.vector_items), backbone.input_size, generator=generator)
    return batch, vectors


def only(batch: PromptBatch, vectors: torch.Tensor, prompt: int) -> tuple[PromptBatch, torch.Tensor]:
    """One prompt of a batch as a batch of its own, with its own numbers for its vectors."""
    begin, end = batch.offsets[prompt], batch.offsets[prompt + 1]
    first = (batch.tokens[:begin] == SLOT_TOKEN).sum()
    count = (batch.tokens[begin:end] == SLOT_TOKEN).sum()
    alone = PromptBatch.build(
        tokens=batch.tokens[begin:end],
        offsets=np.array([0, end - begin]),
        slot_items=batch.slot_items[first : first + count],
        out_tokens=0,
        header_length=0,
    )
    return alone, vectors[np.searchsorted(batch.vector_items, alone.vector_items)]


# ---- The plain versions: transformers on one whole prompt at a time


def plain_logits(backbone, batch, vectors, prompt, answer) -> torch.Tensor:
    """Logits that predict each token of an answer, and the one after it ``[len(answer) + 1, vocabulary]``."""
    begin, end = batch.offsets[prompt], batch.offsets[prompt + 1]
    tokens = batch.tokens[begin:end].tolist() + list(answer)
    inputs = []
    for place, token in enumerate(tokens):
        if token == SLOT_TOKEN:
            inputs.append(vectors[batch.vector_index[begin + place]])
        else:
            inputs.append(backbone.embedding(torch.tensor(token)))
    return backbone.causal_lm(inputs_embeds=torch.stack(inputs)[None]).logits[0, end - begin - 1 :]


def plain_score(backbone, batch, vectors, prompt, answer) -> torch.Tensor:
    scores = plain_logits(backbone, batch, vectors, prompt, answer)[:-1].log_softmax(dim=1)
    return scores[torch.arange(len(answer)), torch.tensor(answer)].sum()


def allowed(trie: TitleTrie, answer: list[int]) -> list[int]:
    """Tokens that may follow the beginning of an answer, ascending."""
    node = trie.root
    for token in answer:
        node = node[token]
    return sorted(node)


@torch.no_grad()
def plain_greedy(backbone, batch, vectors, prompt, steps, stop_ids, trie=None) -> list[int]:
    answer: list[int] = []
    while len(answer) < steps:
        scores = plain_logits(backbone, batch, vectors, prompt, answer)[-1]
        if trie is not None:
            forbidden = torch.ones(len(scores), dtype=torch.bool)
            forbidden[allowed(trie, answer)] = False
            scores = scores.masked_fill(forbidden, -torch.inf)
        token = int(scores.argmax())
        if token in stop_ids:
            break
        answer.append(token)
    return answer


# ---- Prompts without out tokens


def test_a_generation_prompt_has_no_out_tokens(tiny, rng):
    batch, _ = make_batch(tiny, rng)
    assert batch.out_positions.shape == (6, 0)
    assert batch.vector_index.max() == len(batch.vector_items) - 1


# ---- Logits


@pytest.mark.parametrize("name", sorted(TYPES))
@torch.no_grad()
def test_logits_are_those_of_the_architecture(load, name):
    backbone = load(name)
    ids = torch.randint(4, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    expected = backbone.causal_lm(input_ids=ids).logits
    hidden, _ = backbone(backbone.embedding(ids), torch.arange(7)[None])
    actual = logits(backbone, hidden)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(backbone, hidden[1, 4]), expected[1, 4], atol=1e-5, rtol=1e-5)
    head = backbone.causal_lm.get_output_embeddings()
    if name in SCALED and name != "mixtral":
        assert (head(hidden) - expected).abs().max() > 0.1, "the head alone must not pass"
    # The decoder is as it was.
    torch.testing.assert_close(backbone.causal_lm(input_ids=ids).logits, expected, atol=0, rtol=0)


def test_logits_of_half_precision_are_float32(load):
    backbone = load("gemma2", backbone_dtype="bfloat16")
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    actual = logits(backbone, hidden)
    assert actual.dtype == torch.float32 and actual.shape == (3, VOCABULARY)


def test_logits_pass_gradients(load):
    backbone = load("gemma2-capped", tuning="full")
    hidden = torch.randn(2, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    logits(backbone, hidden)[:, 7].sum().backward()
    assert hidden.grad.abs().min() > 0
    assert backbone.embedding.weight.grad.abs().sum(dim=1).nonzero().tolist() == [[7]]
    backbone.zero_grad()


def test_the_decoder_is_put_back_after_an_error(tiny):
    with pytest.raises(RuntimeError):
        logits(tiny, torch.zeros(2, 5))
    assert "forward" not in vars(tiny.model)


# ---- The loss


@pytest.mark.parametrize("batching", BATCHING)
@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_title_loss_equals_the_plain_one(load, rng, name, batching):
    backbone = load(name)
    batch, vectors = make_batch(backbone, rng)
    targets = [title(rng) + [STOP] for _ in range(len(batch))]
    targets[2] = [STOP]
    losses, counts = title_loss(backbone, batch, vectors, targets, **batching)
    expected = torch.stack([-plain_score(backbone, batch, vectors, n, targets[n]) for n in range(len(batch))])
    torch.testing.assert_close(losses, expected, atol=1e-4, rtol=1e-4)
    assert counts.tolist() == [len(target) for target in targets]


@pytest.mark.parametrize(
    ("name", "tuning"), [("tiny", "lora"), ("tiny", "full"), ("gemma2", "lora"), ("opt", "frozen")]
)
def test_gradients_of_title_loss_equal_the_plain_ones(load, rng, name, tuning):
    backbone = load(name, tuning=tuning, lora_dropout=0.0)
    if tuning == "lora":
        with torch.no_grad():  # B begins at 0, and so would the gradient of A
            for key, parameter in backbone.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    batch, vectors = make_batch(backbone, rng)
    targets = [title(rng) + [STOP] for _ in range(len(batch))]
    weights = torch.linspace(-1, 2, len(batch))  # so that a mix-up of rows shows

    def gradients(losses_of) -> dict[str, torch.Tensor]:
        backbone.zero_grad()
        leaf = vectors.clone().requires_grad_()
        (losses_of(leaf) * weights).sum().backward()
        trained = {key: p.grad.clone() for key, p in backbone.named_parameters() if p.grad is not None}
        return trained | {"vectors": leaf.grad}

    expected = gradients(
        lambda leaf: torch.stack([-plain_score(backbone, batch, leaf, n, targets[n]) for n in range(len(batch))])
    )
    actual = gradients(lambda leaf: title_loss(backbone, batch, leaf, targets, **BUCKETS)[0])
    assert actual.keys() == expected.keys()
    assert len(actual) > 1 or tuning == "frozen"
    for key, gradient in expected.items():
        assert gradient.abs().max() > 1e-4, key
        torch.testing.assert_close(actual[key], gradient, atol=1e-4, rtol=1e-3, msg=key)


def test_logits_are_computed_at_target_positions_alone(tiny, rng, monkeypatch):
    batch, vectors = make_batch(tiny, rng)
    targets = [title(rng) + [STOP] for _ in range(len(batch))]
    rows = []
    hook = tiny.causal_lm.lm_head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[:-1].numel()))
    try:
        losses, counts = title_loss(tiny, batch, vectors.requires_grad_(), targets, **ALL_AT_ONCE)
        assert sum(rows) == counts.sum()
        # A limit on the logits held at a time changes nothing else.
        rows.clear()
        monkeypatch.setattr(vocabulary, "_LOGITS_AT_ONCE", 3 * VOCABULARY)
        again, _ = title_loss(tiny, batch, vectors, targets, **ALL_AT_ONCE)
        assert max(rows) == 3 and sum(rows) == counts.sum()
    finally:
        hook.remove()
    torch.testing.assert_close(again, losses, atol=1e-5, rtol=1e-5)
    (some,) = torch.autograd.grad(losses.sum(), vectors)
    (others,) = torch.autograd.grad(again.sum(), vectors)
    torch.testing.assert_close(some, others, atol=1e-5, rtol=1e-5)


def test_one_prompt_alone_has_the_loss_that_it_has_in_a_batch(tiny, rng):
    batch, vectors = make_batch(tiny, rng)
    targets = [title(rng) + [STOP] for _ in range(len(batch))]
    together, _ = title_loss(tiny, batch, vectors, targets, **ALL_AT_ONCE)
    for n in range(len(batch)):
        alone, _ = title_loss(tiny, *only(batch, vectors, n), targets[n : n + 1], **ALL_AT_ONCE)
        torch.testing.assert_close(alone[0], together[n], atol=1e-5, rtol=1e-5)


# ---- Decoding


def first_at(token):
    return lambda answer: answer.index(token) if token in answer else -1


@pytest.mark.parametrize("name", ALL)
def test_greedy_equals_generate(load, rng, name):
    """Over more tokens than the sliding windows are wide, prompts of different lengths."""
    backbone = load(name)
    batch, vectors = make_batch(backbone, rng, slots=False)
    free = greedy(backbone, batch, vectors, 16, [], **ALL_AT_ONCE)
    assert [len(answer) for answer in free] == [16] * 6
    # Two tokens of these very answers stop them, those that come up latest.
    stop_ids = sorted({token for answer in free for token in answer}, key=lambda token: max(map(first_at(token), free)))
    stop_ids = stop_ids[-2:]
    answers = greedy(backbone, batch, vectors, 16, stop_ids, **ALL_AT_ONCE)
    assert any(0 < len(answer) < 16 for answer in answers)
    for prompt, whole, stopped in zip(range(6), free, answers, strict=True):
        ids = torch.from_numpy(batch.tokens[batch.offsets[prompt] : batch.offsets[prompt + 1]]).long()[None]
        options = {
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": 16,
            "do_sample": False,
            "pad_token_id": 0,
        }
        expected = backbone.causal_lm.generate(ids, eos_token_id=VOCABULARY + 5, **options)[0, ids.shape[1] :].tolist()
        assert whole == expected
        expected = backbone.causal_lm.generate(ids, eos_token_id=stop_ids, **options)[0, ids.shape[1] :].tolist()
        assert stopped == (expected[:-1] if expected[-1] in stop_ids else expected)


@pytest.mark.parametrize("batching", BATCHING)
@pytest.mark.parametrize("name", ["tiny", "gemma2", "mistral-sliding", "opt-projected"])
def test_greedy_with_slots_equals_the_plain_one(load, rng, name, batching):
    backbone = load(name)
    batch, vectors = make_batch(backbone, rng)
    answers = greedy(backbone, batch, vectors, 10, [], **batching)
    assert answers == [plain_greedy(backbone, batch, vectors, n, 10, set()) for n in range(len(batch))]
    for n in range(len(batch)):
        assert greedy(backbone, *only(batch, vectors, n), 10, [], **batching) == [answers[n]]


def test_an_answer_that_stops_at_once_is_empty(tiny, rng):
    batch, vectors = make_batch(tiny, rng)
    first = [answer[0] for answer in greedy(tiny, batch, vectors, 1, [], **ALL_AT_ONCE)]
    assert greedy(tiny, batch, vectors, 5, first, **ALL_AT_ONCE) == [[]] * 6


def spy_on(monkeypatch) -> list[tuple[int, int]]:
    """Rows and padded tokens of each call of the LLM from now on."""
    calls = []
    forward = Backbone.forward

    def spy(self, inputs_embeds, *arguments, **options):
        calls.append(tuple(inputs_embeds.shape[:2]))
        return forward(self, inputs_embeds, *arguments, **options)

    monkeypatch.setattr(Backbone, "forward", spy)
    return calls


def test_rows_that_stopped_leave_the_batch(tiny, rng, monkeypatch):
    batch, vectors = make_batch(tiny, rng)
    tries = [TitleTrie([[9] * 4 + [10, 11], [9] * 4 + [12]], STOP) if n < 4 else None for n in range(6)]
    calls = spy_on(monkeypatch)
    answers = greedy(tiny, batch, vectors, 12, [], **ALL_AT_ONCE, tries=tries)
    assert answers[4:] == [plain_greedy(tiny, batch, vectors, n, 12, set()) for n in (4, 5)]
    # After 4 tokens a candidate is chosen by the 5th, and its end is known; the last token is not fed.
    assert calls == [(6, 20)] + [(6, 1)] * 4 + [(2, 1)] * 7


@pytest.mark.parametrize("batching", BATCHING)
@pytest.mark.parametrize("name", ["tiny", "gemma3", "opt"])
def test_a_constrained_answer_is_the_greedy_one_among_the_candidates(load, rng, name, batching):
    backbone = load(name)
    batch, vectors = make_batch(backbone, rng, (9, 4, 20, 1, 12, 9, 30, 7))
    tries, candidates = [], []
    for n in range(len(batch)):
        start = title(rng, 1, 4)
        some = [start + title(rng) for _ in range(4)] + [title(rng) for _ in range(4)]
        some += [some[0] + [7, 8], start, some[1]]  # one that another begins with, and one twice
        candidates.append(some)
        tries.append(TitleTrie(some, STOP) if n != 5 else None)
    answers = greedy(backbone, batch, vectors, 3, [STOP], **batching, tries=tries)
    for n, answer in enumerate(answers):
        steps = 3 if n == 5 else 99
        assert answer == plain_greedy(backbone, batch, vectors, n, steps, {STOP}, tries[n])
        assert answer in candidates[n] or n == 5
    assert len({tuple(answer) for answer in answers}) > 3


def test_a_prompt_at_the_end_of_the_positions_may_wait_for_the_others(load, rng):
    """OPT has an embedding for each position: a complete row that went on would leave them."""
    backbone = load("opt")
    batch, vectors = make_batch(backbone, rng, (63, 3, 3, 3, 3))
    long = [TitleTrie([[9] * 20 + [end] for end in (10, 11)], STOP) for _ in range(4)]
    answers = greedy(backbone, batch, vectors, 1, [], **ALL_AT_ONCE, tries=[TitleTrie([[5], [6]], STOP)] + long)
    assert answers[0] in ([5], [6]) and all(len(answer) == 21 for answer in answers[1:])


@pytest.mark.parametrize("score", [float("nan"), -float("inf")])
def test_a_constrained_answer_is_a_candidate_whatever_the_scores(tiny, rng, monkeypatch, score):
    batch, vectors = make_batch(tiny, rng)
    monkeypatch.setattr(decoding, "logits", lambda _, hidden: torch.full((len(hidden), VOCABULARY), score))
    trie = TitleTrie([[5, 6], [7], [8, 9, 10]], STOP)
    for answer in greedy(tiny, batch, vectors, 9, [], **ALL_AT_ONCE, tries=[trie] * 6):
        assert answer in [[5, 6], [7], [8, 9, 10]]


def test_trie():
    trie = TitleTrie([[5, 6, 7], [5, 6], [5, 9], [4], [5, 9]], STOP)
    assert trie.depth == 4
    assert allowed(trie, []) == [4, 5]
    assert allowed(trie, [5]) == [6, 9]
    assert allowed(trie, [5, 6]) == [STOP, 7]
    assert allowed(trie, [5, 6, 7]) == allowed(trie, [4]) == [STOP]
    assert trie.ending(trie.root) is None and trie.ending(trie.root[5]) is None
    assert trie.ending(trie.root[4]) == [] and trie.ending(trie.root[5][6][7]) == []
    with pytest.raises(ValueError, match="stop token"):
        TitleTrie([[5, STOP]], STOP)
    with pytest.raises(ValueError, match="needs a candidate"):
        TitleTrie([], STOP)


# ---- Scoring


def make_titles(rng, prompts: int) -> list[list[list[int]]]:
    titles = [[title(rng) + [STOP] for _ in range(rng.integers(2, 6))] for _ in range(prompts)]
    titles[1] = [[8], [9], [8]]  # predicted by the prompt alone
    titles[2] = []
    titles[4][0] = [11]
    return titles


@pytest.mark.parametrize("batching", BATCHING)
@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_scores_equal_the_plain_ones(load, rng, name, batching):
    backbone = load(name)
    batch, vectors = make_batch(backbone, rng)
    titles = make_titles(rng, len(batch))
    scores, lengths = score_titles(backbone, batch, vectors, titles, **batching)
    assert len(scores) == len(lengths) == len(batch)
    for n, candidates in enumerate(titles):
        expected = [plain_score(backbone, batch, vectors, n, candidate).item() for candidate in candidates]
        np.testing.assert_allclose(scores[n], expected, atol=1e-4, rtol=1e-4)
        assert lengths[n].tolist() == [len(candidate) for candidate in candidates]
        if candidates:
            assert scores[n].argmax() == np.argmax(expected)


def test_many_candidates_of_one_prompt_take_several_rows(tiny, rng, monkeypatch):
    batch, vectors = make_batch(tiny, rng)
    titles = [[title(rng) for _ in range(9)] for _ in range(len(batch))]
    expected, _ = score_titles(tiny, batch, vectors, titles, **ALL_AT_ONCE)
    monkeypatch.setattr(scoring, "_CANDIDATE_TOKENS_A_ROW", 10)
    calls = spy_on(monkeypatch)
    scores, _ = score_titles(tiny, batch, vectors, titles, **ALL_AT_ONCE)
    assert calls[0] == (6, 20) and calls[1][0] > 12 and calls[1][1] < 20
    for some, others in zip(scores, expected, strict=True):
        np.testing.assert_allclose(some, others, atol=1e-5, rtol=1e-5)


def test_one_prompt_alone_has_the_scores_that_it_has_in_a_batch(tiny, rng):
    batch, vectors = make_batch(tiny, rng)
    titles = make_titles(rng, len(batch))
    together, _ = score_titles(tiny, batch, vectors, titles, **ALL_AT_ONCE)
    for n in range(len(batch)):
        (alone,), _ = score_titles(tiny, *only(batch, vectors, n), titles[n : n + 1], **ALL_AT_ONCE)
        np.testing.assert_allclose(alone, together[n], atol=1e-5, rtol=1e-5)


def test_scores_are_the_loss_of_each_candidate(tiny, rng):
    batch, vectors = make_batch(tiny, rng)
    titles = [[title(rng), title(rng)] for _ in range(len(batch))]
    scores, _ = score_titles(tiny, batch, vectors, titles, **BUCKETS)
    for candidate in range(2):
        losses, _ = title_loss(tiny, batch, vectors, [some[candidate] for some in titles], **BUCKETS)
        np.testing.assert_allclose([-some[candidate] for some in scores], losses.detach(), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_prompt_is_run_once_for_all_its_candidates(tiny, rng, monkeypatch):
    """Prompts that list 20 candidate titles, as generation prompts do: a quarter of the tokens at most."""
    titles = [[title(rng, 4, 12) for _ in range(20)] for _ in range(6)]
    lengths = [40 + sum(map(len, candidates)) for candidates in titles]
    batch, vectors = make_batch(tiny, rng, lengths)
    calls = spy_on(monkeypatch)
    score_titles(tiny, batch, vectors, titles, micro_batch_tokens=2000, call_cost=32)
    computed = sum(rows * width for rows, width in calls)
    whole = sum(n + len(candidate) - 1 for n, some in zip(lengths, titles, strict=True) for candidate in some)
    assert max(rows * width for rows, width in calls) <= 2000
    assert computed < 0.15 * whole


# ---- All of them


def test_results_do_not_depend_on_the_attention_kernel(load, rng):
    batch, vectors = make_batch(load("llama"), rng)
    titles = make_titles(rng, len(batch))
    (some, first, scores), (others, second, expected) = (
        (
            title_loss(backbone, batch, vectors, [[5, 6, STOP]] * 6, **BUCKETS)[0],
            greedy(backbone, batch, vectors, 6, [], **ALL_AT_ONCE),
            np.concatenate(score_titles(backbone, batch, vectors, titles, **BUCKETS)[0]),
        )
        for backbone in (load("llama"), load("llama", attn_implementation="eager"))
    )
    torch.testing.assert_close(some, others, atol=1e-4, rtol=1e-4)
    assert first == second
    np.testing.assert_allclose(scores, expected, atol=1e-4, rtol=1e-4)


def test_nothing_asked_is_nothing_answered(tiny, rng):
    batch, vectors = make_batch(tiny, rng, ())
    losses, counts = title_loss(tiny, batch, vectors, [], **BUCKETS)
    assert losses.shape == counts.shape == (0,)
    assert greedy(tiny, batch, vectors, 3, [STOP], **BUCKETS) == []
    assert score_titles(tiny, batch, vectors, [], **BUCKETS) == ([], [])


def test_mistakes_are_told(tiny, load, rng, monkeypatch):
    batch, vectors = make_batch(tiny, rng)
    right = [[5, STOP]] * 6
    with pytest.raises(ValueError, match="6 prompts need as many targets"):
        title_loss(tiny, batch, vectors, right[1:], **BUCKETS)
    with pytest.raises(ValueError, match="a token or more"):
        title_loss(tiny, batch, vectors, [*right[1:], []], **BUCKETS)
    with pytest.raises(ValueError, match="a token or more"):
        score_titles(tiny, batch, vectors, [[[]]] * 6, **BUCKETS)
    with pytest.raises(ValueError, match="6 prompts need as many tries"):
        greedy(tiny, batch, vectors, 3, [STOP], **BUCKETS, tries=[None])
    for token in (-1, VOCABULARY):
        with pytest.raises(ValueError, match="outside the LLM's vocabulary"):
            title_loss(tiny, batch, vectors, [*right[1:], [token]], **BUCKETS)
        with pytest.raises(ValueError, match="outside the LLM's vocabulary"):
            score_titles(tiny, batch, vectors, [[[token]]] * 6, **BUCKETS)
        with pytest.raises(ValueError, match="outside the LLM's vocabulary"):
            greedy(tiny, batch, vectors, 3, [STOP], **BUCKETS, tries=[TitleTrie([[5, token]], STOP)] * 6)
    with pytest.raises(ValueError, match="vectors must be"):
        title_loss(tiny, batch, vectors[1:], right, **BUCKETS)
    backbone = load("llama")
    batch, vectors = make_batch(backbone, rng, (60,))
    with pytest.raises(ValueError, match="65 tokens, and the LLM 64 positions"):
        greedy(backbone, batch, vectors, 6, [STOP], **BUCKETS)
    greedy(backbone, batch, vectors, 5, [STOP], **BUCKETS)
    monkeypatch.setattr(backbone, "causal", False)
    for use in (
        lambda: title_loss(backbone, batch, vectors, [[5]], **BUCKETS),
        lambda: greedy(backbone, batch, vectors, 5, [STOP], **BUCKETS),
        lambda: score_titles(backbone, batch, vectors, [[[5]]], **BUCKETS),
    ):
        with pytest.raises(UserError, match="is bidirectional.*cannot generate titles"):
            use()
    monkeypatch.setattr(backbone, "causal", True)
    monkeypatch.setattr(backbone, "supports_masks", False)
    with pytest.raises(UserError, match="use sdpa"):
        greedy(backbone, batch, vectors, 5, [STOP], **BUCKETS)
    with pytest.raises(UserError, match="use sdpa"):
        score_titles(backbone, batch, vectors, [[[5]]], **BUCKETS)
