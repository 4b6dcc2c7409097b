"""``train_targets: window`` and ``negatives: in_batch``, for every model by retrieval."""

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.utils import get_model, get_trainer, init_seed

from recbole_llm.config.schema import forms_of
from recbole_llm.config.settings import make_config, settings_for
from recbole_llm.data.loaders import dataloaders
from recbole_llm.data.shared import SharedData
from recbole_llm.data.windows import SHOWN, TrainingWindows
from recbole_llm.errors import UserError
from recbole_llm.preflight import check_negatives
from recbole_llm.prompt.batch import PromptBatch
from recbole_llm.recommender.candidates import SharedCandidates
from recbole_llm.registry import MODELS

BY_RETRIEVAL = [name for name in MODELS if "retrieval" in forms_of(name) and name != "ZeroShot"]  # which is not trained
WINDOW = {"train_targets": "window", "negatives": "in_batch", "train_negatives": 5, "history_length": 4}


@pytest.fixture
def make(contract_settings, sentence_encoder):
    """A function (model name, **settings) -> (config, model, splits)."""

    def build(name, **settings):
        settings = {**contract_settings, "valid_metric": "NDCG@3", "eval_args": {"mode": "uni4"}, **WINDOW, **settings}
        settings |= {"recommend_by": "retrieval"} if name == "RSLLM" else {}
        config = make_config(name, "chain", config_dict=settings_for(name, settings, list(MODELS)))
        data = SharedData()
        splits, train = data.splits(config), data.train(config)
        init_seed(config["seed"], True)
        return config, get_model(name)(config, train), splits

    return build


def window_rows(model, length=4):
    windows = TrainingWindows(model._dataset, length)
    windows.draw(np.random.default_rng(0))
    return windows.rows(np.arange(3))


def test_seven_models_are_asked_by_retrieval():
    assert {"LLMSRec", "LLMSTAR", "TALLRec", "LLaRA", "CoLLM", "ALLMRec", "RSLLM"} <= set(BY_RETRIEVAL)


@pytest.mark.parametrize("name", BY_RETRIEVAL)
@pytest.mark.parametrize("negatives", ["in_batch", "sampled"])
def test_the_loss_of_windows_is_that_of_separate_prompts(make, name, negatives):
    _, model, _ = make(name, negatives=negatives, train_negatives=3, lora_dropout=0.0)
    rows, results = window_rows(model), []
    shares_beginnings = not model.has_user_vector
    for shares in (True, False):
        model.encoder.settings.share_prefix = shares
        model.train()
        model.zero_grad()
        model.seed_step(2)
        before = model.encoder.counts.computed
        losses = model.calculate_loss(rows)
        sum(losses).backward()
        gradients = {name: p.grad.clone() for name, p in model.trained_parameters().items() if p.grad is not None}
        results.append(([part.item() for part in losses], gradients, model.encoder.counts.computed - before))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    # LLM-Rec reads at a token of the LLM's own.
    assert ("user_out" in results[0][1]) is (name != "LLMRec") and results[0][1].keys() == results[1][1].keys()
    for key, expected in results[1][1].items():
        torch.testing.assert_close(results[0][1][key], expected, rtol=2e-3, atol=2e-5, msg=key)
    assert (results[0][2] < results[1][2]) is shares_beginnings


def test_a_prompt_of_a_window_is_the_published_prompt_of_its_history(make):
    """As if the training row had been cut: items, ranks and dates."""
    _, model, _ = make("LLMSRec")
    rows = window_rows(model)
    batch = model.prompts.user_prompts(model.histories(rows))
    for n in range(len(rows)):
        length, shown = int(rows[model.ITEM_SEQ_LEN][n]), int(rows[SHOWN][n])
        cut = Interaction({name: value[n : n + 1].clone() for name, value in rows.interaction.items() if name != SHOWN})
        for name in (model.ITEM_SEQ, model.time_list_field):
            latest = cut[name][0, length - shown : length].clone()
            cut[name][:] = 0
            cut[name][0, :shown] = latest
        cut[model.ITEM_SEQ_LEN][:] = shown
        alone = model.prompts.user_prompts(model.histories(cut))
        assert (batch.tokens[batch.offsets[n] : batch.offsets[n + 1]] == alone.tokens).all()
    assert rows[SHOWN].tolist().count(1) == 3 and max(rows[SHOWN].tolist()) == 4


@pytest.mark.parametrize("teacher", ["SASRec", "GRU4Rec", "BERT4Rec"])
def test_the_teachers_states_of_a_window(make, teacher, monkeypatch):
    """One pass for each window by a causal teacher, with the states that each row alone would have."""
    _, model, _ = make("LLMSRec", teacher=teacher, teacher_settings={"epochs": 1, "train_batch_size": 64})
    rows, stock, read = window_rows(model), model.teacher.model, []
    expected, forward = model.teacher.represent(rows), stock.forward
    monkeypatch.setattr(stock, "forward", lambda items, *rest: (read.append(len(items)), forward(items, *rest))[1])
    torch.testing.assert_close(model.teacher.represent_windows(rows, model.window_ends(rows)), expected, rtol=1e-4, atol=1e-5)
    assert read == [len(rows) if teacher == "BERT4Rec" else 3]


def test_a_teacher_that_reads_less_than_a_window(make):
    """Earlier positions lie outside its pass."""
    settings = {"epochs": 1, "hidden_size": 8, "inner_size": 8, "n_layers": 1, "MAX_ITEM_LIST_LENGTH": 2}
    _, model, _ = make("LLMSRec", teacher_settings=settings)
    rows = window_rows(model)
    found = model.teacher.represent_windows(rows, model.window_ends(rows))
    torch.testing.assert_close(found, model.teacher.represent(rows))


def test_perturbed_histories_are_those_of_the_windows_ends(make, monkeypatch):
    _, model, _ = make("LLMSTAR")
    rows, batches, init = window_rows(model), [], PromptBatch.__init__
    monkeypatch.setattr(PromptBatch, "__init__", lambda self, **values: (init(self, **values), batches.append(self))[0])
    model.calculate_loss(rows)
    users = next(batch for batch in batches if len(batch) > len(rows) and (batch.parent >= 0).any())
    ends = np.unique(model.window_ends(rows))
    assert set(users.parent[len(rows) :]) == set(ends) and len(ends) == 3


def test_a_step_encodes_each_candidate_once(make, monkeypatch):
    _, model, _ = make("LLMSRec")
    rows, asked, represent = window_rows(model), [], type(model).represent_items
    monkeypatch.setattr(type(model), "represent_items", lambda self, items: (asked.append(items), represent(self, items))[1])
    model.calculate_loss(rows)
    targets = set(rows[model.POS_ITEM_ID].tolist())
    assert len(asked) == 1 and len(asked[0]) == len(set(asked[0])) <= len(targets) + 5 and targets <= set(asked[0])


def test_candidates_of_rows_and_of_windows_are_as_likely_as_they_are_drawn(make):
    """The expected counts of an epoch: a row's target once, a window's by how likely the row is in it."""
    for targets in ("last", "window", "all"):
        _, model, _ = make("LLMSRec", train_targets=targets)
        draw, rows = model._shared_draw, model._dataset.inter_feat
        expected = np.bincount(rows[model.POS_ITEM_ID].numpy(), minlength=model.n_items).astype(float)
        if targets == "window":
            expected, rng, windows = np.zeros(model.n_items), np.random.default_rng(0), TrainingWindows(model._dataset, 4)
            for _ in range(2000):
                windows.draw(rng)
                items = windows.rows(np.arange(len(rows)))[model.POS_ITEM_ID].numpy()
                expected += np.bincount(items, minlength=model.n_items) / 2000
        np.testing.assert_allclose(draw.counts, expected, atol=0.1)
        assert draw.share == 1 / len(rows)
        model.seed_step(0)
        assert isinstance(model.draw_candidates(rows[torch.arange(3)]), SharedCandidates)


def train(make, folder, stop=None, **settings):
    """A trainer that has trained on windows, and been stopped after some steps."""
    config, model, splits = make("LLMSTAR", train_batch_size=5, **settings)
    trainer = get_trainer(config["MODEL_TYPE"], "LLMSTAR")(config, model)
    trainer.saved_model_file = str(folder)
    if trainer.can_resume(folder):
        trainer.resume_checkpoint(folder)
    data, step, seen = dataloaders(config, model._dataset, splits), type(trainer)._train_step, []

    def one_step(self, train_data, rows, *rest):
        if len(seen) == stop:
            raise KeyboardInterrupt
        seen.append(rows[model.POS_ITEM_ID].tolist())
        return step(self, train_data, rows, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(trainer), "_train_step", one_step)
        try:
            trainer.fit(data[0], data[1], verbose=False)
        except KeyboardInterrupt:
            assert stop is not None
    return trainer, seen


def test_an_interrupted_training_goes_on_with_the_same_windows_to_the_same_weights(make, tmp_path):
    whole, seen = train(make, tmp_path / "whole")
    _, first = train(make, tmp_path / "cut", stop=4)
    again, rest = train(make, tmp_path / "cut")
    assert len(seen) == 6 and first + rest[-2:] == seen and sorted(seen[:3]) != sorted(seen[3:])
    for key, parameter in again.model.trained_parameters().items():
        assert torch.equal(parameter, whole.model.trained_parameters()[key]), key


@pytest.mark.parametrize(
    ("model", "settings", "sentence"),
    [
        ("LLaRA", {"recommend_by": "generation", "protocol": "generation", "valid_metric": "Hit@1"}, "is asked by generation"),
        ("ST2SI", {"valid_metric": "NDCG@5"}, "ST2SI is asked in a way of its own; take last or all"),
    ],
)
def test_windows_are_for_retrieval(tiny_settings, model, settings, sentence):
    given = {**tiny_settings, "train_targets": "window", **settings}
    with pytest.raises(UserError, match=sentence):
        make_config(model, "chain", config_dict=settings_for(model, given, list(MODELS)))


def test_random_items_are_no_more_than_there_are(make):
    config, model, _ = make("LLMSRec", train_negatives=15)
    check_negatives(config, model._dataset)
    config["train_negatives"] = 16
    with pytest.raises(UserError, match="set it to 15 or lower"):
        check_negatives(config, model._dataset)


def test_what_windows_bring_with_them(tiny_settings):
    """Settings under which they learn; what is set by name holds, and the published recipe is as it was."""
    named = "negatives", "train_negatives", "standardize_states", "learning_rate", "learning_rate_schedule"
    given = {key: value for key, value in tiny_settings.items() if key != "learning_rate"}

    def found(**settings):
        config = make_config("LLMSRec", "chain", config_dict={**given, **settings})
        return [config[name] for name in named]

    assert found() == ["sampled", 3, False, 1e-4, "step"]
    assert found(train_targets="window") == ["in_batch", 100, True, 1e-3, "cosine"]
    assert found(train_targets="window", negatives="sampled", learning_rate=5e-4)[:4] == ["sampled", 100, True, 5e-4]


def test_random_items_that_nobody_asked_for_are_as_many_as_there_are(make, tiny_settings):
    given = settings_for("LLMSRec", {**tiny_settings, "train_targets": "window"}, list(MODELS))
    config = make_config("LLMSRec", "chain", config_dict=given)
    data = SharedData()
    train = data.train(config)
    check_negatives(config, train)
    model = get_model("LLMSRec")(config, train)
    model.seed_step(0)
    assert len(model.draw_candidates(window_rows(model, 10)).items) == 40 < config["train_negatives"]


def test_users_differ_from_the_first_step_on(make):
    """Hidden states at out tokens are nearly the same for all users; heads are not to see them so."""
    spread = {}
    for standardize in (False, True):
        _, model, _ = make("LLMSRec", standardize_states=standardize)
        model.train()
        users = torch.nn.functional.normalize(model.represent_users(window_rows(model)), dim=1)
        spread[standardize] = (users @ users.T).mean().item()
    assert spread[True] < 0.4 < 0.6 < spread[False]
