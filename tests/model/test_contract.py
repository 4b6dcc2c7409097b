"""What every model does, in each of its forms: a new model is tested by its entry in the registry."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.quick_start import run_recbole
from recbole.utils import get_model, get_trainer, init_seed

from recbole_llm.config.schema import known_keys
from recbole_llm.config.settings import make_config, settings_for
from recbole_llm.data.loaders import dataloaders
from recbole_llm.data.shared import SharedData
from recbole_llm.errors import UserError
from recbole_llm.loading import load_data_and_model
from recbole_llm.prompt.batch import SLOT_TOKEN, PromptBatch
from recbole_llm.recommend import load
from recbole_llm.recommender.base import Recommender
from recbole_llm.registry import MODELS

# What a run in a form needs beside the settings that all share. None: a model that is asked in its own way alone.
RANKING = {"eval_args": {"mode": "uni4"}}
FORMS = {
    None: {"valid_metric": "NDCG@3"},
    "retrieval": {"valid_metric": "NDCG@3", **RANKING},
    "generation": {"protocol": "generation", "valid_metric": "Hit@1", "decode": "likelihood", **RANKING},
    "yes_no": {"protocol": "yes_no", "valid_metric": "AUC", "eval_args": {"mode": "labeled"}},
}


def forms_of(name):
    """The forms of a model: those of its class that its settings offer."""
    known, forms = known_keys(name), list(getattr(get_model(name), "forms", [None]))
    if "forms" in known:
        return [form for form in forms if form in known["forms"].default]
    return forms if "recommend_by" in known else forms[:1]


def cases():
    for name in MODELS:
        for form in forms_of(name):
            yield pytest.param((name, form), id=f"{name}-{form}" if form else name)


class Case:
    """One model in one form."""

    def __init__(self, name, form, settings):
        self.name, self.form = name, form
        ranks = form is None and known_keys(name)["protocol"].default != "full"
        own = FORMS[form] | (RANKING if ranks else {}) | ({"recommend_by": form} if "recommend_by" in known_keys(name) else {})
        self.settings = settings_for(name, {**settings, **own}, list(MODELS))

    def build(self, **settings):
        """(config, model, splits); a teacher that was trained before is found."""
        config = make_config(self.name, "chain", config_dict={**self.settings, **settings})
        data = SharedData()
        splits, train = data.splits(config), data.train(config)
        init_seed(config["seed"], True)
        return config, get_model(self.name)(config, train), splits

    def trainer(self, folder):
        """(trainer, training data, validation data, test data) of a fresh model that is kept in ``folder``."""
        config, model, splits = self.build()
        trainer = get_trainer(config["MODEL_TYPE"], self.name)(config, model)
        trainer.saved_model_file = str(folder)
        return trainer, *dataloaders(config, model._dataset, splits)


@pytest.fixture(scope="module", params=cases())
def case(request, contract_settings, sentence_encoder):
    return Case(*request.param, contract_settings)


@pytest.fixture(scope="module")
def built(case):
    return case.build()


@pytest.fixture(scope="module")
def trained(case, tmp_path_factory):
    """A whole training: its trainer, test data, what the test measured, and all tensors of the model as they began."""
    folder = tmp_path_factory.mktemp("run") / "run"
    trainer, train, valid, test = case.trainer(folder)
    before = {name: tensor.clone() for name, tensor in tensors_of(trainer.model).items()}
    trainer.fit(train, valid, verbose=False)
    return trainer, test, trainer.evaluate(test), before


def tensors_of(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def training_rows(model, count=6):
    return model._dataset.inter_feat[torch.arange(count)]


def loss_of_step(model, rows, step):
    """As the trainer asks for it."""
    model.train()
    model.seed_step(step)
    torch.manual_seed(int(model.rng.integers(2**31)))
    return model.calculate_loss(rows)


def scores_of(case, model, rows, candidates):
    """Scores of candidates, or of each row's own item where the form judges one item."""
    model.eval()
    return model.predict(rows) if case.form == "yes_no" else model.score(rows, candidates)


def some_candidates(model, rows, number=5):
    rng = np.random.default_rng(0)
    return torch.from_numpy(np.stack([rng.permutation(model.n_items - 1)[:number] + 1 for _ in range(len(rows))]))


def test_it_is_what_the_trainer_needs(built):
    _, model, _ = built
    assert isinstance(model, Recommender)
    assert model.backbones["backbone"] is model.backbone
    fixed = getattr(model, "without_gradient", ())
    assert all(parameter.requires_grad for name, parameter in model.trained_parameters().items() if name not in fixed)


def test_the_loss_of_a_step_is_finite_has_its_named_parts_and_repeats(case, built):
    _, model, _ = built
    rows = training_rows(model)
    parts = loss_of_step(model, rows, 4)
    assert len(parts) == len(model.loss_names) > 0 and all(torch.isfinite(part) and part.ndim == 0 for part in parts)
    assert [part.item() for part in loss_of_step(model, rows, 4)] == [part.item() for part in parts]
    if case.form != "yes_no":  # which draws nothing but dropout, which LoRA matrices that begin at 0 do not show
        assert [part.item() for part in loss_of_step(model, rows, 5)] != [part.item() for part in parts]


def test_gradients_reach_what_is_trained_and_nothing_else(case):
    config, model, _ = case.build()
    trained = model.trained_parameters()
    model.progress = 1.0
    reached, moved, stages = set(), set(), [stage["vectors"] for stage in config["stages"] or []] or [None]
    for number, vectors in enumerate(stages):
        if vectors is not None:
            model.enter_stage(number, vectors)
        model.zero_grad()
        loss = sum(loss_of_step(model, training_rows(model), 3))
        if trained:
            loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        reached |= set(gradients)
        moved |= {name.split(".")[0] for name, gradient in gradients.items() if gradient.abs().sum() > 0}
    trained = set(trained) - set(getattr(model, "without_gradient", ()))
    assert reached == trained
    assert moved == {name.split(".")[0] for name in trained}, "every part of the model really moves"


def seen_prompts(monkeypatch):
    """A set that every prompt will be added to: its tokens, with the items whose vectors stand in it."""
    prompts, init = set(), PromptBatch.__init__

    def record(self, *arguments, **options):
        init(self, *arguments, **options)
        shown = self.tokens.astype(np.int64)
        shown[shown == SLOT_TOKEN] = -100 - self.slot_items
        prompts.update(map(tuple, np.split(shown, self.offsets[1:-1])))

    monkeypatch.setattr(PromptBatch, "__init__", record)
    return prompts


def with_other_future(model, rows, splits):
    """The rows with another target, rated otherwise, and with later items behind the end of each history."""
    changed = Interaction({name: value.clone() for name, value in rows.interaction.items()})
    items = changed[model.ITEM_SEQ]
    behind = torch.arange(items.shape[1]) >= changed[model.ITEM_SEQ_LEN][:, None]
    items[behind] = torch.arange(int(behind.sum())) % (model.n_items - 1) + 1
    changed[model.POS_ITEM_ID][:] = changed[model.POS_ITEM_ID] % (model.n_items - 1) + 1
    changed[splits["train"].time_field][:] += 1e6
    if "rating" in changed:
        changed["rating"][:] = 6 - changed["rating"]
    return changed


@pytest.mark.parametrize("phase", ["valid", "test"])
def test_neither_the_target_nor_the_future_is_in_a_prompt_or_a_score(case, built, monkeypatch, phase):
    _, model, splits = built
    rows = splits[phase].inter_feat[torch.arange(6)]
    candidates, other = some_candidates(model, rows), with_other_future(model, rows, splits)
    if case.form == "yes_no":  # the item that is judged belongs to the prompt
        other[model.ITEM_ID][:] = rows[model.ITEM_ID]
    prompts, found = seen_prompts(monkeypatch), []
    for variant in (rows, other):
        prompts.clear()
        if case.form is not None:
            model.form.forget_items()
        elif hasattr(model, "forget_items"):
            model.forget_items()
        scores = scores_of(case, model, variant, candidates)
        found.append((scores, set(prompts)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    assert found[0][1] == found[1][1] and (len(found[0][1]) > 1 or not model.has_llm)  # a text encoder reads no prompts


def test_what_stands_behind_a_history_does_not_move_the_loss(case, built):
    _, model, splits = built
    rows = training_rows(model)
    other = with_other_future(model, rows, splits)
    for name in (model.POS_ITEM_ID, "rating"):
        if name in rows:
            other[name][:] = rows[name]
    losses = [[part.item() for part in loss_of_step(model, variant, 2)] for variant in (rows, other)]
    assert losses[0] == losses[1]


def test_the_order_of_candidates_moves_no_score(case, built):
    _, model, splits = built
    if case.form == "yes_no":
        pytest.skip("one item is judged")
    rows = splits["test"].inter_feat[torch.arange(6)]
    candidates = some_candidates(model, rows)
    scores = scores_of(case, model, rows, candidates)
    assert scores.shape == candidates.shape and len(scores.unique()) > 6
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(scores_of(case, model, rows, candidates[:, order]), scores[:, order], rtol=1e-5, atol=1e-6)


def test_ways_to_score_agree(case, built):
    """`score` of candidates, `full_sort_predict` and RecBole's `predict` of repeated rows."""
    _, model, splits = built
    model.eval()
    rows = splits["test"].inter_feat[torch.arange(5)]
    if case.form in ("generation", "yes_no"):
        with pytest.raises(UserError, match="retrieval"):
            model.full_sort_predict(rows)
        return
    full = model.full_sort_predict(rows)
    assert full.shape == (5, model.n_items) and torch.isinf(full[:, 0]).all() and torch.isfinite(full[:, 1:]).all()
    candidates = some_candidates(model, rows)
    expected = full.gather(1, candidates)
    torch.testing.assert_close(model.score(rows, candidates), expected, rtol=1e-4, atol=1e-4)
    repeated = rows.repeat_interleave(5)
    repeated.update(Interaction({model.ITEM_ID: candidates.reshape(-1)}))
    torch.testing.assert_close(model.predict(repeated).reshape(5, 5), expected, rtol=1e-4, atol=1e-4)


def test_training_moves_only_what_is_trained(trained):
    trainer, _, _, before = trained
    own = trainer.model.trained_parameters()
    moved = {name for name, tensor in tensors_of(trainer.model).items() if not torch.equal(tensor, before[name])}
    assert moved <= set(own) and bool(moved) is bool(own)


def test_a_saved_model_is_loaded_bit_for_bit(case, trained):
    trainer, test, result, _ = trained
    config, model, _, _, _, test_data = load_data_and_model(trainer.saved_model_file)
    for name, parameter in model.trained_parameters().items():
        assert torch.equal(parameter, trainer.model.trained_parameters()[name]), name
    rows = test._dataset.inter_feat[torch.arange(6)]
    candidates = some_candidates(model, rows)
    assert torch.equal(scores_of(case, model, rows, candidates), scores_of(case, trainer.model, rows, candidates))
    again = get_trainer(config["MODEL_TYPE"], case.name)(config, model)
    assert again.evaluate(test_data, load_best_model=False) == result


def test_it_recommends_or_says_what_would(case, trained):
    trainer, test, _, _ = trained
    user = str(test._dataset.id2token("user_id", 3))
    if case.form in ("generation", "yes_no"):
        with pytest.raises(UserError, match="retrieval"):
            load(trainer.saved_model_file).recommend(users=user)
        return
    loaded = load(trainer.saved_model_file)
    history, (found,) = loaded.history_of(user), loaded.recommend(users=user, topk=3)
    titles, scores = [item.title for item in found], [item.score for item in found]
    assert len(found) == 3 and not set(titles) & set(history)
    assert scores == sorted(scores, reverse=True) and np.isfinite(scores).all()


def test_an_interrupted_training_goes_on_to_the_same_weights(case, trained, tmp_path):
    """It is stopped in the last epoch of each stage, by an error in a step, and goes on as a new process would."""
    whole, *_ = trained
    if not whole.model.trained_parameters():
        pytest.skip("nothing is trained")
    stages = [stage["epochs"] for stage in getattr(whole, "stages", [])] or [whole.epochs]
    per_epoch = -(-len(whole.model._dataset.inter_feat) // whole.settings.train_batch_size)
    assert per_epoch > 1
    for number in range(len(stages)):
        stop = (sum(stages[: number + 1]) - 1) * per_epoch + 1
        cut, train, valid, _ = case.trainer(tmp_path / str(number))
        step, count = type(cut)._train_step, []

        def one_step(self, *arguments, stop=stop, step=step, count=count):
            if len(count) == stop:
                raise KeyboardInterrupt
            count.append(1)
            return step(self, *arguments)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(type(cut), "_train_step", one_step)
            cut.fit(train, valid, verbose=False)
        again, train, valid, test = case.trainer(tmp_path / str(number))
        assert again.can_resume(again.saved_model_file)
        again.resume_checkpoint(again.saved_model_file)
        again.fit(train, valid, verbose=False)
        assert again.log == whole.log and again.best_step == whole.best_step
        again.load_weights(again.saved_model_file)
        for name, parameter in again.model.trained_parameters().items():
            assert torch.equal(parameter, whole.model.trained_parameters()[name]), (number, name)


@pytest.mark.slow
def test_recboles_own_entry_point_measures_the_same(case, trained):
    _, _, result, _ = trained
    found = run_recbole(model=case.name, dataset="chain", config_dict=case.settings, saved=True)
    assert dict(found["test_result"]) == pytest.approx(result, abs=1e-12)
    assert Path("log").is_dir(), "RecBole's own log"
