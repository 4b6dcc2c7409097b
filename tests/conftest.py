"""Shared fixtures: everything is made here, offline and small."""

from __future__ import annotations

import logging
import os
import sys

# One thread: results on a loaded machine do not depend on how work was divided, and small tensors are faster so.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

import recbole_llm  # noqa: E402, F401


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """RecBole writes log/, saved/ and log_tensorboard/ where it runs, reads sys.argv and sets up the root logger."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="session")
def chain_data(tmp_path_factory):
    """A folder with the dataset ``chain``: item k+1 mostly follows item k, so that order can be learned."""
    from recbole_llm.data.prepare import generate_chain

    folder = tmp_path_factory.mktemp("data")
    generate_chain(folder, "chain", users=60, items=40, seed=1, noise=0.1)
    return folder


@pytest.fixture
def tiny_settings(chain_data, tmp_path):
    """Settings of a small run on the chain with a random LLM, float32 on CPU."""
    return {
        "data_path": str(chain_data),
        "checkpoint_dir": str(tmp_path / "saved"),
        "backbone": "tiny",
        "backbone_dtype": "float32",
        "head_hidden_size": 16,
        "representation_size": 8,
        "item_projection_hidden_size": 16,
        "eval_args": {"mode": "uni9"},
        "topk": [1, 5],
        "valid_metric": "Hit@5",
        "epochs": 2,
        "eval_step": 0.5,
        "valid_users": 20,
        "learning_rate": 1e-3,
        "show_progress": False,
        "use_gpu": False,
        "teacher_settings": {"epochs": 1, "hidden_size": 8, "inner_size": 16, "n_layers": 1, "train_batch_size": 256},
    }


@pytest.fixture(scope="session")
def trained(chain_data, tmp_path_factory):
    """A stock model and an LLM recommender that learned from it, trained once on the chain: name -> checkpoint folder.

    A test that changes a folder changes a copy of it.
    """
    from recbole_llm import cli

    folder = tmp_path_factory.mktemp("trained")
    settings = {
        "model": "SASRec,LLMSRec", "dataset": "chain", "data_path": chain_data, "checkpoint_dir": folder / "saved",
        "backbone": "tiny", "backbone_dtype": "float32", "head_hidden_size": 16, "representation_size": 8,
        "item_projection_hidden_size": 16, "epochs": 1, "eval_step": 1, "SASRec.epochs": 1, "SASRec.hidden_size": 8,
        "SASRec.inner_size": 16, "SASRec.n_layers": 1, "topk": "[1,5]", "valid_metric": "Hit@5", "eval_args": "{mode: uni9}",
        "use_gpu": False, "show_progress": False,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["pytest"])
        assert cli.main(["run", *(f"--{key}={value}" for key, value in settings.items())]) == 0
    return {path.name.split("-")[0]: path for path in (folder / "saved").iterdir()}


@pytest.fixture
def make_model(tiny_settings):
    """A function (model name, dataset, **settings) -> (config, model, splits), its teacher trained."""
    from recbole.utils import get_model, init_seed

    from recbole_llm.config.settings import make_config, settings_for
    from recbole_llm.data.shared import SharedData

    def make(name, dataset="chain", **settings):
        given = settings_for(name, {**tiny_settings, **settings}, [name, "LLMSTAR"])
        config = make_config(name, dataset, config_dict=given)
        data = SharedData()
        splits = data.splits(config)
        init_seed(config["seed"], True)
        return config, get_model(name)(config, data.train(config)), splits

    return make


@pytest.fixture
def untied_backbone(tmp_path):
    """A folder with the tiny LLM, whose output head has weights of its own, and one with its decoder alone."""
    import transformers

    from recbole_llm.backbone.load import load_backbone

    tiny = load_backbone({"backbone": "tiny"})
    config = transformers.LlamaConfig(**tiny.causal_lm.config.to_dict() | {"tie_word_embeddings": False})
    folders = tmp_path / "untied", tmp_path / "decoder"
    for kind, folder in zip((transformers.LlamaForCausalLM, transformers.LlamaModel), folders, strict=True):
        kind(config).save_pretrained(folder)
        tiny.tokenizer.save_pretrained(folder)
    # The settings name the whole model, whichever class wrote them.
    (folders[1] / "config.json").write_text((folders[0] / "config.json").read_text())
    return folders


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)
