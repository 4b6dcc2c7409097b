"""Each patch of recbole_llm.compat: RecBole fails without it, and does the right thing with it."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import pickle
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas
import pytest
import recbole
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.quick_start import load_data_and_model, objective_function
from recbole.quick_start import quick_start as quick_start_module
from recbole.trainer import HyperTuning
from recbole.utils import get_model, get_trainer, init_seed
from scipy.sparse import dok_matrix

from recbole_llm import compat
from recbole_llm.errors import UserError

SEQUENTIAL = ("SASRec", "GRU4Rec", "Caser", "BERT4Rec", "NARM", "STAMP", "FPMC")


@pytest.fixture(scope="module", autouse=True)
def quiet_process(tmp_path_factory):
    """RecBole reads sys.argv into its settings, sets CUDA_VISIBLE_DEVICES, and writes logs where it runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("run"))
        patch.setattr(sys, "argv", ["test"])
        patch.setenv("CUDA_VISIBLE_DEVICES", "0")
        yield


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    """A dataset of 30 users and 20 items that takes no time, and settings to train on it."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "toy").mkdir()
    rng = np.random.default_rng(0)
    rows = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in range(30):
        rows += [f"u{user}\ti{item}\t{time}" for time, item in enumerate(rng.permutation(20)[:9])]
    (folder / "toy" / "toy.inter").write_text("\n".join(rows) + "\n")
    items = ["item_id:token\tclass:token_seq", *(f"i{item}\tc{item % 3} c{item % 4}" for item in range(20))]
    (folder / "toy" / "toy.item").write_text("\n".join(items) + "\n")
    return {
        "data_path": str(folder),
        "checkpoint_dir": str(folder / "saved"),
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "epochs": 1,
        "train_batch_size": 64,
        "MAX_ITEM_LIST_LENGTH": 6,
        "embedding_size": 8,
        "hidden_size": 8,
        "inner_size": 8,
        "mlp_hidden_size": [8],
        "state": "ERROR",
        "use_gpu": False,
        "show_progress": False,
    }


def build(model: str, settings: dict, **changes):
    """Config, splits (train, valid, test) and model."""
    config = Config(model=model, dataset="toy", config_dict={**settings, **changes})
    init_seed(config["seed"], True)
    splits = data_preparation(config, create_dataset(config))
    return config, splits, get_model(model)(config, splits[0]._dataset)


def train(model: str, settings: dict, file: Path | None = None, **changes):
    """A trainer after one epoch, and the test data."""
    config, (train_data, valid_data, test_data), network = build(model, settings, **changes)
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, network)
    trainer.saved_model_file = str(file or trainer.saved_model_file)
    trainer.fit(train_data, valid_data, verbose=False, saved=True)
    return trainer, test_data


@pytest.fixture(scope="module")
def trained(settings, tmp_path_factory):
    return train("BPR", settings, tmp_path_factory.mktemp("bpr") / "BPR.pth")


def test_applying_again_changes_nothing():
    trainer_module = importlib.import_module("recbole.trainer.trainer")
    before = [trainer_module.torch, quick_start_module.tune, objective_function.__kwdefaults__["_replacement"]]
    compat.apply()
    after = [trainer_module.torch, quick_start_module.tune, objective_function.__kwdefaults__["_replacement"]]
    assert all(one is other for one, other in zip(before, after, strict=True))


class TestRedirect:
    def make(self):
        def function(a, b=2, *, c=3):
            return a, b, c

        return function

    def test_a_copy_of_the_name_is_redirected_too(self):
        function = self.make()
        copy = function
        compat.redirect(function, lambda stock: lambda *args, **kwargs: ("new", *stock(*args, **kwargs)))
        assert copy(1) == ("new", 1, 2, 3)
        assert copy(1, 5, c=7) == ("new", 1, 5, 7)

    def test_a_second_redirection_wraps_the_first_and_the_same_is_not_repeated(self):
        def first(stock):
            return lambda a: ("first", stock(a))

        def second(stock):
            return lambda a: ("second", stock(a))

        function = self.make()
        for maker in (first, second, first, second):
            compat.redirect(function, maker)
        assert function(1) == ("second", ("first", (1, 2, 3)))

    def test_signature_and_name_stay(self):
        function = self.make()
        signature = inspect.signature(function)
        compat.redirect(function, lambda stock: stock)
        compat.redirect(function, lambda stock: lambda *args: stock(*args))
        assert inspect.signature(function) == signature
        assert function.__name__ == "function"


class TestPandas:
    def test_pandas_3_is_refused_with_the_remedy(self, monkeypatch):
        monkeypatch.setattr(pandas, "__version__", "3.0.1")
        with pytest.raises(UserError, match=r"3\.0\.1.*pandas<3"):
            compat.apply()

    def test_what_pandas_3_would_corrupt_is_right_here(self):
        """RecBole's two idioms; should this fail, refuse_pandas_3 must refuse the installed version as well."""
        lists = pandas.DataFrame({"a": [[1], [1, 2]], "b": [1.0, None]})
        assert lists["a"].agg(len).tolist() == [1, 2]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lists["b"].fillna(value=0, inplace=True)
        assert lists["b"].tolist() == [1.0, 0.0]


class TestNumpy:
    def test_a_config_needs_no_name_that_numpy_2_dropped(self, monkeypatch):
        stock = inspect.unwrap(Config.compatibility_settings)
        monkeypatch.setattr(Config, "compatibility_settings", stock)
        for name in ("float_", "complex_", "unicode_", "float", "complex", "unicode", "int", "object", "str"):
            monkeypatch.delattr(np, name, raising=False)
        with pytest.raises(AttributeError, match="float_"):
            Config.compatibility_settings(None)
        monkeypatch.delattr(np, "int")  # set before the call failed
        compat.numpy_2_aliases()
        patched = Config.compatibility_settings
        compat.numpy_2_aliases()
        assert Config.compatibility_settings is patched
        Config.compatibility_settings(None)
        assert (np.float, np.int, np.str, np.unicode) == (np.float64, np.int_, np.str_, np.str_)
        assert (np.bool, np.object, np.complex) == (np.bool_, np.object_, np.complex128)
        assert np.dtype(np.long).kind == "i"


    def test_interactions_are_sorted_as_before_and_without_a_warning(self, monkeypatch):
        interactions = importlib.import_module("recbole.data.interaction")
        columns = {"user": torch.tensor([2, 1, 2, 1, 3]), "time": torch.tensor([1.0, 5.0, 0.5, 5.0, 2.0], dtype=torch.float64)}
        expected = sorted(range(5), key=lambda row: (columns["user"][row], columns["time"][row]))
        monkeypatch.setattr(np, "__version__", "2.5.0")
        monkeypatch.setattr(interactions, "np", np)
        compat.numpy_2_sorts_tensors()
        assert interactions.np is not np and interactions.np.array is np.array
        found = interactions.Interaction({**columns, "row": torch.arange(5)})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found.sort(by=["user", "time"])
        assert found["row"].tolist() == expected  # the first of equals stays first


class TestRay:
    @pytest.mark.slow
    def test_without_ray_the_quick_start_is_imported_and_searches(self, settings, tmp_path):
        """In a process of its own, where ``import ray`` fails, and then where Ray is broken."""
        script = f"""
import sys, types
sys.modules["ray"] = None
try:
    import recbole.quick_start
except ImportError as error:
    print("stock fails:", error)
import recbole_llm
assert sys.modules["ray"] is None
from recbole.quick_start import objective_function
result = objective_function(config_dict=dict({settings!r}, model="BPR", dataset="toy"))
print(sorted(result))
try:
    sys.modules["recbole.quick_start.quick_start"].tune.Tuner
except ImportError as error:
    print("tune:", error)

broken = sys.modules["ray"] = types.ModuleType("ray")  # has no tune
for name in ("recbole.quick_start", "recbole.quick_start.quick_start"):
    del sys.modules[name]
recbole_llm.compat.ray_only_inside_ray()
from recbole.quick_start import run_recbole
assert sys.modules["ray"] is broken
print("done")
"""
        root = Path(compat.__file__).parents[1]
        command = [sys.executable, "-W", "ignore", "-c", script]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert lines[0].startswith("stock fails: ") and "ray" in lines[0]
        assert lines[1] == "['best_valid_result', 'best_valid_score', 'model', 'test_result', 'valid_score_bigger']"
        assert lines[2].startswith("tune: ") and "ray" in lines[2]
        assert lines[-1] == "done"

    @pytest.mark.parametrize("running", [True, False])
    def test_metrics_are_in_the_result_under_ray_and_nowhere_else(self, monkeypatch, running):
        ray = ModuleType("ray")
        ray.is_initialized = lambda: running
        monkeypatch.setitem(sys.modules, "ray", ray)
        stock = {"model": "BPR", "test_result": {"ndcg@10": 0.25}}
        result = compat._reporting_by_its_result(lambda *args: stock)({"model": "BPR"})
        assert result == ({**stock, "ndcg@10": 0.25} if running else stock)

    def test_outside_ray_nothing_is_reported(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "ray", None)
        assert quick_start_module.tune.report(**{"ndcg@10": 0.5}) is None
        monkeypatch.setitem(sys.modules, "ray.tune", None)
        with pytest.raises(ImportError):
            _ = quick_start_module.tune.run


class TestCheckpoints:
    def unpatched(self, monkeypatch, module: str) -> None:
        monkeypatch.setattr(importlib.import_module(module), "torch", torch)

    def test_evaluation_with_the_best_model(self, trained, monkeypatch):
        trainer, test_data = trained
        best = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        torch.nn.init.zeros_(trainer.model.user_embedding.weight)
        result = trainer.evaluate(test_data, load_best_model=True)
        assert all(torch.equal(tensor, best[name]) for name, tensor in trainer.model.state_dict().items())
        assert 0 < result["hit@10"] <= 1
        self.unpatched(monkeypatch, "recbole.trainer.trainer")
        with pytest.raises(pickle.UnpicklingError):
            trainer.evaluate(test_data, load_best_model=True)

    def test_resume_checkpoint(self, trained, settings, monkeypatch):
        file = trained[0].saved_model_file
        config, _, model = build("BPR", settings, seed=7)
        trainer = get_trainer(config["MODEL_TYPE"], "BPR")(config, model)
        with monkeypatch.context() as unpatched:
            self.unpatched(unpatched, "recbole.trainer.trainer")
            with pytest.raises(pickle.UnpicklingError):
                trainer.resume_checkpoint(file)
        trainer.resume_checkpoint(file)
        assert trainer.start_epoch == 1
        assert torch.equal(model.item_embedding.weight, trained[0].model.item_embedding.weight)

    def test_load_data_and_model(self, trained, monkeypatch):
        trainer, test_data = trained
        expected = trainer.evaluate(test_data, load_best_model=True)
        config, model, _, _, _, loaded_test_data = load_data_and_model(trainer.saved_model_file)
        assert config["model"] == "BPR"
        trainer = get_trainer(config["MODEL_TYPE"], "BPR")(config, model)
        assert trainer.evaluate(loaded_test_data, load_best_model=False) == expected
        monkeypatch.setattr(compat, "_trusting", lambda file: contextlib.nullcontext())
        with pytest.raises(pickle.UnpicklingError):
            load_data_and_model(trained[0].saved_model_file)

    def test_pretrained_neumf(self, settings, tmp_path, monkeypatch):
        mf, _ = train("NeuMF", settings, tmp_path / "mf.pth", mf_train=True, mlp_train=False)
        mlp, _ = train("NeuMF", settings, tmp_path / "mlp.pth", mf_train=False, mlp_train=True)
        pretrained = {
            "use_pretrain": True,
            "mf_pretrain_path": mf.saved_model_file,
            "mlp_pretrain_path": mlp.saved_model_file,
        }
        with monkeypatch.context() as unpatched:
            self.unpatched(unpatched, "recbole.model.general_recommender.neumf")
            with pytest.raises(pickle.UnpicklingError):
                build("NeuMF", settings, **pretrained)
        model = build("NeuMF", settings, **pretrained)[2]
        assert torch.equal(model.user_mf_embedding.weight, mf.model.user_mf_embedding.weight)
        assert torch.equal(model.item_mlp_embedding.weight, mlp.model.item_mlp_embedding.weight)

    def test_pretrained_s3rec(self, settings, tmp_path, monkeypatch):
        columns = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "class"]}
        changes = {"load_col": columns, "item_attribute": "class", "selected_features": ["class"]}
        changes |= {"train_neg_sample_args": None, "pre_model_path": str(tmp_path / "s3rec.pth")}
        config, _, model = build("S3Rec", settings, train_stage="pretrain", **changes)
        state = {"config": config, "state_dict": model.state_dict()}
        torch.save(state, tmp_path / "s3rec.pth")  # as PretrainTrainer.save_pretrained_model writes it
        with monkeypatch.context() as unpatched:
            self.unpatched(unpatched, "recbole.model.sequential_recommender.s3rec")
            with pytest.raises(pickle.UnpicklingError):
                build("S3Rec", settings, train_stage="finetune", **changes)
        finetuned = build("S3Rec", settings, train_stage="finetune", **changes)[2]
        assert torch.equal(finetuned.item_embedding.weight, model.item_embedding.weight)

    @pytest.mark.parametrize("name", compat.CHECKPOINT_READERS)
    def test_every_reader_sees_torch_but_for_load(self, name, trained):
        module = importlib.import_module(name)
        assert module.torch.load(trained[0].saved_model_file)["config"]["model"] == "BPR"
        assert module.torch.nn is torch.nn and module.torch.Tensor is torch.Tensor
        with pytest.raises(pickle.UnpicklingError):
            module.torch.load(trained[0].saved_model_file, weights_only=True)

    def test_no_reader_is_forgotten(self):
        root = Path(recbole.__file__).parent
        readers = {
            "recbole." + ".".join(file.relative_to(root).with_suffix("").parts)
            for file in root.rglob("*.py")
            if re.search(r"\btorch\.load\(", file.read_text(encoding="utf-8"))
        }
        assert readers == {*compat.CHECKPOINT_READERS, "recbole.quick_start.quick_start"}

    def test_every_other_load_stays_strict(self, trained, tmp_path):
        file = trained[0].saved_model_file
        strict = torch.load
        with pytest.raises(pickle.UnpicklingError):
            torch.load(file)
        copy = tmp_path / "copy.pth"
        copy.write_bytes(Path(file).read_bytes())
        outcome = []

        def in_another_thread():
            try:
                torch.load(file)
            except pickle.UnpicklingError:
                outcome.append("refused")

        with compat._trusting(file):
            assert "state_dict" in torch.load(file)
            with pytest.raises(pickle.UnpicklingError):
                torch.load(str(copy))
            thread = threading.Thread(target=in_another_thread)
            thread.start()
            thread.join()
        assert outcome == ["refused"]
        assert torch.load is strict

    def test_a_failed_load_leaves_torch_as_it_was(self, tmp_path):
        strict = torch.load
        with pytest.raises(FileNotFoundError):
            load_data_and_model(str(tmp_path / "missing.pth"))
        assert torch.load is strict


class TestScipy:
    def test_graph_models_build_their_matrix(self, settings, monkeypatch):
        with monkeypatch.context() as unpatched:
            unpatched.delattr(dok_matrix, "_update")
            with pytest.raises(AttributeError, match="_update"):
                build("LightGCN", settings)
            compat.dok_matrix_update()
            _, (train_data, _, _), model = build("LightGCN", settings)
        edges = np.zeros((model.n_users, model.n_items))
        rows = train_data._dataset.inter_feat
        edges[rows["user_id"], rows["item_id"]] = 1
        graph = np.block([[np.zeros((model.n_users,) * 2), edges], [edges.T, np.zeros((model.n_items,) * 2)]])
        scale = (graph.sum(axis=1) + 1e-7) ** -0.5
        expected = torch.tensor(scale[:, None] * graph * scale, dtype=torch.float32)
        torch.testing.assert_close(model.norm_adj_matrix.to_dense(), expected)


class TestHyperopt:
    def test_the_random_state_has_both_interfaces_and_the_same_draws(self):
        assert not hasattr(np.random.RandomState, "integers")
        module = importlib.import_module("recbole.trainer.hyper_tuning")
        drawn = module.np.random.RandomState(5).integers(0, 1000, 8)
        assert drawn.tolist() == np.random.RandomState(5).randint(0, 1000, 8).tolist()
        assert module.np.array is np.array

    @pytest.mark.parametrize("algorithm", ["exhaustive", "random", "bayes"])
    def test_a_search_runs_two_trials(self, algorithm, settings, tmp_path):
        pytest.importorskip("hyperopt")
        file = tmp_path / "fixed.yaml"
        file.write_text(json.dumps({**settings, "model": "BPR", "dataset": "toy"}))  # JSON is YAML
        search = HyperTuning(
            objective_function,
            params_dict={"choice": {"learning_rate": [0.001, 0.1]}},
            fixed_config_file_list=[str(file)],
            algo=algorithm,
            max_evals=2,
        )
        search.run()
        assert len(search.score_list) == 2
        assert search.best_params["learning_rate"] in (0.001, 0.1)


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_the_common_sequential_models_train_and_reload(name, settings, tmp_path):
    loss = {} if name == "FPMC" else {"train_neg_sample_args": None}
    trainer, test_data = train(name, settings, tmp_path / "model.pth", **loss)
    result = trainer.evaluate(test_data, load_best_model=True)
    assert 0 <= result["ndcg@10"] <= result["hit@10"] <= 1
    assert np.isfinite(trainer.train_loss_dict[0])


def test_importing_recbole_does_not_switch_anomaly_detection_on():
    """SINE's module does, for the whole process, which slows every backward pass."""
    code = """
import sys, torch
import recbole.model.sequential_recommender
print(torch.is_anomaly_enabled())
torch.autograd.set_detect_anomaly(False)
for name in [name for name in sys.modules if name.startswith("recbole")]:
    del sys.modules[name]
import recbole_llm
import recbole.model.sequential_recommender
print(torch.is_anomaly_enabled(), "recbole.model.sequential_recommender.sine" in sys.modules)
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    stock, ours = subprocess.run(command, env=environment, capture_output=True, text=True).stdout.splitlines()
    assert stock == "True", "RecBole has fixed it: the patch can go"
    assert ours == "False True"
