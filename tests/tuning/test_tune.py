"""The search for a model's settings: its space, its trials, its winner."""

from __future__ import annotations

import copy
import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from recbole_llm import cli, registry
from recbole_llm.config import tuned
from recbole_llm.config.schema import known_keys
from recbole_llm.config.settings import make_config
from recbole_llm.errors import UserError
from recbole_llm.tuning import search
from recbole_llm.tuning.search import Request, tune
from recbole_llm.tuning.space import read_space

SPACE = {"choice": {"hidden_size": [8, 16], "n_layers": [1, 2]}}
SMALL = {"inner_size": 8, "epochs": 1, "use_gpu": False, "show_progress": False, "valid_metric": "Hit@1", "topk": [1]}


@pytest.fixture
def request_for(chain_data):
    settings = {"data_path": str(chain_data), **SMALL}
    return Request("SASRec", "chain", SPACE, "my.yaml", 4, "exhaustive", (), settings, "out", ["recbole-llm", "tune"])


@pytest.fixture(scope="module")
def configured(chain_data):
    return make_config("SASRec", "chain", config_dict={"data_path": str(chain_data), "protocol": "retrieval", **SMALL})


@pytest.fixture
def base(configured):
    """The configuration of which those of the trials are made, quicker than RecBole makes one."""
    config = copy.copy(configured)
    config.final_config_dict = dict(configured.final_config_dict)
    return config


@pytest.fixture
def trained(monkeypatch, base):
    """The trials that were trained, by their settings; the wide and deep model is the best, and the shallow and wide fails."""
    seen = []

    def configure(name, dataset, models, seed, files, settings):
        config = copy.copy(base)
        config.final_config_dict = {**base.final_config_dict, **settings}
        config.external_config_dict = dict(settings)
        return config

    def train(config, data):
        size, layers = config["hidden_size"], config["n_layers"]
        seen.append((size, layers))
        if (size, layers) == (16, 1):
            raise ValueError("broke")
        return Path("saved") / f"{size}-{layers}", {"hit@1": size * layers / 100}, 1.5

    monkeypatch.setattr(search, "configure", configure)
    monkeypatch.setattr(search.preflight, "check", lambda *_: None)
    monkeypatch.setattr(search, "train_model", train)
    monkeypatch.setattr(search, "run_model", lambda config, *_: [{"metrics": {"hit@1": 0.25}, "config": config}])
    return seen


# --- the space --------------------------------------------------------------------------------------------------------


def test_both_spellings_give_the_same_space(tmp_path):
    lines, mapping = tmp_path / "hyper.test", tmp_path / "space.yaml"
    lines.write_text("hidden_size choice [64, 128]\n# a remark\nlearning_rate loguniform -8,-5\nn_layers quniform 1, 4, 1\n")
    ranges = {"choice": {"hidden_size": [64, 128]}, "loguniform": {"learning_rate": [-8, -5]}}
    ranges["quniform"] = {"n_layers": [1, 4, 1]}
    mapping.write_text(yaml.safe_dump(ranges))
    keys = known_keys("SASRec")
    assert read_space(lines, keys) == read_space(mapping, keys) == ranges


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hidden_sise choice [1,2]", "unknown key 'hidden_sise'"),
        ("hidden_size choice __import__('os').getcwd()", "hidden_size must be"),  # text, not code
        ("hidden_size choice [wide]", "hidden_size must be"),
        ("hidden_size among [1,2]", "'among' is no kind"),
        ("hidden_size choice", "cannot read it|needs a list"),
        ("hidden_size", ":1: cannot read it"),
        ("hidden_size choice [1,1]", "a value twice"),
        ("n_layers uniform 3,1", "lowest, highest for uniform"),
        ("n_layers quniform 1,3", "lowest, highest, step"),
        ("hidden_size choice [1]\nhidden_size uniform 1,2", "stands there twice"),
        ("hidden_size choice [1]\nhidden_size choice [2]", "stands there twice"),
        ("MAX_ITEM_LIST_LENGTH choice [5,50]", "no setting of the training"),
        ("\n", "no range"),
    ],
)
def test_mistakes_in_a_space(tmp_path, text, words):
    file = tmp_path / "hyper.test"
    file.write_text(text)
    with pytest.raises(UserError, match=words):
        read_space(file, known_keys("SASRec"))


@pytest.mark.parametrize("file", sorted((registry.properties_folder() / "tune").glob("*.yaml")), ids=lambda file: file.stem)
def test_our_spaces_hold_values_that_the_models_take(file):
    assert registry.known_models() and file.stem in registry.known_models()
    assert all(len(values) > 1 for values in read_space(file, known_keys(file.stem))["choice"].values())


# --- the search -------------------------------------------------------------------------------------------------------


def test_the_best_by_validation_wins_and_is_the_only_one_tested(request_for, trained):
    found = tune(request_for)
    assert sorted(trained) == [(8, 1), (8, 2), (16, 1), (16, 2)]
    assert found.best["params"] == {"hidden_size": 16, "n_layers": 2} and found.best["value"] == 0.32
    assert [trial["error"] for trial in found.trials if "error" in trial] == ["ValueError: broke"]
    assert found.row["config"]["hidden_size"] == 16
    written = yaml.safe_load(found.file.read_text())
    budget = {"trials": 4, "space": "my.yaml", "command": "recbole-llm tune"}
    assert written == {
        "SASRec.inner_size": 8, "SASRec.epochs": 1, "SASRec.hidden_size": 16, "SASRec.n_layers": 2, "SASRec.tuned_by": budget,
    }  # fmt: skip
    assert found.row["config"]["tuned_by"] == budget
    assert "hit@1 0.2500" in found.file.read_text() and "0.3200" in found.file.read_text()
    with (found.folder / "trials.csv").open() as file:
        assert [(line["hidden_size"], line["hit@1"], line["error"]) for line in csv.DictReader(file) if line["error"]] == [
            ("16", "", "ValueError: broke")
        ]


@pytest.mark.parametrize("algorithm", ["bayes", "exhaustive"])
@pytest.mark.slow
def test_a_search_that_was_stopped_goes_on(request_for, trained, monkeypatch, algorithm):
    request = replace(request_for, algorithm=algorithm, trials=4)
    whole = tune(replace(request, output="whole")).trials
    trained.clear()
    train = search.train_model

    def stopped(config, data):
        if len(trained) == 1:
            raise KeyboardInterrupt
        return train(config, data)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(search, "train_model", stopped)
        tune(request)
    found = tune(request)
    assert found.trials == whole
    succeeded = [pair for pair in trained if pair != (16, 1)]
    assert len(succeeded) == len(set(succeeded))  # nothing that succeeded is trained twice
    trained.clear()
    tune(request)
    assert set(trained) <= {(16, 1)}


def test_a_smaller_metric_can_be_the_better_one(request_for, trained, base):
    base.final_config_dict["valid_metric_bigger"] = False
    assert tune(request_for).best["params"] == {"hidden_size": 8, "n_layers": 1}


def test_whole_numbers_stay_whole(request_for, trained):
    space = {"quniform": {"hidden_size": [8, 16, 8], "n_layers": [1, 2, 1]}, "uniform": {"hidden_dropout_prob": [0.1, 0.2]}}
    params = tune(replace(request_for, algorithm="random", space=space, trials=3)).best["params"]
    assert type(params["hidden_size"]) is int and 0.1 <= params["hidden_dropout_prob"] <= 0.2


def test_mistakes_of_a_search(request_for, trained, monkeypatch):
    with pytest.raises(UserError, match="exhaustive .* choices alone"):
        tune(replace(request_for, space={"uniform": {"hidden_dropout_prob": [0.1, 0.2]}}))
    assert trained == []
    folder = tune(request_for).folder
    (folder / "trials.json").write_text('{"trials": [{"params": 3}]}')
    with pytest.raises(UserError, match="damaged"):
        tune(request_for)
    with pytest.raises(UserError, match="no trial succeeded; the first: ValueError: broke"):
        tune(replace(request_for, space={"choice": {"hidden_size": [16], "n_layers": [1]}}, output="other"))


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_search_a_run_with_its_winner_and_the_report(chain_data, capsys, tmp_path):
    (tmp_path / "hyper.test").write_text("hidden_size choice [4,8]\n")
    common = [f"--data_path={chain_data}", "--dataset=chain", "--use_gpu=False", "--show_progress=False"]
    common.append("--eval_args={mode: uni9}")
    words = ["--model=SASRec", *common, "--epochs=1", "--inner_size=8", "--n_layers=1"]
    assert cli.main(["tune", *words, "--params_file=hyper.test", "--trials=2", "--algo=exhaustive"]) == 0
    printed = capsys.readouterr().out
    (file,) = Path("tuned").glob("*/SASRec.yaml")
    assert str(file) in printed and "2 trials" in printed and "Test of the best" in printed
    runs = list(Path("saved").glob("SASRec-*/run.json"))
    assert len(runs) == 1  # the winner alone was tested
    record = json.loads(runs[0].read_text())
    assert record["settings"]["tuned_by"]["trials"] == 2
    assert cli.main(["run", "--model=SASRec", *common, f"--config_files={file}"]) == 0
    assert len(list(Path("saved").glob("SASRec-*/model.safetensors"))) == 2  # the winner was found, not trained again
    assert cli.main(["report", str(runs[0].parent), "--output=report.html"]) == 0
    assert "2 trials" in Path("report.html").read_text()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--dataset=chain"], "name one model"),
        (["--model=SASRec,GRU4Rec", "--dataset=chain"], "name one model"),
        (["--model=SASRec"], "name a dataset"),
        (["--model=SASRec", "--dataset=chain", "--trials=0"], "trials: 0"),
        (["--model=SASRec", "--dataset=chain", "--algo=grid"], "one of bayes, random, exhaustive"),
        (["--model=Caser", "--dataset=chain"], "no built-in ranges for Caser"),
        (["--model=SASRec", "--dataset=chain", "--params_file=none.test"], "none.test cannot be read"),
    ],
)
def test_mistakes_of_the_command(chain_data, capsys, words, sentence):
    assert cli.main(["tune", f"--data_path={chain_data}", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_tuned_settings_of_a_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "properties_folder", lambda: tmp_path)
    folder = tmp_path / "tuned" / "chain"
    folder.mkdir(parents=True)
    for name in ("SASRec", "GRU4Rec"):
        (folder / f"{name}.yaml").write_text(f"{name}.hidden_size: 8\n")
    assert tuned.files_for(["GRU4Rec", "Caser"], "chain") == [str(folder / "GRU4Rec.yaml")]
    assert tuned.files_for(["LLMSRec"], "chain") == [str(folder / "SASRec.yaml")]  # its teacher
    for models, dataset in ((["Caser"], "chain"), (["SASRec"], "../tuned/chain")):
        with pytest.raises(UserError, match="GRU4Rec on chain, SASRec on chain"):
            tuned.files_for(models, dataset)
