"""A comparison leaves runs: records, logs and trackers of each; the same comparison again reads them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recbole_llm import checkpoint, cli, lock, run_model
from recbole_llm.errors import UserError
from recbole_llm.files import format_size
from recbole_llm.lock import held
from recbole_llm.quick_start import compare
from recbole_llm.results import listing
from recbole_llm.results.run import read_run
from recbole_llm.teacher.stock import CausalTraining
from recbole_llm.trainer.trainer import LLMTrainer

MODELS, LABELS = ["SASRec", "LLMSRec:b"], ["SASRec", "LLMSRec"]


class FakeWandb(ModuleType):
    """What RecBole and we call of wandb; one run at a time, as there."""

    def __init__(self):
        super().__init__("wandb")
        self.run, self.runs = None, []

    def init(self, project, name, config, id=None, resume=None):
        assert self.run is None, "the last run was not ended"
        known = next((run for run in self.runs if id is not None and run.id == id and resume == "allow"), None)
        new = SimpleNamespace(project=project, name=name, config=config, summary={}, logged=[], id=len(self.runs) + 1)
        self.run = known or new
        return self.run

    def define_metric(self, *names, **options):
        pass

    def log(self, metrics, commit=True):
        self.run.logged.append(metrics)

    def finish(self, exit_code=0):
        self.runs += [] if self.run in self.runs else [self.run]
        self.run.exit_code, self.run = exit_code, None


@pytest.fixture(scope="module")
def settings(chain_data):
    return {
        "data_path": str(chain_data), "backbone": "tiny", "backbone_dtype": "float32", "head_hidden_size": 16,
        "representation_size": 8, "item_projection_hidden_size": 16, "eval_args": {"mode": "uni9"}, "topk": [1, 5],
        "valid_metric": "Hit@5", "epochs": 1, "eval_step": 0.5, "valid_users": 20, "show_progress": False, "use_gpu": False,
        "SASRec.epochs": 3, "SASRec.hidden_size": 8, "SASRec.inner_size": 16, "SASRec.n_layers": 1,
    }  # fmt: skip


@pytest.fixture(scope="module")
def compared(settings, tmp_path_factory):
    """A folder in which a comparison took place, its rows, what the console showed and what wandb was told."""
    folder, wandb = tmp_path_factory.mktemp("compared"), FakeWandb()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["/bin/recbole-llm", "run", "--model=SASRec,LLMSRec:b", "--note=a b"])
        patch.setitem(sys.modules, "wandb", wandb)
        with open(folder / "console", "w") as console:
            patch.setattr(sys, "stderr", console)
            rows = compare(MODELS, "chain", settings={**settings, "log_wandb": True})
    return SimpleNamespace(folder=folder, rows=rows, wandb=wandb, console=(folder / "console").read_text())


@pytest.fixture
def there(compared, monkeypatch):
    monkeypatch.chdir(compared.folder)
    return compared


def test_each_run_describes_itself(there):
    runs = [read_run(row["checkpoint"]) for row in there.rows]
    assert [run.model for run in runs] == LABELS and [row["model"] for row in there.rows] == MODELS
    for run, row in zip(runs, there.rows, strict=True):
        assert row["record"] == run.record and np.array_equal(run.ranks()["ranks"], row["ranks"])
        assert run.test == row["metrics"] and run.record["users"] == 60 == len(row["user_ids"])
        assert run.record["data"]["interactions"] == 572 and run.record["data"]["users"] == 60
        assert run.record["command"] == "recbole-llm run --model=SASRec,LLMSRec:b '--note=a b'"
        assert run.record["started"] <= run.record["finished"]
        assert run.record["peak_memory_bytes"]["cpu"] > 2**26 and run.record["seconds"]["train"] > 0
        assert run.record["settings"]["valid_metric"] == run.record["changed"]["valid_metric"] == "Hit@5"
        assert "seed" not in run.record["changed"] and run.record["settings"]["seed"] == run.seed
    stock, ours = runs
    assert [point["epoch"] for point in stock.curve] == [1, 2, 3] and all(point["valid"] for point in stock.curve)
    assert stock.valid in [point["valid"] for point in stock.curve]
    assert ours.record["teacher"] == {"model": "SASRec", "folder": str(stock.folder)} and stock.record["teacher"] is None
    assert ours.record["backbone"]["name"] == "tiny" and stock.record["backbone"] is None
    assert set(ours.curve[-1]["losses"]) == {"retrieval", "distillation", "uniformity"}
    assert ours.curve[-1]["step"] == 3 and ours.curve[-1]["epoch"] == 1.0
    seconds = [point["seconds"] for point in ours.curve]
    assert seconds == sorted(seconds) and seconds[-1] == pytest.approx(ours.record["seconds"]["train"])


def test_one_log_for_each_run(there):
    logs = {path.stem: path.read_text() for path in Path("log").glob("*/*.log")}
    assert sorted(logs) == sorted(Path(row["checkpoint"]).name for row in there.rows)
    for name, text in logs.items():
        model = name.partition("-")[0]
        assert "Comparing SASRec, LLMSRec:b" in text and "The number of items" in text, "what was before is there"
        assert "valid_metric: Hit@5" in text and f"{model} test result: ndcg@1: 0." in text
        assert "\x1b" not in text and "evaluating" not in text
    ours = next(text for name, text in logs.items() if name.startswith("LLMSRec"))
    assert "user_head.0.weight" in ours and "'name': 'tiny'" in ours
    stock = next(text for name, text in logs.items() if name.startswith("SASRec"))
    assert stock.count("validation result") == 3 and "user_head" not in stock and "LLMSRec test result" not in stock
    assert stock.count("Comparing") == 1, "the log was opened twice, and has what waited once"


def test_the_console_is_short(there):
    assert "user_head.0.weight" not in there.console and "'name': 'tiny'" not in there.console
    assert "valid_metric: Hit@5" not in there.console and "evaluating" not in there.console
    lines = [line for line in there.console.splitlines() if "ndcg@5" in line]
    assert len(lines) >= 6
    for line in lines:
        assert all(len(word.split(".")[-1].strip(",]\x1b[0m")) <= 4 for word in line.split() if word.startswith("0.")), line


def test_one_tensorboard_run_each(there):
    for row in there.rows:
        name = Path(row["checkpoint"]).name
        events = EventAccumulator(f"log_tensorboard/{name}").Reload()
        tags = events.Tags()["scalars"]
        assert {"Test/hit@5", "Valid/hit@5", "Loss/Train"} <= set(tags)
        assert events.Scalars("Test/hit@5")[0].value == pytest.approx(row["metrics"]["hit@5"])
        assert "settings/text_summary" in events.Tags()["tensors"]
        assert ("Loss/distillation" in tags) == name.startswith("LLMSRec")
    assert len(list(Path("log_tensorboard").iterdir())) == 2


def test_one_wandb_run_each(there):
    by_name = {}
    assert len(there.wandb.runs) == 2
    for run in there.wandb.runs:
        assert run.exit_code == 0 and run.config["dataset"] == "chain" and json.dumps(run.config)
        by_name.setdefault(run.name, {"keys": set(), "summary": {}})
        by_name[run.name]["keys"].update(key for metrics in run.logged for key in metrics)
        by_name[run.name]["summary"].update(run.summary)
    assert set(by_name) == {Path(row["checkpoint"]).name for row in there.rows}
    for row in there.rows:
        told = by_name[Path(row["checkpoint"]).name]
        assert told["summary"]["test/hit@5"] == row["metrics"]["hit@5"] and "valid/hit@5" in told["keys"]
        assert ("train/Loss/distillation" in told["keys"]) == (row["model"] == "LLMSRec:b")


@pytest.mark.parametrize(("key", "package", "extra"), [("log_wandb", "wandb", "tracking"), ("log_mlflow", "mlflow", "mlflow")])
def test_a_missing_tracker_is_one_sentence(settings, monkeypatch, key, package, extra):
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr("recbole_llm.results.log.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"{key}: {package} is not installed: pip install 'recbole-llm\[{extra}\]'"):
        compare(MODELS, "chain", settings={**settings, key: True})
    assert not Path("saved").exists()


def test_the_same_comparison_again_reads_everything(there, settings, monkeypatch):
    def refused(*arguments, **options):
        raise AssertionError("nothing is trained or tested again")

    for place, name in ((run_model, "evaluate"), (LLMTrainer, "fit"), (LLMTrainer, "evaluate")):
        monkeypatch.setattr(place, name, refused)
    monkeypatch.setattr("recbole_llm.recommender.base.load_backbone", refused)  # not even the LLM is loaded
    again = compare(MODELS, "chain", settings=settings)
    assert [row["record"] for row in again] == [row["record"] for row in there.rows]
    assert all(np.array_equal(one["ranks"], two["ranks"]) for one, two in zip(again, there.rows, strict=True))
    other = compare(MODELS, "chain", settings={**settings, "topk": [1, 3, 5], "metrics": ["MRR", "Hit"]})
    for row, before in zip(other, there.rows, strict=True):
        assert list(row["metrics"]) == ["mrr@1", "mrr@3", "mrr@5", "hit@1", "hit@3", "hit@5"]
        assert row["metrics"]["hit@5"] == before["metrics"]["hit@5"]
        assert row["metrics"]["hit@3"] == np.mean(row["ranks"] <= 3) == row["record"]["metrics"]["test"]["hit@3"]


@pytest.mark.parametrize("changed", ["settings", "teacher", "weights", "damaged", "tested on others"])
def test_other_runs_are_not_found(copied, settings, monkeypatch, changed):
    """What was made from something else, or says so no more, is left to the check with the loaded LLM."""
    def loaded(*arguments, **options):
        raise AssertionError("the LLM is loaded")

    folder, given = Path(copied.rows[1]["checkpoint"]), dict(settings)
    sources = json.loads((folder / "sources.json").read_text())
    if changed == "settings":
        given["LLMSRec.learning_rate"] = 0.01
    elif changed == "teacher":
        (folder / "sources.json").write_text(json.dumps({**sources, "teacher": "another"}))
    elif changed == "weights":
        monkeypatch.setattr(run_model, "fetch_backbone", lambda config: {"source": "folder", "sha256": "another"})
    elif changed == "damaged":
        (folder / "sources.json").write_text("{")
    else:
        (folder / "run.json").unlink()
    monkeypatch.setattr("recbole_llm.recommender.base.load_backbone", loaded)
    assert "the LLM is loaded" in compare(MODELS, "chain", settings=given)[1]["error"]


@pytest.fixture
def copied(there, monkeypatch, tmp_path):
    """The comparison in a copy of its folder."""
    for name in ("saved", "log", "log_tensorboard"):
        shutil.copytree(there.folder / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return there


def test_fresh_trains_and_tests_anew(copied, settings, monkeypatch):
    def refused(*arguments, **options):
        raise AssertionError("it is trained")

    with monkeypatch.context() as patch:
        patch.setattr(LLMTrainer, "fit", refused)
        rows = compare(MODELS, "chain", settings={**settings, "fresh": True})
    assert "it is trained" in rows[1]["error"]
    stock = Path(copied.rows[0]["checkpoint"]).name
    text = Path(f"log/SASRec/{stock}.log").read_text()
    assert text.count("Comparing SASRec") == text.count("training it now") == 1, "the log begins anew"
    assert text.count("validation result") == 3 and "SASRec test result" in text, "and has all of the new run"
    assert len(EventAccumulator(f"log_tensorboard/{stock}").Reload().Scalars("Valid/hit@5")) == 3
    before, after = copied.rows[0]["record"], rows[0]["record"]
    assert after["metrics"] == before["metrics"] and after["seconds"] != before["seconds"]


def test_a_run_that_was_not_tested_is(copied, settings, monkeypatch):
    """A record that is missing, damaged, or of other candidates is made anew, without training."""
    there = copied
    monkeypatch.setattr(LLMTrainer, "fit", lambda *arguments, **options: pytest.fail("trained again"))
    stock, ours = (Path(row["checkpoint"]) for row in there.rows)
    (stock / "run.json").unlink()
    record = json.loads((ours / "run.json").read_text())
    for damaged in ("{", json.dumps({**record, "test_set": "other"})):
        (ours / "run.json").write_text(damaged)
        rows = compare(MODELS, "chain", settings=settings)
        assert [row["metrics"] for row in rows] == [row["metrics"] for row in there.rows]
        for path, before in ((stock, there.rows[0]), (ours, there.rows[1])):
            run = read_run(path)
            for field in ("metrics", "test_set", "started", "trained_parameters", "teacher", "backbone"):
                assert run.record[field] == before["record"][field], field
            assert run.curve == read_run(there.folder / path).curve
            assert run.record["seconds"]["train"] == before["train_seconds"]


# --- the list --------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(there, tmp_path, monkeypatch):
    """A copy of the runs, with one that was trained and not tested, one unfinished, one damaged, and others' folders."""
    folder = tmp_path / "saved"
    shutil.copytree(there.folder / "saved", folder)
    names = [Path(row["checkpoint"]).name for row in there.rows]
    shutil.copytree(folder / names[0], folder / "trained")
    (folder / "trained" / "run.json").unlink()
    shutil.copytree(folder / names[0], folder / "damaged")
    (folder / "damaged" / "run.json").write_text("{")
    (folder / "unfinished" / "resume").mkdir(parents=True)
    (folder / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    return folder, names


def told(capsys, *words):
    code = cli.main(["runs", *words])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_runs_are_listed(saved, there, capsys):
    folder, names = saved
    code, text = told(capsys)
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    assert code == 0 and set(lines) >= {*names, "trained", "unfinished", "damaged"} and "other" not in lines
    assert f"{there.rows[1]['metrics']['hit@5']:.4f}" in lines[names[1]] and "retrieval" in lines[names[1]]
    assert "not tested" in lines["trained"] and "unfinished" in lines["unfinished"] and "damaged" in lines["damaged"]
    listed = json.loads(told(capsys, "--format=json", "saved")[1])
    one = next(one for one in listed if one["name"] == names[0])
    assert (one["model"], one["dataset"], one["seed"], one["metric"]) == ("SASRec", "chain", 2020, "hit@5")
    assert one["value"] == there.rows[0]["metrics"]["hit@5"] and one["state"] == "tested" and not one["in_use"]
    assert one["bytes"] == sum(path.stat().st_size for path in (folder / names[0]).iterdir())
    assert [one["name"] for one in json.loads(told(capsys, "--format=json", "--model=LLMSRec")[1])] == [names[1]]
    assert told(capsys, "--dataset=none")[1] == "There is no such run in saved.\n"
    size = json.loads(told(capsys, "--size", "--format=json")[1])
    assert size == {"runs": 5, "bytes": sum(one["bytes"] for one in listed), "orphaned_bytes": 0}
    assert told(capsys, "--size")[1].startswith("5 runs in saved, ") and "clean" not in told(capsys, "--size")[1]
    (folder / "half.x8_1abcd.part").write_bytes(b"x" * 2000)
    assert told(capsys, "--size")[1].endswith("; recbole-llm clean would free 2.0 kB\n")


def test_runs_are_deleted_all_or_none(saved, capsys):
    folder, names = saved
    code, text = told(capsys, f"--delete={names[0]},traind")
    assert code == 2 and "did you mean trained?" in text and (folder / names[0]).is_dir()
    for wrong in ("--delete=../saved", "--delete=.", "--delete=other", "--delete=", f"--delete={names[0][:-2]}*"):
        assert told(capsys, wrong)[0] == 2
    code, text = told(capsys, "--delete=trained", f"--delete={names[0]},unfinished")
    assert code == 0 and text.startswith("3 removed, ")
    assert sorted(path.name for path in folder.glob("[!.]*")) == sorted(["damaged", "other", names[1]])
    assert not {"trained", names[0], "unfinished"} & set(lock.names(folder))
    with held(folder / names[1]):
        assert listing.list_runs(folder)[-1].in_use


def test_a_run_in_use_is_not_deleted(saved, capsys):
    """Another process holds it; the others of the same command stay, too."""
    folder, names = saved
    code = (
        "import sys, filelock\n"
        f"lock = filelock.FileLock({str(folder / '.locks' / (names[0] + '.lock'))!r})\n"
        "lock.acquire(); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        assert "in use" in next(line for line in told(capsys)[1].splitlines() if line.startswith(names[0]))
        code, text = told(capsys, f"--delete=trained,{names[0]}")
        assert code == 2 and "is in use by" in text
        holder.stdin.close()
    assert checkpoint.exists(folder / names[0]) and checkpoint.exists(folder / "trained")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere"], "nowhere is no folder"),
        (["--fromat=json"], "did you mean --format?"),
        (["--format=csv"], "choose text or json"),
        (["a", "b"], "b is a second folder"),
        (["--delete=x", "--model=y"], "exact names alone"),
    ],
)
def test_mistakes_in_runs(capsys, words, sentence):
    code, text = told(capsys, *words)
    assert code == 2 and sentence in text


def test_sizes_and_ages():
    assert [format_size(size) for size in (0, 999, 1000, 4.25e6, 5e12)] == ["0 B", "999 B", "1.0 kB", "4.2 MB", "5000.0 GB"]
    assert [listing.format_age(age) for age in (-5, 59, 3599, 7300, 200_000)] == ["0 min", "0 min", "59 min", "2 h", "2 d"]


# --- stopped and gone on with ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_comparison_that_was_stopped_everywhere_ends_as_one_that_was_not(there, settings, monkeypatch, tmp_path):
    """Stopped in the baseline's training, before its test, in a model's training and before its test; see also
    tests/robustness/test_kills.py."""
    monkeypatch.chdir(tmp_path)
    asked = {**settings, "resume": True}
    places = (
        (CausalTraining, "batch_loss", 2), (run_model, "evaluate", 0), (LLMTrainer, "_train_step", 2),
        (LLMTrainer, "evaluate", 1), (run_model, "keep_run", 0),
    )  # fmt: skip
    for owner, name, calls in places:
        whole, left = getattr(owner, name), [calls]

        def stopped(*arguments, whole=whole, left=left, **options):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return whole(*arguments, **options)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, name, stopped)
            compare(MODELS, "chain", settings=asked)
    rows = compare(MODELS, "chain", settings=asked)
    for row, before in zip(rows, there.rows, strict=True):
        assert row["metrics"] == before["metrics"] and np.array_equal(row["ranks"], before["ranks"])
        points, whole = (read_run(folder).curve for folder in (row["checkpoint"], there.folder / before["checkpoint"]))
        assert [{**point, "seconds": 0} for point in points] == [{**point, "seconds": 0} for point in whole]
