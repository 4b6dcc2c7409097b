"""Titles that two items share, titles longer than the limit, and prompts as long as the LLM's context."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from recbole_llm.data.prepare import generate_chain
from recbole_llm.evaluation.candidates import draw_candidates
from recbole_llm.evaluation.ranking import rank_of_target

BY_GENERATION = {"recommend_by": "generation", "protocol": "generation", "train_candidates": 5, "lora_dropout": 0.0}
LONG = " ".join(f"word{number}" for number in range(400))  # far more than 400 tokens of any tokenizer


@pytest.fixture(scope="module")
def chain_data(tmp_path_factory):
    """The chain, in which items 1 and 2 have one title and item 3 a very long one."""
    folder = tmp_path_factory.mktemp("titles")
    target = generate_chain(folder, "chain", users=30, items=30, seed=1, noise=0.1, lengths=(8, 12))
    path = target / "chain.item"
    lines = path.read_text().splitlines()
    titles = {"1": "The Same Title", "2": "The Same Title", "3": LONG}
    rows = [line.split("\t") for line in lines[1:]]
    path.write_text("\n".join([lines[0], *(f"{item}\t{titles.get(item, title)}" for item, title in rows)]) + "\n")
    return folder


def ids(splits, *tokens):
    return [splits["test"].token2id("item_id", token) for token in tokens]


def question(model, splits, rows=1):
    return model.history_items(splits["test"].inter_feat[torch.arange(rows)])


def answers(*said):
    """In place of the LLM's own answers."""
    return lambda backbone, batch, vectors, *rest, **options: [list(said[row]) for row in range(len(batch))]


def halves(scores):
    """How often the target, column 0, comes first over many draws of ties."""
    return (rank_of_target(scores[:1].expand(2000, -1), seed=0) == 1).mean()


@pytest.mark.parametrize("decode", ["greedy", "constrained", "likelihood"])
def test_a_shared_title_counts_in_half_of_the_cases(make_model, monkeypatch, decode):
    _, model, splits = make_model("TALLRec", **BY_GENERATION, decode=decode)
    model.eval()
    one, other, *rest = ids(splits, "1", "2", "7", "8", "9", "10", "11")
    candidates = np.array([[one, *rest[:2], other, *rest[2:]]])
    if decode != "likelihood":
        said = model.form.prompts.answers(np.array([other]))[0][:-1]
        monkeypatch.setattr("recbole_llm.recommender.generation.greedy", answers(said))
    scores = model.form.generator.score(*question(model, splits), candidates, model.vectors)
    assert scores[0, 0] == scores[0, 3], "exactly: a tie must not be decided by rounding"
    if decode == "likelihood":  # raise both to the top
        scores += torch.where(scores == scores[0, 0], 100.0, 0.0)
    assert 0.45 < halves(scores) < 0.55
    if decode != "likelihood":
        assert scores.tolist() == [[1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]]


def test_the_trie_holds_a_shared_title_once(make_model):
    """Constrained answers among candidates of one title are that title, and every candidate of it is hit."""
    _, model, splits = make_model("TALLRec", **BY_GENERATION, decode="constrained")
    model.eval()
    scores = model.form.generator.score(*question(model, splits), np.array([ids(splits, "1", "2")]), model.vectors)
    assert scores.tolist() == [[1.0, 1.0]] and model.answer_metrics() == {"validratio": 1.0}


@pytest.mark.parametrize(
    "decode", ["greedy", *(pytest.param(name, marks=pytest.mark.slow) for name in ("constrained", "likelihood"))]
)
def test_an_answer_by_a_title_that_was_cut_is_still_that_title(make_model, decode):
    """An LLM taught the cut title answers with it, and is understood."""
    _, model, splits = make_model("TALLRec", **BY_GENERATION, decode=decode, max_item_tokens=30, tuning="full")
    generator = model.form.generator
    candidates = np.array([ids(splits, "3", "7", "8", "1", "9")])
    answer = generator.prompts.answers(candidates[0, :1])[0]
    assert len(answer) == 30 + 4  # space, quotation marks, end
    history, lengths = question(model, splits)
    optimizer = torch.optim.Adam(model.trained_parameters().values(), lr=3e-3)
    with pytest.MonkeyPatch.context() as patch:
        # Training lists the candidates in the order of the evaluation.
        patch.setattr("recbole_llm.recommender.generation.shuffled_columns", lambda *_: np.arange(5)[None])
        model.rng = SameOrder()
        for _ in range(200):
            optimizer.zero_grad()
            loss = generator.loss(history, lengths, candidates, model.vectors, model.rng)
            if loss < 0.02:
                break
            loss.backward()
            optimizer.step()
        assert loss < 0.02
        model.eval()
        scores = generator.score(history, lengths, candidates, model.vectors)
    assert scores[0].argmax() == 0 and torch.isfinite(scores).all()
    assert generator.metrics() == ({} if decode == "likelihood" else {"validratio": 1.0})


class SameOrder:
    """Draws the identity and the first template."""

    def permuted(self, columns, axis):
        return columns

    def integers(self, high, size):
        return np.zeros(size, dtype=np.int64)


def test_constrained_answers_stay_valid_among_cut_titles(make_model):
    config, model, splits = make_model("TALLRec", **BY_GENERATION, decode="constrained", max_item_tokens=256)
    model.eval()
    drawn = draw_candidates(splits["test"], 4, config["seed"], "test", rows=np.arange(12))
    drawn[:, 1:2] = ids(splits, "3")
    model.form.generator.score(*question(model, splits, 12), drawn, model.vectors)
    assert model.answer_metrics() == {"validratio": 1.0}


@pytest.mark.parametrize("decode", [pytest.param("greedy", marks=pytest.mark.slow), "constrained", "likelihood"])
def test_prompts_that_fill_the_context_are_answered(make_model, decode):
    """Rows that fill the LLM's context to the last token beside rows with longer candidates, each as if it were alone."""
    _, model, splits = make_model("TALLRec", **BY_GENERATION, decode=decode, max_item_tokens=60)
    model.eval()
    prompts, tokenizer = model.form.prompts, model.backbone.tokenizer
    long, *short = ids(splits, "3", *map(str, range(4, 12)))
    history, lengths = np.array([[*short, *short[:2]], short[:2] * 5]), np.array([10, 10])
    candidates = np.array([short[:3], [short[0], long, short[1]]])
    answer = np.array([max(map(len, prompts.answers(row))) for row in candidates])
    whole = int(prompts.prompts(history, lengths, candidates).lengths[0])
    filled = 0
    for limit in range(whole - 40, whole + 20):
        model.backbone.context_length = limit
        prompts.settings = replace(prompts.settings, max_prompt_tokens=limit, context_length=limit)
        batch = prompts.prompts(history, lengths, candidates)
        for row in range(2):
            text = tokenizer.decode(batch.tokens[batch.offsets[row] : batch.offsets[row + 1]])
            shown, listed = text.split("title candidates are")
            titles = [tokenizer.decode(title[:-1]) for title in prompts.answers(candidates[row])]
            assert all(title in listed for title in titles), "candidates stay whole"
            newest = tokenizer.decode(prompts.answers(history[row, -1:])[0][:-1])
            assert f"{newest} in the previous" in shown, "of the history the latest stay"
        if batch.lengths[0] + answer[0] + 3 < limit:  # a comma behind each list and the answer is counted and not there
            continue
        filled += 1
        score = model.form.generator.score
        together = score(history, lengths, candidates, model.vectors)
        alone = [score(history[[row]], lengths[[row]], candidates[[row]], model.vectors) for row in range(2)]
        torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4, equal_nan=True)
    assert filled and answer[1] > answer[0] + 30


def test_a_user_prompt_longer_than_the_context_loses_its_oldest_items(make_model):
    _, model, splits = make_model("TALLRec", max_prompt_tokens=None, max_item_tokens=400)
    model.eval()
    limit = model.backbone.context_length
    rows = splits["test"].inter_feat[torch.arange(2)]
    rows["item_id_list"][0, :10] = torch.tensor(ids(splits, "3") * 10)
    rows["item_length"][:] = 10
    histories = model.histories(rows)
    batch = model.prompts.user_prompts(histories)
    assert 1 < histories.lengths[0] < 10 and histories.lengths[1] == 10
    assert limit - 450 < batch.lengths[0] <= limit
    assert torch.isfinite(model.represent_users(rows)).all()
