"""RecBole's own entry points train our models, with nothing but ``import recbole_llm`` before them."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from recbole.quick_start import load_data_and_model, objective_function, run_recbole
from recbole.trainer import HyperTuning
from recbole.utils import get_trainer


@pytest.fixture
def tiny_settings(tiny_settings, monkeypatch):
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: 0.0)  # RecBole's run_recbole measures a second's load
    return {**tiny_settings, "history_length": 3}


@pytest.mark.parametrize("name", ["LLMSTAR", "LLMSRec"])
def test_run_recbole(name, tiny_settings):
    result = run_recbole(model=name, dataset="chain", config_dict=tiny_settings, saved=True)
    assert 0 < result["best_valid_score"] <= 1
    assert result["test_result"]["ndcg@5"] <= result["test_result"]["hit@5"]


def test_run_recbole_with_full_ranking(tiny_settings):
    """A model whose default protocol ranks the whole catalogue."""
    kept = ("data_path", "checkpoint_dir", "backbone", "epochs", "show_progress", "use_gpu")
    settings = {key: tiny_settings[key] for key in kept} | {"eval_step": 1.0, "valid_metric": "Recall@10"}
    result = run_recbole(model="ST2SI", dataset="chain", config_dict=settings, saved=True)
    assert {"ndcg@10", "recall@10", "mrr@10", "ilp_accuracy@5"} <= set(result["test_result"])
    assert 0 <= result["best_valid_score"] <= 1


def test_load_data_and_model(tiny_settings):
    result = run_recbole(model="LLMSTAR", dataset="chain", config_dict=tiny_settings, saved=True)
    folder = next(Path(tiny_settings["checkpoint_dir"]).glob("LLMSTAR-*"))
    config, model, dataset, _, _, test_data = load_data_and_model(str(folder))
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    assert trainer.evaluate(test_data, load_best_model=False) == pytest.approx(result["test_result"])


@pytest.mark.parametrize("algorithm", ["exhaustive", "random"])
def test_a_search_over_beta_runs_two_trials(algorithm, tiny_settings, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump({"model": "LLMSTAR", "dataset": "chain", **tiny_settings, "epochs": 1}))
    space = {"choice": {"beta": [0.3, 0.7]}}
    search = HyperTuning(
        objective_function, space=None, params_dict=space, algo=algorithm, max_evals=2, early_stop=10,
        fixed_config_file_list=[str(file)],
    )  # fmt: skip
    search.run()
    assert len(search.score_list) == 2 and np.isfinite(search.score_list).all()
    assert search.best_params["beta"] in (0.3, 0.7)
