"""The real trackers, without a server, where they are installed. Without them: tests/test_runs.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recbole_llm.errors import UserError
from recbole_llm.quick_start import compare
from recbole_llm.results import log
from recbole_llm.results.mlflow_tracker import Trackers
from recbole_llm.results.run import read_run

MODELS = ["SASRec", "LLMSRec"]


@pytest.fixture
def small(tiny_settings):
    return {**tiny_settings, "epochs": 1, "checkpoint_dir": "saved", "resume": True}


@pytest.fixture
def mlflow(monkeypatch, tmp_path):
    """MLflow writing to a folder here."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    module = pytest.importorskip("mlflow")
    module.set_tracking_uri(f"file://{tmp_path}/mlruns")
    yield module
    module.end_run()
    module.set_tracking_uri(None)


def runs_of(mlflow, experiment="recbole-llm"):
    client = mlflow.MlflowClient()
    return client, client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


def test_one_mlflow_run_for_each_model(mlflow, small):
    rows = compare(MODELS, "chain", settings={**small, "log_mlflow": True})
    assert not [row for row in rows if row.get("error")]
    client, runs = runs_of(mlflow)
    assert {run.info.run_name for run in runs} == {Path(row["checkpoint"]).name for row in rows} and len(runs) == 2
    for row in rows:
        run = next(run for run in runs if run.info.run_name == Path(row["checkpoint"]).name)
        assert run.info.status == "FINISHED" and run.data.params["dataset"] == "chain"
        assert run.data.metrics["test/hit_at_5"] == pytest.approx(row["metrics"]["hit@5"])
        file = mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path="settings.json")
        assert json.loads(Path(file).read_text()) == row["record"]["settings"]
        points = read_run(row["checkpoint"]).curve
        valid = [metric.value for metric in client.get_metric_history(run.info.run_id, "valid/hit_at_5")]
        assert valid == pytest.approx([point["valid"]["hit@5"] for point in points if point["valid"]])
    (ours,) = (run.info.run_id for run in runs if "LLMSRec" in run.info.run_name)
    losses = client.get_metric_history(ours, "train/Loss/distillation")
    assert [(metric.step, metric.value) for metric in losses] == [
        (point["step"], pytest.approx(point["losses"]["distillation"])) for point in points
    ]


def test_a_name_that_comes_again_goes_on_with_its_run_in_mlflow(mlflow):
    settings = {"log_mlflow": True, "mlflow_experiment": "one", "dataset": "chain"}
    for fresh, expected in ((False, 1), (False, 1), (True, 2)):
        with log.tracked("it's.a-run".replace("'", ""), {**settings, "fresh": fresh}):
            Trackers(_Quiet(), True).log_metrics({"train_loss": (1.0, 2.0), "train_step": 3}, head="train")
        _, runs = runs_of(mlflow, "one")
        assert len(runs) == expected
    assert runs[0].data.metrics == {"train/train_loss1": 1.0, "train/train_loss2": 2.0}
    with pytest.raises(ZeroDivisionError), log.tracked("fails", settings):
        raise ZeroDivisionError
    assert {run.info.status for run in runs_of(mlflow, "one")[1] if run.info.run_name == "fails"} == {"FAILED"}
    with mlflow.start_run(run_name="mine") as mine, log.tracked("other", settings):
        assert mlflow.active_run().info.run_id == mine.info.run_id


def test_mlflow_that_cannot_be_reached_is_one_sentence(mlflow):
    Path("file").write_text("")
    mlflow.set_tracking_uri(f"file://{Path('file').absolute()}/runs")
    with pytest.raises(UserError, match="log_mlflow: MLflow cannot open a run "):
        with log.tracked("x", {"log_mlflow": True, "mlflow_experiment": "one"}):
            pass


class _Quiet:
    def log_metrics(self, metrics, head, commit):
        pass


@pytest.mark.slow
def test_wandb_offline(small, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    seen = []
    finish = wandb.finish

    def finished(**options):
        seen.append((wandb.run.name, wandb.run.id, dict(wandb.run.summary), dict(wandb.run.config)))
        finish(**options)

    monkeypatch.setattr(wandb, "finish", finished)
    rows = compare(MODELS, "chain", settings={**small, "log_wandb": True})
    assert not [row for row in rows if row.get("error")]
    names = [Path(row["checkpoint"]).name for row in rows]
    assert {name for name, *_ in seen} == set(names) and len({run for _, run, *_ in seen}) == 2
    for row, name in zip(rows, names, strict=True):
        summary = {key: value for other, _, one, _ in seen if other == name for key, value in one.items()}
        config = next(one for other, _, _, one in seen if other == name)
        assert summary["test/hit@5"] == pytest.approx(row["metrics"]["hit@5"]) and "valid/hit@5" in summary
        assert config["dataset"] == "chain" and config["topk"] == [1, 5]
    assert sum(1 for _ in Path("wandb").glob("offline-run-*")) >= 2
