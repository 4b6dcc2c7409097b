"""RecBole's own entry points train our models, with nothing but ``import recbole_llm`` before them."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from recbole.config import Config
from recbole.quick_start import load_data_and_model, objective_function, run_recbole
from recbole.trainer import HyperTuning
from recbole.utils import get_trainer
from recbole.utils.case_study import full_sort_scores, full_sort_topk

from recbole_llm import plugin


@pytest.fixture
def tiny_settings(tiny_settings, monkeypatch):
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: 0.0)  # RecBole's run_recbole measures a second's load
    return {**tiny_settings, "history_length": 3}


@pytest.mark.parametrize("name", ["LLMSTAR", pytest.param("LLMSRec", marks=pytest.mark.slow)])
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


def test_case_study(trained):
    """RecBole's ``full_sort_topk`` on a trained model: the items with the highest of ``full_sort_scores``, padding aside."""
    _, model, dataset, _, _, test_data = load_data_and_model(str(trained["LLMSRec"]))
    users = dataset.token2id(dataset.uid_field, ["u1", "u3", "u2"])
    scores = full_sort_scores(users, model, test_data, device=model.device)
    best, items = full_sort_topk(users, model, test_data, k=3, device=model.device)
    assert scores.shape == (3, dataset.item_num) and (scores[:, 0] == -np.inf).all()
    assert (best == scores.sort(descending=True).values[:, :3]).all() and (scores.gather(1, items) == best).all()
    one = full_sort_scores(users[1:2], model, test_data, device=model.device)
    np.testing.assert_allclose(one[0], scores[1], rtol=1e-4, atol=1e-5)


def test_metrics_of_different_protocols_are_told(tiny_settings, caplog, monkeypatch):
    """``run_recbole`` of a stock model ranks other candidates than that of ours, unless ``protocol`` is set."""
    monkeypatch.setattr(plugin, "_MEASURED", {})
    plain = {"data_path": tiny_settings["data_path"], "train_neg_sample_args": None, "epochs": 1}
    Config(model="LLMSRec", dataset="chain", config_dict=tiny_settings)
    Config(model="LLMSTAR", dataset="chain", config_dict=tiny_settings)
    Config(model="SASRec", dataset="chain", config_dict={**plain, "protocol": "retrieval"})
    assert "protocol" not in caplog.text
    Config(model="SASRec", dataset="chain", config_dict=plain)
    assert caplog.text.count("SASRec is measured by RecBole's own protocol, LLMSRec by protocol: retrieval") == 1
    assert "set protocol: retrieval for SASRec too" in caplog.text
    Config(model="SASRec", dataset="chain", config_dict=plain)
    assert caplog.text.count("protocol: retrieval for") == 1


@pytest.mark.parametrize("algorithm", ["exhaustive", pytest.param("random", marks=pytest.mark.slow)])
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
