"""Models that are tuned by LoRA, and recommending by a title that the LLM writes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from recbole_llm import cli
from recbole_llm.errors import UserError
from recbole_llm.evaluation import draw_candidates, evaluate_ranking, rank_of_target, shuffled_columns

BY_TITLE = {"recommend_by": "generation", "protocol": "generation", "train_candidates": 5, "lora_dropout": 0.0}


def rows_of(split, count=4):
    return split.inter_feat[torch.arange(count)]


@pytest.mark.parametrize("form", ["retrieval", "generation"])
@pytest.mark.parametrize("name", ["TALLRec", "LLaRA"])
def test_lora_and_the_models_own_parts_are_trained_and_nothing_else(make_model, name, form):
    _, model, splits = make_model(name, recommend_by=form, train_candidates=5)
    model.train()
    model.progress = 1.0
    losses = model.calculate_loss(rows_of(splits["train"]))
    assert len(losses) == len(model.loss_names) == 1
    losses[0].backward()
    trained = model.trained_parameters()
    assert all(parameter.grad is not None for parameter in trained.values())
    kinds = {"lora" if "lora_" in key else key.split(".")[0] for key in trained}
    heads = {"item_head", "user_head", "user_out", "item_out"} if form == "retrieval" else set()
    projector = {"item_projection"} if name == "LLaRA" else set()
    assert kinds == {"lora"} | heads | projector
    assert (model.teacher is None) is (name == "TALLRec")


def test_tallrec_prompts_hold_no_vectors(make_model):
    _, model, splits = make_model("TALLRec")
    batch = model.prompts.user_prompts(model.histories(rows_of(splits["train"])))
    assert len(batch.slot_items) == 0 and batch.out_positions.shape[1] == 3


def test_title_loss_equals_that_of_the_plain_llm(make_model):
    """One prompt after the other, labels on the target's title and end token alone."""
    _, model, splits = make_model("TALLRec", **BY_TITLE)
    rows = rows_of(splits["train"])
    model.seed_step(3)
    loss = model.title_loss(rows)

    model.seed_step(3)
    candidates = model.training_candidates(rows, 4)
    order = model.rng.permuted(np.tile(np.arange(5), (4, 1)), axis=1)
    history, lengths = model.history_items(rows)
    batch = model.titles.prompts.prompts(history, lengths, np.take_along_axis(candidates, order, axis=1))
    answers = model.titles.prompts.answers(candidates[:, 0])
    total = count = 0
    for row, answer in enumerate(answers):
        prompt = batch.tokens[batch.offsets[row] : batch.offsets[row + 1]].tolist()
        logits = model.backbone.causal_lm(input_ids=torch.tensor([prompt + answer])).logits[0]
        total += functional.cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(answer), reduction="sum")
        count += len(answer)
        text = model.backbone.tokenizer.decode(prompt)
        assert all(f'"{model.titles.prompts and splits["train"].item_texts[item]}"' in text for item in candidates[row])
    torch.testing.assert_close(loss, total / count, atol=1e-4, rtol=1e-4)


def test_the_order_of_the_list_says_nothing_of_the_target():
    candidates = np.random.default_rng(0).permuted(np.tile(np.arange(1, 21), (2000, 1)), axis=1)
    candidates += 20 * np.arange(2000)[:, None]
    place = np.argsort(shuffled_columns(candidates, 7), axis=1)[:, 0]  # where the target, column 0, is listed
    counts = np.bincount(place, minlength=20)
    assert counts.min() > 60 and counts.max() < 145  # 100 expected
    mixed = candidates[:, ::-1]
    for one, other in ((candidates, mixed),):
        first = np.take_along_axis(one, shuffled_columns(one, 7), axis=1)
        assert (first == np.take_along_axis(other, shuffled_columns(other, 7), axis=1)).all()


def evaluate(model, splits, config, rows=12):
    model.eval()
    model.titles.reset()
    split = splits["test"]
    result = evaluate_ranking(model.score, split, config, "test", rows=np.arange(min(rows, len(split.inter_feat))))
    return result, model.titles.metrics()


def test_constrained_answers_are_candidates(make_model):
    config, model, splits = make_model("TALLRec", **BY_TITLE, decode="constrained")
    _, metrics = evaluate(model, splits, config)
    assert metrics == {"validratio": 1.0}


def test_free_answers_of_an_untrained_llm_are_invalid_and_miss(make_model):
    config, model, splits = make_model("TALLRec", **BY_TITLE)
    result, metrics = evaluate(model, splits, config)
    assert metrics["validratio"] < 0.5 and result.metrics["hit@1"] <= metrics["validratio"]


def test_likelihood_ranks_all_candidates(make_model):
    config, model, splits = make_model("TALLRec", **BY_TITLE, decode="likelihood")
    candidates = draw_candidates(splits["test"], 9, config["seed"], "test", rows=np.arange(3))
    scores = model.score(rows_of(splits["test"], 3), torch.from_numpy(candidates))
    assert scores.shape == (3, 10) and torch.isfinite(scores).all() and (scores < 0).all()
    mixed = model.score(rows_of(splits["test"], 3), torch.from_numpy(candidates[:, ::-1].copy()))
    torch.testing.assert_close(scores, mixed.flip(1))
    assert model.titles.metrics() == {}


def test_a_title_that_two_candidates_share_counts_by_a_draw(make_model):
    _, model, splits = make_model("TALLRec", **BY_TITLE)
    generator = model.titles
    generator.prompts._title[2] = generator.prompts._title[1]  # items 1 and 2 have one title
    history, lengths = model.history_items(rows_of(splits["test"], 1))
    said = generator.prompts.answers(np.array([1]))[0][:-1]
    generator_greedy = lambda *args, **kwargs: [said]  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recbole_llm.model.title_generation.greedy", generator_greedy)
        scores = generator.score(history, lengths, np.array([[1, 2, 3, 4]]), model.vectors)
    assert scores.tolist() == [[1.0, 1.0, 0.0, 0.0]]
    ranks = rank_of_target(scores.expand(1000, -1), seed=0)
    assert set(ranks.tolist()) == {1, 2} and 400 < (ranks == 1).sum() < 600


@pytest.mark.parametrize(
    ("answer", "title"), [(' "Heat"', "heat"), ("heat\nbecause", "heat"), ("  “Heat” ", "heat"), ("'Heat'", "heat"), ("", "")]
)
def test_answers_are_read_without_quotes_case_and_further_lines(make_model, answer, title):
    _, model, _ = make_model("ZeroShot", **{**BY_TITLE, "tuning": "frozen"})
    assert model.titles.read(model.backbone.tokenizer.encode(answer)) == title


def test_learning_to_answer(make_model):
    """A few steps on one batch make its targets the answers."""
    config, model, splits = make_model("TALLRec", **BY_TITLE, tuning="full")
    rows = rows_of(splits["train"], 2)
    optimizer = torch.optim.Adam(model.trained_parameters().values(), lr=3e-3)
    model.train()
    first = None
    for _ in range(60):
        model.seed_step(0)
        loss = model.title_loss(rows)
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 * first
    model.eval()
    model.seed_step(0)
    candidates = model.training_candidates(rows, 4)
    generator = model.titles
    with pytest.MonkeyPatch.context() as patch:  # in the order of the training prompt
        order = model.rng.permuted(np.tile(np.arange(5), (2, 1)), axis=1)
        patch.setattr("recbole_llm.model.title_generation.shuffled_columns", lambda *_: order)
        scores = generator.score(*model.history_items(rows), candidates, model.vectors)
    assert scores[:, 0].tolist() == [1.0, 1.0] and generator.metrics() == {"validratio": 1.0}


# LLaRA


def test_curriculum_follows_progress(make_model):
    _, model, splits = make_model("LLaRA", train_negatives=1)
    rows, shown = rows_of(splits["train"], 1), []
    plain = model.retrieval_loss
    model.retrieval_loss = lambda rows: shown.append(model.hybrid) or torch.zeros(())
    for progress in (0.0, 0.3, 1.0):
        model.progress = progress
        shown.clear()
        for step in range(400):
            model.seed_step(step)
            model.calculate_loss(rows)
        assert abs(np.mean(shown) - progress) < 0.08
    assert model.hybrid, "evaluation shows the vectors"
    model.retrieval_loss = plain
    model.progress = 0.0
    model.calculate_loss(rows)[0].backward()
    assert all(p.grad is None for p in model.item_projection.parameters()), "text-only batches see no vector"
    model.curriculum = "none"
    model.calculate_loss(rows)[0].backward()
    assert all(p.grad is not None for p in model.item_projection.parameters())


def test_zero_shot_needs_generation(make_model):
    with pytest.raises(UserError, match="recommend_by: generation"):
        make_model("ZeroShot", recommend_by="retrieval")


# The whole way


def test_a_comparison_by_titles(chain_data, capsys):
    command = (
        f"run --model=SASRec,TALLRec,LLaRA,ZeroShot --dataset=chain --data_path={chain_data} --recommend_by=generation "
        "--backbone=tiny --backbone_dtype=float32 --epochs=1 --eval_step=1 --SASRec.epochs=1 --SASRec.hidden_size=8 "
        "--SASRec.inner_size=16 --show_progress=False --use_gpu=False --train_candidates=5 --valid_users=10 "
        "--results_file=out.json --ZeroShot.tuning=frozen"
    )
    assert cli.main(command.split()) == 0
    out = capsys.readouterr().out
    assert "hit@1" in out and "validratio" in out
    rows = json.loads(Path("out.json").read_text())
    assert [row["model"] for row in rows] == ["SASRec", "TALLRec", "LLaRA", "ZeroShot"]
    assert [("validratio" in row["metrics"]) for row in rows] == [False, True, True, True]
    assert rows[3]["trained_parameters"] == 0
