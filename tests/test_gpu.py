"""What a GPU computes is what a CPU computes. ``RECBOLE_LLM_TEST_DEVICE=cpu`` runs these tests without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import recbole_llm
from recbole_llm.config.settings import settings_for
from recbole_llm.trainer.trainer import LLMTrainer

pytestmark = pytest.mark.gpu

# SGD: Adam divides by a gradient's size, and makes a step of what is zero but for rounding.
TRAINING = {"learner": "sgd", "learning_rate": 0.01, "epochs": 1, "eval_step": 0.5, "train_batch_size": 24, "history_length": 4}
MODELS = {
    "LLMSTAR": {},
    "LLMSRec": {"train_targets": "window", "train_negatives": 8, "warmup_steps": 0},
    "TALLRec": {"lora_dropout": 0.0},
    "LLaRA": {"lora_dropout": 0.0, "recommend_by": "generation", "decode": "likelihood", "train_candidates": 4},
    "ST2SI": {"tuning": "full", "eval_args": {"mode": "full"}, "valid_metric": "NDCG@5"},
}


@pytest.fixture
def device() -> str:
    wanted = os.environ.get("RECBOLE_LLM_TEST_DEVICE", "cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU; RECBOLE_LLM_TEST_DEVICE=cpu runs this on a CPU")
    return wanted


def train(model: str, tiny_settings: dict[str, Any], where: Path, device: str, **more: Any) -> tuple[Path, list, dict]:
    """The folder of a run on a device, the points of its curve, and its metrics."""
    settings = tiny_settings | TRAINING | MODELS[model] | more
    settings = settings_for(model, settings, [model, "LLMSTAR"])  # without what is no key of it
    settings |= {"use_gpu": device == "cuda", "checkpoint_dir": str(where / "saved")}
    row = next(row for row in recbole_llm.compare([model], "chain", settings=settings) if row["model"] == model)
    folder = Path(row["checkpoint"])
    curve = json.loads((folder / "curve.json").read_text())
    return folder, curve, row["metrics"]


def same_curve(one: list, other: list) -> None:
    assert len(one) == len(other) > 1
    for point, expected in zip(one, other, strict=True):
        assert point["losses"] == pytest.approx(expected["losses"], rel=1e-3, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_training_and_metrics_are_those_of_a_cpu(model, device, tiny_settings, tmp_path):
    folder, curve, metrics = train(model, tiny_settings, tmp_path / device, device)
    expected_folder, expected_curve, expected_metrics = train(model, tiny_settings, tmp_path / "expected", "cpu")
    same_curve(curve, expected_curve)
    weights, expected = (load_file(path / "model.safetensors") for path in (folder, expected_folder))
    assert weights.keys() == expected.keys()
    for key, value in weights.items():
        assert (value - expected[key]).abs().max() <= 1e-3, key
    assert metrics == pytest.approx(expected_metrics, abs=0.05)  # a user's rank may turn on a rounding


@pytest.mark.slow
def test_an_interrupted_training_goes_on_with_the_same_dropout(device, tiny_settings, tmp_path, monkeypatch):
    more = {"lora_dropout": 0.5, "epochs": 2}
    _, expected, _ = train("TALLRec", tiny_settings, tmp_path / "whole", device, **more)
    save = LLMTrainer._save_resume_state

    def save_and_stop(self, *arguments, **named):
        save(self, *arguments, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LLMTrainer, "_save_resume_state", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train("TALLRec", tiny_settings, tmp_path / "cut", device, **more)
    _, curve, _ = train("TALLRec", tiny_settings, tmp_path / "cut", device, resume=True, **more)
    same_curve(curve, expected)


@pytest.mark.parametrize("path", ["share_header", "share_prefix", "skip_unread", "recompute"])
def test_fast_paths_equal_the_plain_path(path, device, make_model):
    config, model, splits = make_model("LLMSTAR", use_gpu=device == "cuda", backbone_dtype="float32")
    model.to(config["device"])
    batch = splits["test"].inter_feat[torch.arange(6)]
    prompts = model.prompts.user_prompts(model.histories(batch))
    model.seed_step(0)
    results, gradients = [], []
    for fast in (True, False):
        for name in ("share_header", "share_prefix", "skip_unread"):
            setattr(model.encoder.settings, name, fast and path == name)
        model.encoder.settings.recompute = fast and path == "recompute"
        model.zero_grad()
        hidden = model.represent_prompts(prompts)
        hidden.square().sum().backward()
        results.append(hidden.detach())
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert results[0].device.type == device
    assert torch.allclose(*results, atol=1e-4)
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(torch.allclose(one, two, atol=1e-3, rtol=1e-3) for one, two in zip(*gradients, strict=True))


@pytest.mark.slow
def test_what_was_trained_on_a_gpu_is_read_without_one(device, tiny_settings, tmp_path):
    folder, *_ = train("LLMSTAR", tiny_settings, tmp_path, device)
    best = recbole_llm.load(folder).recommend(users=["u1"], topk=3)[0][0].item
    ask = f"import recbole_llm; print(recbole_llm.load({str(folder)!r}).recommend(users=['u1'], topk=3)[0][0].item)"
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, env=hidden)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == best
