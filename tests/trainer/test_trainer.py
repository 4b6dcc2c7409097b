"""Training: learns what can be learned, keeps what it should, and goes on after a kill as if nothing had happened."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from recbole.utils import get_model, get_trainer
from safetensors.torch import load_file

from recbole_llm import checkpoint
from recbole_llm.backbone.load import load_backbone
from recbole_llm.config.settings import make_config
from recbole_llm.data.loaders import dataloaders
from recbole_llm.data.sequences import cut_windows, user_sequences
from recbole_llm.errors import UserError
from recbole_llm.teacher.stock import all_positions_loss
from recbole_llm.trainer.stages import StageSettings, read_stages

ROOT = Path(__file__).parents[2]


def trainer_of(make_model, name="LLMSRec", **settings):
    config, model, splits = make_model(name, **settings)
    trainer = get_trainer(config["MODEL_TYPE"], name)(config, model)
    return trainer, *dataloaders(config, model_train_split(config, splits), splits)


def model_train_split(config, splits):
    train = splits["train"]
    users = train.inter_feat[train.uid_field].numpy()
    last = np.r_[np.flatnonzero(np.diff(users)), len(users) - 1]
    return train.copy(train.inter_feat[torch.from_numpy(last)])


def test_fit_improves_and_keeps_the_best(make_model):
    trainer, train, valid, _ = trainer_of(make_model, epochs=4)
    score, result = trainer.fit(train, valid)
    losses = list(trainer.train_loss_dict.values())
    assert losses[-1] < 0.95 * losses[0]
    assert score == result["hit@5"] == max(entry["hit@5"] for entry in trainer.log)
    first_best = next(entry["step"] for entry in trainer.log if entry["hit@5"] == score)
    assert trainer.best_step == first_best, "of equal scores the earlier stays"
    # evaluating with the best model gives the score it was chosen for
    assert trainer.evaluate(valid)["hit@5"] == score


def test_validation_every_half_epoch_on_a_fixed_sample(make_model):
    trainer, train, valid, _ = trainer_of(make_model, epochs=2, eval_step=0.5, valid_users=7)
    trainer.fit(train, valid)
    steps = -(-len(train._dataset.inter_feat) // 20)
    every = round(0.5 * steps)
    assert [entry["step"] for entry in trainer.log] == sorted({*range(every, 2 * steps + 1, every), 2 * steps})
    assert len(trainer.last_ranking.ranks) == 7


def test_the_final_test_takes_everyone(make_model):
    trainer, _, _, test = trainer_of(make_model, valid_users=7)
    trainer.evaluate(test, load_best_model=False)
    assert len(trainer.last_ranking.ranks) == len(test._dataset.inter_feat)


@pytest.mark.slow
def test_early_stopping_counts_validations(make_model):
    trainer, train, valid, _ = trainer_of(make_model, epochs=20, learning_rate=1e-12, stopping_step=2)
    trainer.fit(train, valid)
    assert len(trainer.log) == 3  # the first is the best, two more bring nothing


def test_tensors_that_share_memory_are_written_whole(tmp_path):
    table = torch.randn(6, 4)
    tensors = {"one": table, "same": table, "row": table[1], "turned": table.t(), "part": table[:3], "empty": torch.zeros(0)}
    checkpoint.write_tensors(tmp_path / "file.safetensors", tensors)
    found = checkpoint.read_tensors(tmp_path / "file.safetensors", "cpu")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_checkpoint_holds_trained_weights_only(make_model):
    trainer, train, valid, _ = trainer_of(make_model, epochs=1)
    trainer.fit(train, valid)
    folder = Path(trainer.saved_model_file)
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == trainer.model.trained_parameters().keys()
    assert sum(tensor.numel() for tensor in weights.values()) < sum(p.numel() for p in trainer.model.parameters()) / 2
    record = json.loads((folder / "recbole_llm.json").read_text())
    assert record["model"] == "LLMSRec" and record["finished"] and record["best_valid_score"] == trainer.best_valid_score
    assert not (folder / "resume").exists()


def test_accumulated_batches_are_one_step(make_model):
    """Two batches of 10 accumulated move the weights once."""
    trainer, train, _, _ = trainer_of(make_model, epochs=1, train_batch_size=10, accumulation_steps=2)
    rows = train._dataset.inter_feat
    steps = -(-len(rows) // 10)
    moved = []
    for step in range(4):
        before = trainer.model.user_out.detach().clone()
        trainer.step = step
        trainer._train_step(train, rows[torch.arange(10)], steps, 2)
        moved.append(not torch.equal(before, trainer.model.user_out))
    assert moved == [False, True, False, True]


def test_learning_rate_schedule(make_model):
    schedule = {"learning_rate_decay": 0.5, "learning_rate_decay_every": 0.1, "warmup_steps": 2}
    trainer, *_ = trainer_of(make_model, learning_rate=1.0, **schedule)
    rates = [trainer._learning_rate(step, 100) for step in (0, 1, 2, 9, 10, 25)]
    assert rates == [0.5, 1.0, 1.0, 1.0, 0.5, 0.25]


def test_cosine_schedule(make_model):
    schedule = {"learning_rate_schedule": "cosine", "learning_rate_min": 0.2, "epochs": 2, "learning_rate": 1.0}
    trainer, *_ = trainer_of(make_model, **schedule, warmup_steps=4)
    assert trainer._learning_rate(1, 10) == 0.5
    # 20 steps, 16 of them after the warm-up, from step 4 to step 19
    rates = [trainer._learning_rate(step, 10) for step in (3, 4, 9, 14, 19)]
    assert rates == pytest.approx([1.0, 1.0, 0.8, 0.4, 0.2])  # 0, 1/3, 2/3 and all of the way down
    assert trainer._learning_rate(19, 11) > trainer._learning_rate(21, 11) == pytest.approx(0.2)
    trainer.learning_rate = 0.1  # of a stage, say
    assert [trainer._learning_rate(step, 10) for step in (4, 19)] == [0.1, 0.1]
    trainer, *_ = trainer_of(make_model, **schedule | {"learning_rate_schedule": "linear"}, warmup_steps=4)
    rates = [trainer._learning_rate(step, 10) for step in (3, 4, 9, 14, 19)]
    assert rates == pytest.approx([1.0, 1.0, 0.8 * 2 / 3 + 0.2, 0.8 / 3 + 0.2, 0.2])


def test_linear_schedule(make_model):
    schedule = {"learning_rate_schedule": "linear", "learning_rate_min": 0.2, "epochs": 2, "learning_rate": 1.0}
    trainer, *_ = trainer_of(make_model, **schedule, warmup_steps=4)
    rates = [trainer._learning_rate(step, 10) for step in (1, 3, 4, 7, 19)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 1 - 0.8 * 3 / 15, 0.2])


def test_a_model_may_have_learning_rates_of_its_own_for_parts(make_model):
    """A factor by name; and the state of the optimizer stays with its parameter."""
    trainer, train, *_ = trainer_of(make_model, learning_rate=0.01, adam_eps=1e-3)
    trainer.model.learning_rate_factor = lambda name: 0.5 if name.startswith("user") else 1.0
    trainer.optimizer = trainer._build_optimizer()
    assert {group["factor"] for group in trainer.optimizer.param_groups} == {1.0, 0.5}
    assert {group["eps"] for group in trainer.optimizer.param_groups} == {1e-3}
    trainer._train_step(train, train._dataset.inter_feat[torch.arange(4)], 10, 1)
    rates = {
        id(parameter): group["lr"] for group in trainer.optimizer.param_groups for parameter in group["params"]
    }
    trained = trainer.model.trained_parameters()
    assert {name: rates[id(parameter)] for name, parameter in trained.items()} == {
        name: 0.005 if name.startswith("user") else 0.01 for name in trained
    }
    order = [id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]]
    assert order == list(map(id, trained.values()))


def test_warm_up_as_a_share_of_all_steps(make_model):
    trainer, *_ = trainer_of(make_model, warmup_steps=0.25, epochs=2, learning_rate=1.0, learning_rate_decay=1.0)
    assert [trainer._learning_rate(step, 8) for step in (0, 1, 3, 4, 15)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    with pytest.raises(UserError, match="warmup_steps must be a whole number of steps, or below 1 their share .* not 1.5"):
        make_model("LLMSRec", warmup_steps=1.5)


def test_a_stage_has_a_schedule_of_its_own(make_model):
    stages = [
        {"name": "text", "trains": ["lora", "heads"], "vectors": False, "learning_rate": 1.0, "epochs": 1},
        {"name": "mapping", "trains": ["mapping"], "vectors": True, "learning_rate": 0.5, "epochs": 3},
    ]
    schedule = {"learning_rate_schedule": "cosine", "learning_rate_min": 0.1, "warmup_steps": 0.5}
    trainer, *_ = trainer_of(make_model, "CoLLM", stages=stages, **schedule)
    ends = []
    for number, stage in enumerate(trainer.stages):
        trainer._enter(number, stage)
        steps = 4 * stage["epochs"]
        ends.append([trainer._learning_rate(step, 4) for step in (0, steps // 2, steps - 1)])
    assert ends == [pytest.approx([1 / 2, 1.0, 0.1]), pytest.approx([0.5 / 6, 0.5, 0.1])]


def test_resuming_inside_the_warm_up_goes_on_with_its_learning_rates(make_model, tmp_path):
    schedule = {"warmup_steps": 0.5, "learning_rate_schedule": "cosine", "epochs": 2, "learning_rate": 0.01}

    def rates(trainer, train, steps):
        found = []
        for _ in range(steps):
            trainer._train_step(train, train._dataset.inter_feat[torch.arange(4)], 4, 1)
            trainer.step += 1
            found.append(trainer.optimizer.param_groups[0]["lr"])
        return found

    trainer, train, *_ = trainer_of(make_model, **schedule)
    before = rates(trainer, train, 2)
    trainer._save_resume_state(tmp_path / "run", finished=False)
    after = rates(trainer, train, 6)
    assert before + after[:2] == [0.0025, 0.005, 0.0075, 0.01] and after[-1] == 0
    again, train, *_ = trainer_of(make_model, **schedule)
    again.resume_checkpoint(tmp_path / "run")
    assert rates(again, train, 6) == after


@pytest.mark.parametrize("name", ["TALLRec", pytest.param("CoLLM", marks=pytest.mark.slow)])
def test_merging_at_the_end_changes_neither_scores_nor_weights(make_model, monkeypatch, name):
    trainer, train, valid, test = trainer_of(
        make_model, name, merge_adapter=True, epochs=1, learning_rate=0.01, lora_r=4, lora_alpha=32
    )
    trainer.fit(train, valid)
    folder = Path(trainer.saved_model_file)
    assert [path.parent for path in Path(trainer.checkpoint_dir).rglob("merged")] == [folder]  # the last stage's alone
    model = trainer.model
    with torch.no_grad():  # evaluation must load the best weights before it merges them
        for parameter in model.trained_parameters().values():
            parameter.zero_()
    rows, candidates = test._dataset.inter_feat[torch.arange(20)], torch.arange(1, 41).expand(20, -1)
    scores, layer = [], next(module for module in model.modules() if hasattr(module, "base_layer"))
    original = layer.base_layer.weight.clone()

    def score(*arguments, **options):
        scores.append((model.score(rows, candidates), layer.merged, layer.base_layer.weight - original))
        raise KeyboardInterrupt

    monkeypatch.setattr("recbole_llm.evaluation.candidate_evaluation.evaluate", score)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            trainer.evaluate(test)
    trainer.settings = replace(trainer.settings, merge_adapter=False)
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate(test)
    assert [merged for _, merged, _ in scores] == [True, True, False]
    assert scores[0][2].abs().max() > 1e-3 and torch.equal(layer.base_layer.weight, original)
    assert torch.equal(scores[0][0], scores[1][0])
    torch.testing.assert_close(scores[0][0], scores[2][0], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_model_with_two_llms_keeps_both(make_model, monkeypatch):
    trainer, train, valid, test = trainer_of(make_model, "TALLRec", merge_adapter=True, epochs=1, eval_step=1)
    second = load_backbone({"backbone": "tiny", "backbone_layers": 1, "tuning": "lora", "seed": 3})
    both = property(lambda model: {"backbone": model.backbone, "text_encoder": second})
    monkeypatch.setattr(type(trainer.model), "backbones", both)
    trainer.fit(train, valid)
    folder = Path(trainer.saved_model_file)
    for place, layers in ((folder, 2), (folder / "text_encoder", 1)):
        assert (place / "adapter" / "adapter_model.safetensors").exists()
        assert json.loads((place / "merged" / "config.json").read_text())["num_hidden_layers"] == layers
        assert all("`TALLRec`" in (place / kind / "README.md").read_text() for kind in ("adapter", "merged"))
    record = checkpoint.read_record(folder)
    assert record["text_encoder"]["layers"] == 1 and record["backbone"]["layers"] == 2
    trainer.evaluate(test)
    second.identity["layers"] = 2
    with pytest.raises(UserError, match="has text_encoder .*, not"):
        trainer.load_weights(folder)


def test_gradient_clipping_acts_on_trained_weights(make_model):
    trainer, train, _, _ = trainer_of(make_model, clip_grad_norm={"max_norm": 1e-9}, learner="sgd", learning_rate=1.0)
    before = {key: p.detach().clone() for key, p in trainer.model.trained_parameters().items()}
    trainer._train_step(train, train._dataset.inter_feat[torch.arange(20)], 10, 1)
    distance = sum((p - before[key]).square().sum() for key, p in trainer.model.trained_parameters().items()).sqrt()
    assert distance < 2e-9


def test_loss_that_is_not_finite_stops_with_a_sentence(make_model):
    trainer, train, valid, _ = trainer_of(make_model)
    with torch.no_grad():
        trainer.model.user_out.fill_(float("nan"))
    with pytest.raises(UserError, match="lower learning_rate"):
        trainer.fit(train, valid)


def run(arguments, folder, **kwargs):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(ROOT / "run_recbole_llm.py"), *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs
    )


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_numbers(chain_data, tmp_path):
    """kill -9 in the middle, resume, compare with the uninterrupted run bit for bit."""
    arguments = [
        "--model=LLMSTAR", "--dataset=chain", f"--data_path={chain_data}", "--backbone=tiny", "--backbone_dtype=float32",
        "--head_hidden_size=16", "--representation_size=8", "--eval_args={mode: uni9}", "--topk=[1, 5]", "--valid_metric=Hit@5",
        "--epochs=4", "--eval_step=0.4", "--train_batch_size=7", "--accumulation_steps=2", "--learning_rate=1e-3",
        "--SASRec.epochs=1", "--show_progress=False", "--use_gpu=False", "--stopping_step=100", "--valid_users=10",
    ]  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    process = run([*arguments, "--results_file=r.json"], whole)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output

    process = run([*arguments, "--results_file=r.json"], cut)
    deadline = time.monotonic() + 300
    while not list(cut.glob("saved/LLMSTAR-*/resume/state.json")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert process.poll() is None, "it must be killed while it runs"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (cut / "r.json").exists()

    process = run([*arguments, "--results_file=r.json", "--resume=True"], cut)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    step = int(re.search(r"continuing after step (\d+)", output)[1])
    assert 0 < step < 36

    def result(folder):
        row = json.loads((folder / "r.json").read_text())[0]
        return row["metrics"], row["trained_parameters"]

    assert result(cut) == result(whole)
    one, other = (load_file(next(folder.glob("saved/LLMSTAR-*")) / "model.safetensors") for folder in (whole, cut))
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


def test_resuming_refuses_another_run(make_model, tmp_path):
    trainer, train, valid, _ = trainer_of(make_model)
    trainer.step = 3
    trainer._save_resume_state(tmp_path / "run", finished=False)
    again, *_ = trainer_of(make_model)
    again.resume_checkpoint(tmp_path / "run")
    assert again.step == 3
    other, *_ = trainer_of(make_model, seed=7)
    with pytest.raises(UserError, match="seed"):
        other.resume_checkpoint(tmp_path / "run")


@pytest.mark.parametrize("damage", ["truncated weights", "truncated record", "foreign", "missing", "other model", "other data"])
@pytest.mark.slow
def test_bad_checkpoints_are_refused_with_a_sentence(make_model, tmp_path, damage):
    trainer, train, valid, _ = trainer_of(make_model, epochs=1)
    trainer.fit(train, valid)
    folder = Path(trainer.saved_model_file)
    record, weights = folder / "recbole_llm.json", folder / "model.safetensors"
    before = [p.detach().clone() for p in trainer.model.trained_parameters().values()]
    if damage == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "truncated record":
        record.write_text(record.read_text()[:50])
    elif damage == "foreign":
        record.write_text('{"hello": 1}')
    elif damage == "missing":
        record.unlink()
    else:
        content = json.loads(record.read_text())
        content["model" if damage == "other model" else "fingerprint"] = "another"
        record.write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        trainer.load_weights(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value).strip()
    for old, new in zip(before, trainer.model.trained_parameters().values(), strict=True):
        assert torch.equal(old, new), "nothing may be half loaded"


def test_nothing_is_unpickled(tmp_path):
    """A checkpoint folder holds no pickle, and one that does is not read."""
    folder = tmp_path / "evil"
    folder.mkdir()
    torch.save({"weights": torch.ones(1)}, folder / "model.safetensors")
    (folder / "recbole_llm.json").write_text(json.dumps({"format": 1, "model": "LLMSRec"}))
    with pytest.raises(UserError, match="safetensors"):
        checkpoint.read_weights(folder)


# Stages


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "give a list"),
        (["text"], "stage 1 is 'text'"),
        ([{"name": "a", "trains": ["lora"]}], "stage 1 lacks vectors"),
        ([{"name": "a", "trains": ["lora"], "vectors": True, "epoch": 2}], "did you mean epochs"),
        ([{"name": "a", "trains": ["llm"], "vectors": True}], "lora, tokens, mapping, heads"),
        ([{"name": "a", "trains": ["lora"], "vectors": "yes"}], "vectors 'yes'"),
        ([{"name": "a", "trains": ["lora"], "vectors": True, "learning_rate": "fast"}], "no number"),
        ([{"name": "a", "trains": ["lora"], "vectors": True, "epochs": 0}], "above 0"),
        ([{"name": "a", "trains": ["lora"], "vectors": True}] * 2, "one name"),
    ],
)
def test_mistakes_in_stages(stages, message):
    with pytest.raises(UserError, match=message):
        read_stages(StageSettings(stages, None, epochs=1, learning_rate=1e-3), ("lora", "tokens", "mapping", "heads"))


# The causal training of teachers


def test_windows_meet_every_target_once():
    rng = np.random.default_rng(0)
    sequences = [np.arange(1, n + 1) + 100 * n for n in (2, 5, 6, 7, 23)]
    windows = cut_windows(sequences, 5, rng)
    targets = sorted(windows[:, 1:][windows[:, 1:] > 0].tolist())
    assert targets == sorted(item for sequence in sequences for item in sequence[1:].tolist())
    assert windows.shape[1] == 6 and (windows[:, 1] > 0).all()


def test_user_sequences_are_the_training_history(make_model):
    _, _, splits = make_model("LLMSRec")
    train = splits["train"]
    users = train.inter_feat[train.uid_field].numpy()
    for user, sequence in zip(np.unique(users), user_sequences(train), strict=True):
        rows = np.flatnonzero(users == user)
        last = train.inter_feat["item_id_list"][rows[-1], : train.inter_feat["item_length"][rows[-1]]].numpy()
        assert sequence[:-1].tolist() == last.tolist()
        assert sequence[-1] == train.inter_feat["item_id"][rows[-1]]


@pytest.mark.parametrize("name", ["SASRec", "GRU4Rec"])
def test_causal_loss_equals_the_prefix_loss(make_model, name):
    """All positions in one pass give the loss and gradient of RecBole's one row per prefix."""
    config, _, splits = make_model("LLMSRec")
    settings = {"data_path": config.external_config_dict["data_path"], "protocol": "retrieval"}
    model = get_model(name)(make_config(name, "chain", config_dict=settings), splits["train"])
    model.eval()
    train = splits["train"]
    sequences = user_sequences(train)[:5]
    windows = cut_windows(sequences, 50, np.random.default_rng(0))
    loss = all_positions_loss(model, torch.from_numpy(windows))
    loss.backward()
    gradient = model.item_embedding.weight.grad.clone()
    model.zero_grad()
    users = train.inter_feat[train.uid_field]
    rows = train.inter_feat[torch.isin(users, users.unique()[:5])]
    prefix_loss = model.calculate_loss(rows)
    prefix_loss.backward()
    assert loss.item() == pytest.approx(prefix_loss.item(), rel=1e-5)
    torch.testing.assert_close(gradient, model.item_embedding.weight.grad, rtol=1e-4, atol=1e-6)
