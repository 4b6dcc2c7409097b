"""``residual_to_teacher``: cross-fitted teachers, their standardized scores, and the gate that validations choose."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction

from recbole_llm import compare
from recbole_llm.errors import UserError
from recbole_llm.evaluation.fusion import standardized
from recbole_llm.evaluation.stock_scores import stock_scores
from recbole_llm.recommender.residual import GATES, Residual, StandardScores, fitted_scale
from recbole_llm.teacher.folds import fold_of_users, without_fold

RESIDUAL = {"residual_to_teacher": True, "teacher_folds": 2, "train_targets": "window", "train_negatives": 5}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """One folder for the module's runs, so that each teacher is trained once."""
    return str(tmp_path_factory.mktemp("saved"))


def test_scores_are_standardized_over_the_catalogue():
    """Three items with the scores 1, 2, 6 under the state (1, 0): mean 3, deviation sqrt(14 / 3)."""
    vectors = torch.tensor([[9.0, 9.0], [1.0, 5.0], [2.0, 5.0], [6.0, 5.0]])
    standard, state = StandardScores(vectors), torch.tensor([[1.0, 0.0]])
    expected = (torch.tensor([[1.0, 2.0, 6.0]]) - 3) / math.sqrt(14 / 3)
    torch.testing.assert_close(standard(state, None)[:, 1:], expected)
    torch.testing.assert_close(standard(state, torch.tensor([3, 1])), expected[:, [2, 0]])
    torch.testing.assert_close(standard(state, torch.tensor([[3, 1]])), expected[:, [2, 0]])
    assert standard(torch.tensor([[0.0, 1.0]]), None).tolist() == [[0.0] * 4], "a state that tells no items apart"


def test_the_scale_is_that_of_the_likeliest_targets():
    """Of two items at 1 and -1 the target is the first in three of four rows: softmax gives it 3 / 4 at a = log(3) / 2."""
    scores = torch.tensor([[1.0, -1.0]] * 3 + [[-1.0, 1.0]])
    assert fitted_scale(scores) == pytest.approx(math.log(3) / 2, abs=1e-5)
    assert fitted_scale(-scores) == pytest.approx(0.1), "the order of a teacher that is worse than none is still to be seen"


def test_a_fold_leaves_out_its_users(make_model, kept):
    _, _, splits = make_model("LLMSRec", checkpoint_dir=kept)
    train = splits["train"]
    fold_of = fold_of_users(train.user_num, 3, 1)
    assert np.bincount(fold_of).tolist() == [21, 20, 20]
    users = [set(without_fold(splits, fold_of, fold)["train"].inter_feat[train.uid_field].tolist()) for fold in range(3)]
    for fold, kept in enumerate(users):
        assert kept and not kept & set(np.flatnonzero(fold_of == fold).tolist())
    assert set.union(*users) == set(train.inter_feat[train.uid_field].tolist())
    known = {without_fold(splits, fold_of, fold)["train"].column_fingerprint for fold in range(3)}
    assert len(known | {train.column_fingerprint}) == 4, "each is trained and kept for itself"


class Constant:
    """A teacher whose state is the same for every row."""

    def __init__(self, state):
        self.state = torch.tensor(state)
        self.item_vectors = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])

    def represent(self, rows):
        return self.state.expand(len(rows), -1)

    def represent_windows(self, rows, ends):
        return self.represent(rows)


def test_training_rows_are_scored_by_the_teacher_of_their_users_fold():
    folds = [Constant([1.0, 0.0]), Constant([0.0, 1.0])]
    residual = Residual(Constant([1.0, 1.0]), "user", folds, np.array([0, 1, 0]))
    rows, items = Interaction({"user": torch.tensor([2, 1, 2])}), np.array([1, 2])
    alone = [StandardScores(fold.item_vectors)(fold.state[None], torch.from_numpy(items))[0] for fold in folds]
    with torch.no_grad():
        residual.scale.fill_(2.0)
    found = residual.of_training(rows, np.arange(3), items)
    torch.testing.assert_close(found, 2 * torch.stack([alone[0], alone[1], alone[0]]))
    each = residual.of_training(rows, np.arange(3), np.array([[2, 1], [2, 1], [1, 2]]))
    torch.testing.assert_close(each, torch.stack([found[0].flip(0), found[1].flip(0), found[2]]))


def test_the_gate_is_chosen_and_of_equal_ones_the_lowest():
    residual, asked = Residual(Constant([1.0, 1.0]), "user", [], np.zeros(2)), []

    def evaluate():
        asked.append(round(residual.gate.item(), 1))
        return {"hit": min(asked[-1], 0.3)}

    assert residual.gate.item() == 0
    assert residual.choose_gate(evaluate, lambda a, b: a["hit"] > b["hit"]) == {"hit": 0.3}
    assert asked == list(GATES) and residual.gate.item() == pytest.approx(0.3)
    residual.choose_gate(lambda: {"hit": 1.0}, lambda a, b: a["hit"] > b["hit"])
    assert residual.gate.item() == 0


def test_behind_a_closed_gate_the_model_is_its_teacher(make_model, kept):
    _, model, splits = make_model("LLMSTAR", **RESIDUAL, checkpoint_dir=kept)
    rows = splits["test"].inter_feat[np.arange(8)]
    model.eval()
    expected = standardized(stock_scores(model.teacher.model)(rows, None)[:, 1:]).float()
    found = model.score(rows, None)
    assert found[:, 0].isneginf().all()
    torch.testing.assert_close(found[:, 1:] / model.residual.scale, expected, rtol=1e-3, atol=1e-4)
    candidates = torch.arange(1, 11).expand(8, -1)
    torch.testing.assert_close(model.score(rows, candidates), found[:, 1:11])
    rows.update(Interaction({model.ITEM_ID: torch.arange(1, 9)}))
    torch.testing.assert_close(model.predict(rows), found[torch.arange(8), torch.arange(1, 9)])
    with torch.no_grad():
        model.residual.gate.fill_(0.5)
    of_llm = model.item_table.scores(model.represent_distinct_users(rows), None)
    torch.testing.assert_close(model.score(rows, None)[:, 1:], (found + 0.5 * of_llm)[:, 1:])


def test_the_teachers_of_folds_are_trained_on_histories_as_long_as_a_teacher_reads(make_model, kept, monkeypatch):
    lengths = []

    def watched(splits, *fold):
        lengths.append(splits["train"].max_item_list_len)
        return without_fold(splits, *fold)

    monkeypatch.setattr("recbole_llm.teacher.folds.without_fold", watched)
    teacher = {"epochs": 1, "hidden_size": 8, "inner_size": 8, "n_layers": 1, "train_batch_size": 64, "MAX_ITEM_LIST_LENGTH": 3}
    make_model("LLMSRec", residual_to_teacher=True, teacher_folds=2, checkpoint_dir=kept, teacher_settings=teacher)
    assert lengths == [3, 3]


def test_the_loss_is_that_of_both_scores(make_model, kept):
    """Of candidates of a row's own: cross-entropy of the LLM's scores plus those of the users' teachers."""
    _, model, splits = make_model("LLMSRec", residual_to_teacher=True, teacher_folds=2, checkpoint_dir=kept)
    rows = model._dataset.inter_feat[np.arange(6)]
    with torch.no_grad():
        model.residual.scale.fill_(1.0)
    model.train()
    model.seed_step(0)
    losses = model.calculate_loss(rows)
    model.seed_step(0)
    candidates = model.training_candidates(rows)
    users, items = model.represent_users(rows), model.represent_candidates(candidates)
    offsets = model.residual.of_training(rows, np.arange(6), candidates)
    scores = torch.einsum("bd,bcd->bc", users, items) + offsets
    assert offsets.abs().max() > 0.1
    torch.testing.assert_close(losses[0], -torch.log_softmax(scores, dim=1)[:, 0].mean())
    sum(losses).backward()
    assert model.residual.gate.grad is None and model.residual.scale.grad is None


@pytest.mark.parametrize("negatives", ["sampled", "in_batch"])
def test_soft_targets_are_what_the_teacher_says_of_the_candidates(make_model, kept, negatives):
    """At a share of 1 the loss is least where the scores are the teacher's own, whatever the next item was."""
    _, model, _ = make_model("LLMSRec", soft_targets=1.0, negatives=negatives, train_negatives=5, checkpoint_dir=kept)
    rows = model._dataset.inter_feat[np.arange(6)]
    model.seed_step(0)
    drawn, states = model.draw_candidates(rows), model.teacher.represent(rows)
    model.represent_items = lambda items: model.teacher.item_vectors[items]
    model.represent_candidates = model.represent_items
    users = states.clone().requires_grad_()
    drawn.retrieval(model, users)[0].backward()
    assert users.grad.abs().max() < 1e-6
    others = (2 * states).requires_grad_()
    drawn.retrieval(model, others)[0].backward()
    assert others.grad.abs().max() > 1e-6
    assert replace(drawn, soft=None).retrieval(model, users)[0] != drawn.retrieval(model, users)[0]


@pytest.mark.slow
def test_a_run_is_never_worse_than_its_teacher_on_validation(tiny_settings):
    settings = {**tiny_settings, **RESIDUAL, "valid_users": None, "valid_items": None, "epochs": 1, "eval_step": 1.0}
    rows = compare(["SASRec", "LLMSTAR"], "chain", settings={**settings, "SASRec.epochs": 1})
    teacher, model = rows
    assert model["record"]["metrics"]["valid"]["hit@5"] >= teacher["record"]["metrics"]["valid"]["hit@5"]
    again = compare(["SASRec", "LLMSTAR"], "chain", settings={**settings, "SASRec.epochs": 1})
    assert again[1]["metrics"] == model["metrics"]


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("TALLRec", {}, "TALLRec has no teacher"),
        ("LLMSRec", {"teacher": "BERT4Rec"}, "SASRec or GRU4Rec or NARM, not BERT4Rec"),
        ("CoLLM", {"recommend_by": "generation"}, "CoLLM is asked by generation"),
        ("LLMSRec", {"eval_step": 0.0}, "set eval_step above 0"),
        ("LLMSRec", {"soft_targets": 0.5}, "take one"),
        ("TALLRec", {"residual_to_teacher": False, "soft_targets": 0.5}, "soft_targets: TALLRec has no teacher"),
    ],
)
def test_what_cannot_be_a_residual_is_refused(make_model, name, settings, told):
    with pytest.raises(UserError, match=told):
        make_model(name, **{"residual_to_teacher": True, **settings})
