"""Retrieval models with a teacher: what they encode and how often, and the losses of LLM-SRec and LLM-STAR."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction

from recbole_llm.evaluation.candidates import draw_candidates
from recbole_llm.evaluation.evaluate import evaluate_ranking
from recbole_llm.loss.distillation import distillation_loss
from recbole_llm.loss.retrieval import retrieval_loss
from recbole_llm.loss.uniformity import uniformity_loss

MODELS = ["LLMSRec", "LLMSTAR"]
every_model = pytest.mark.parametrize("name", MODELS)


def rows_of(split, count=6):
    return split.inter_feat[torch.arange(count)]


@every_model
def test_teacher_has_no_dropout_noise_in_training(make_model, name):
    _, model, splits = make_model(name)
    model.train()
    rows = rows_of(splits["train"])
    assert torch.equal(model.teacher.represent(rows), model.teacher.represent(rows))


@every_model
def test_trained_parameters_hold_no_llm_weight(make_model, name):
    _, model, _ = make_model(name)
    assert not any("causal_lm" in key or key.startswith("teacher.") for key in model.trained_parameters())
    assert {"user_out", "item_out"} <= set(model.trained_parameters())


@every_model
def test_predict_encodes_each_history_and_item_once(make_model, name):
    _, model, splits = make_model(name)
    model.eval()
    rows = rows_of(splits["test"], 4)
    repeated = rows.repeat_interleave(10)
    repeated.update(Interaction({model.ITEM_ID: torch.arange(1, 11).repeat(4)}))
    before = model.encoder.counts.prompts
    model.predict(repeated)
    assert model.encoder.counts.prompts - before == 4 + 10
    model.predict(repeated)
    assert model.encoder.counts.prompts - before == 4 + 10 + 4, "items come from the table"


@every_model
def test_no_future_item_in_any_prompt(make_model, name):
    """A prompt shows items before the target only; the target's title and vector appear nowhere unless it was bought before."""
    _, model, splits = make_model(name)
    for split in splits.values():
        rows = split.inter_feat
        histories = model.histories(rows)
        batch = model.prompts.user_prompts(histories)
        items = rows[model.ITEM_SEQ].numpy()
        lengths = rows[model.ITEM_SEQ_LEN].numpy()
        start = 0
        for row in range(len(rows)):
            shown = histories.items[row, : histories.lengths[row]]
            expected = items[row, : lengths[row]][-len(shown) :]
            assert (shown == expected).all()
            assert (batch.slot_items[start : start + len(shown)] == expected).all()
            start += len(shown)
        assert start == len(batch.slot_items)


@every_model
def test_training_candidates_are_the_target_and_strangers(make_model, name):
    _, model, splits = make_model(name)
    rows = splits["train"].inter_feat
    candidates = model.training_candidates(rows)
    assert (candidates[:, 0] == rows[model.ITEM_ID].numpy()).all()
    for user, row in zip(rows[model.USER_ID].tolist(), candidates, strict=True):
        assert len(set(row)) == len(row)
        assert not set(row[1:]) & set(model.user_items[user].tolist())
    assert candidates.min() > 0


def test_llmsrec_loss_is_its_three_parts(make_model):
    _, model, splits = make_model("LLMSRec", distill_weight=2.0, uniform_weight=3.0)
    rows = rows_of(splits["train"])
    model.seed_step(0)
    parts = model.calculate_loss(rows)
    model.seed_step(0)
    candidates = model.training_candidates(rows)
    users = model.represent_users(rows)
    scores = torch.stack([users[row] @ model.represent_items(candidates[row]).T for row in range(len(rows))])
    teacher = model.teacher_head(model.teacher.represent(rows))
    expected = (
        retrieval_loss(scores),
        2.0 * distillation_loss(users, teacher),
        3.0 * (uniformity_loss(users) + uniformity_loss(teacher)),
    )
    for part, value in zip(parts, expected, strict=True):
        assert part.item() == pytest.approx(value.item(), rel=1e-4)


def test_llmstar_ablations(make_model):
    _, model, splits = make_model("LLMSTAR")
    rows = rows_of(splits["train"])

    settings = model.settings

    def parts(**changed):
        model.settings = replace(settings, **changed)
        model.seed_step(1)
        return [part.item() for part in model.calculate_loss(rows)]

    full = parts()
    assert parts(beta=0.8)[1] == pytest.approx(2 * full[1], rel=1e-5)
    without = parts(beta=0)
    assert len(without) == 1 and without[0] == pytest.approx(full[0], rel=1e-4)
    unweighted = parts(confidence="none")
    assert unweighted[0] == pytest.approx(full[0], rel=1e-5) and unweighted[1] > full[1]
    assert parts(temperature=0.5)[1] != full[1] and parts(similarity="dot")[1] != full[1]


def test_llmstar_negative_gradients(make_model):
    """Without negative_grad the loss is the same and its gradient is not."""
    _, model, splits = make_model("LLMSTAR")
    rows = rows_of(splits["train"])
    gradients, losses = [], []
    for flows in (True, False):
        model.settings = replace(model.settings, negative_grad=flows)
        model.zero_grad()
        model.seed_step(1)
        loss = model.calculate_loss(rows)[1]
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.user_out.grad.clone())
    assert losses[0] == pytest.approx(losses[1])
    assert not torch.allclose(gradients[0], gradients[1])


def test_llmstar_loss_is_that_of_separate_prompts(make_model):
    """Shared prefixes change the cost of L_seq, not its value or gradient."""
    _, model, splits = make_model("LLMSTAR")
    rows = rows_of(splits["train"])
    results = []
    for shares in (True, False):
        model.encoder.settings.share_prefix = model.encoder.settings.share_header = shares
        model.zero_grad()
        model.seed_step(2)
        losses = model.calculate_loss(rows)
        sum(losses).backward()
        results.append(([part.item() for part in losses], model.item_projection[0].weight.grad.clone()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("teacher", [
    "SASRec", "GRU4Rec", pytest.param("Caser", marks=pytest.mark.slow), pytest.param("BERT4Rec", marks=pytest.mark.slow),
])  # fmt: skip
def test_teachers(make_model, teacher):
    """A teacher's user representation times its item vectors is the stock model's own score."""
    settings = {"epochs": 1, "train_batch_size": 256}
    _, model, splits = make_model("LLMSRec", teacher=teacher, teacher_settings=settings)
    rows = rows_of(splits["test"])
    users = model.teacher.represent(rows)
    stock = model.teacher.model.full_sort_predict(rows)
    expected = users @ model.teacher.item_vectors.T
    if teacher == "BERT4Rec":
        expected = expected + model.teacher.model.output_bias
    torch.testing.assert_close(expected, stock, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(sum(model.calculate_loss(rows_of(splits["train"]))))


@pytest.mark.parametrize("teacher", ["Caser", "SASRec"])
@pytest.mark.parametrize("length", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_a_teacher_may_read_another_number_of_items(make_model, teacher, length):
    """Its user representation is that of its own rows, which hold its number of items."""
    settings = {"epochs": 1, "train_batch_size": 256, "MAX_ITEM_LIST_LENGTH": length}
    _, model, splits = make_model("LLMSRec", teacher=teacher, teacher_settings=settings)
    own = model.teacher_run.splits
    assert own["test"].inter_feat["item_id_list"].shape[1] == length != splits["test"].inter_feat["item_id_list"].shape[1]
    rows = splits["test"].inter_feat[torch.arange(8)]
    lengths = rows["item_length"].clone()
    torch.testing.assert_close(model.teacher.represent(rows), model.teacher.represent(own["test"].inter_feat[torch.arange(8)]))
    assert torch.equal(rows["item_length"], lengths) and lengths.max() > 3
    assert torch.isfinite(sum(model.calculate_loss(rows_of(splits["train"]))))
    _, again, _ = make_model("LLMSRec", teacher=teacher, teacher_settings=settings)
    assert again.teacher_run.loaded


def test_teacher_is_trained_once_and_found_again(make_model, monkeypatch):
    from recbole_llm.teacher import stock

    _, first, _ = make_model("LLMSRec")
    assert not first.teacher_run.loaded
    monkeypatch.setattr(stock, "get_trainer", lambda *_: pytest.fail("it was trained already"))
    _, second, _ = make_model("LLMSTAR")
    assert second.teacher_run.loaded
    assert torch.equal(first.teacher.item_vectors, second.teacher.item_vectors)


def test_whether_the_teacher_was_trained_or_found_changes_no_weight(make_model):
    _, first, _ = make_model("LLMSRec")
    _, second, _ = make_model("LLMSRec")
    for key, parameter in first.trained_parameters().items():
        assert torch.equal(parameter, second.trained_parameters()[key]), key


def test_item_table_forgets_when_weights_change(make_model):
    _, model, _ = make_model("LLMSRec")
    model.eval()
    items = np.array([1, 2, 2, 3])
    before = model.item_table.rows(items)
    assert model.item_table.encoded == 3 and before.shape == (4, 8)
    model.item_table.rows(np.array([2, 4]))
    assert model.item_table.encoded == 4
    for change in ("step", "load"):
        if change == "step":
            optimizer = torch.optim.Adam(model.trained_parameters().values(), lr=0.1)
            model.represent_items(items).sum().backward()
            optimizer.step()
        else:
            model.load_state_dict({key: value + 0.1 for key, value in model.state_dict().items()})
        after = model.item_table.rows(items)
        fresh = model.represent_items(items).detach()
        torch.testing.assert_close(after, fresh, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(before, after)
        before = after


@every_model
def test_evaluation_encodes_each_history_once_and_candidates_only(make_model, name):
    """Nothing is encoded twice, and no item that is nobody's candidate."""
    config, model, splits = make_model(name, eval_args={"mode": "uni2"})
    split, rows = splits["test"], np.arange(5)
    candidates = np.unique(draw_candidates(split, 2, config["seed"], "test", rows=rows))
    assert len(candidates) < split.item_num - 1
    # Two users with the same history are one prompt.
    for field in (model.ITEM_SEQ, model.ITEM_SEQ_LEN, model.time_list_field):
        split.inter_feat[field][1] = split.inter_feat[field][0]
    asked = []
    encode = model.prompts.item_prompts
    model.prompts.item_prompts = lambda items: asked.append(items) or encode(items)
    evaluate_ranking(model.score, split, config, "test", rows=rows, eval_batch_rows=2)
    assert np.sort(np.concatenate(asked)).tolist() == candidates.tolist()
    assert model.encoder.counts.prompts == 4 + len(candidates)
    evaluate_ranking(model.score, split, config, "test", rows=rows, eval_batch_rows=2)
    assert model.encoder.counts.prompts == 4 + len(candidates) + 4, "the item table is kept while no weight changes"
