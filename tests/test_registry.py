"""RecBole's look-ups after ``import recbole_llm``: our models are found, everything else is as it was."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType, NoneType

import numpy as np
import pytest
import recbole.data.dataset
import recbole.trainer
import torch
import yaml
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.dataset import SequentialDataset
from recbole.data.transform import construct_transform
from recbole.data.utils import create_samplers
from recbole.model.sequential_recommender import SASRec
from recbole.quick_start import load_data_and_model, run_recbole
from recbole.quick_start import quick_start as quick_start_module
from recbole.sampler import RepeatableSampler
from recbole.trainer import Trainer
from recbole.utils import get_flops, get_model, get_trainer

import recbole_llm
from recbole_llm import plugin, registry
from recbole_llm.config.help import help_text
from recbole_llm.config.identity import deciding_settings
from recbole_llm.config.schema import known_keys
from recbole_llm.config.settings import make_config
from recbole_llm.configure import configure
from recbole_llm.errors import UserError
from recbole_llm.evaluation.candidates import CandidateSampler
from recbole_llm.quick_start import compare
from recbole_llm.run_model import run_folder
from recbole_llm.teacher.teacher import teacher_config

ROOT = Path(registry.__file__).parents[1]


class Toy(SASRec):
    """Stands for a model of ours."""

    def __deepcopy__(self, memo):
        raise AssertionError("a model of ours was copied")


class ToyDataset(SequentialDataset):
    """Stands for a dataset of ours."""


class ToyTrainer(Trainer):
    """Stands for a trainer of ours."""


TOY = registry.Entry(
    model=f"{__name__}:Toy", dataset=f"{__name__}:ToyDataset", trainer=f"{__name__}:ToyTrainer", properties="", paper=""
)


@pytest.fixture(autouse=True)
def quiet_process(monkeypatch):
    """RecBole reads sys.argv into its settings, and sets CUDA_VISIBLE_DEVICES."""
    monkeypatch.setattr(sys, "argv", ["test"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(registry.MODELS, "Toy", TOY)


@pytest.fixture
def our_settings(monkeypatch):
    """A stand-in for recbole_llm.config.settings that records its calls."""
    calls = []
    module = ModuleType("recbole_llm.config.settings")

    def load_internal(config, model, model_class, dataset):
        calls.append(("load_internal", model, model_class, dataset, dict(config.internal_config_dict)))
        if model == "Toy":
            of_sasrec = Path(recbole.__file__).parent / "properties" / "model" / "SASRec.yaml"
            config.internal_config_dict.update(yaml.load(of_sasrec.read_text(), Loader=config.yaml_loader))
        config.internal_config_dict.update(train_neg_sample_args=None, epochs=1, from_our_yaml=5)

    def finish(config):
        calls.append(("finish", config.model, dict(config.final_config_dict)))

    module.load_internal, module.finish = load_internal, finish
    monkeypatch.setitem(sys.modules, "recbole_llm.config.settings", module)
    monkeypatch.setattr(recbole_llm, "config", module, raising=False)
    return calls


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    """A dataset of 30 users and 20 items, and settings to train on it."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "toy").mkdir()
    rng = np.random.default_rng(0)
    rows = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in range(30):
        rows += [f"u{user}\ti{item}\t{time}" for time, item in enumerate(rng.permutation(20)[:9])]
    (folder / "toy" / "toy.inter").write_text("\n".join(rows) + "\n")
    return {
        "data_path": str(folder),
        "checkpoint_dir": str(folder / "saved"),
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "train_batch_size": 64,
        "MAX_ITEM_LIST_LENGTH": 5,
        "hidden_size": 8,
        "inner_size": 8,
        "state": "ERROR",
        "use_gpu": False,
        "show_progress": False,
    }


def interacted(settings: dict) -> dict[str, set[str]]:
    """The items of each user, read from the file."""
    items: dict[str, set[str]] = {}
    for line in (Path(settings["data_path"]) / "toy" / "toy.inter").read_text().splitlines()[1:]:
        user, item, _ = line.split("\t")
        items.setdefault(user, set()).add(item)
    return items


class TestTable:
    @pytest.mark.parametrize("name", [*registry.MODELS, *registry.BASELINES])
    def test_every_entry_resolves(self, name):
        entry = {**registry.MODELS, **registry.BASELINES}[name]
        assert registry.resolve(entry.model).__name__ == name
        assert issubclass(registry.resolve(entry.dataset), SequentialDataset)
        assert issubclass(registry.resolve(entry.trainer), Trainer)
        assert (registry.properties_folder() / entry.properties).is_file()
        assert entry.paper

    def test_is_ours(self):
        assert registry.is_ours("LLMSTAR")
        assert not registry.is_ours("SASRec") and not registry.is_ours(SASRec) and not registry.is_ours(None)

    @pytest.mark.parametrize("reference", [f"{__name__}:Missing", "recbole_llm.missing:Model"])
    def test_what_cannot_be_resolved_is_an_import_error(self, reference):
        with pytest.raises(ImportError, match=reference.split(":")[0]):
            registry.resolve(reference)

    def test_properties_of_an_installed_package_and_of_a_checkout(self, tmp_path, monkeypatch):
        package = tmp_path / "recbole_llm"
        monkeypatch.setattr(registry, "__file__", str(package / "registry.py"))
        with pytest.raises(UserError, match="properties"):
            registry.properties_folder()
        (tmp_path / "properties" / "model").mkdir(parents=True)
        assert registry.properties_folder() == tmp_path / "properties"
        (package / "properties" / "model").mkdir(parents=True)
        assert registry.properties_folder() == package / "properties"


class TestNames:
    def test_the_parts_of_a_model_are_found_by_recbole(self, toy):
        assert get_model("Toy") is Toy
        assert get_trainer(Toy.type, "Toy") is ToyTrainer
        assert recbole.data.dataset.ToyDataset is ToyDataset
        from recbole.trainer import ToyTrainer as imported

        assert imported is ToyTrainer

    def test_stock_parts_stay(self):
        assert get_model("SASRec") is SASRec
        assert get_trainer(SASRec.type, "SASRec") is Trainer
        assert not hasattr(recbole.data.dataset, "SASRecDataset")
        with pytest.raises(AttributeError, match="NoSuchTrainer"):
            _ = recbole.trainer.NoSuchTrainer

    def test_a_broken_trainer_is_no_reason_to_take_the_stock_one(self, monkeypatch):
        broken = registry.Entry(f"{__name__}:Toy", "", "", f"{__name__}:ToyDataset", f"{__name__}:Missing")
        monkeypatch.setitem(registry.MODELS, "Toy", broken)
        with pytest.raises(ImportError, match="Missing"):
            get_trainer(Toy.type, "Toy")

    @pytest.mark.parametrize(
        ("name", "near"),
        [("SASRecc", "SASRec"), ("sasrec", "SASRec"), ("llmstar", "LLMSTAR"), ("LLM-STAR", "LLMSTAR"), ("BRP", "BPR")],
    )
    def test_an_unknown_model_gets_the_nearest_name(self, name, near):
        with pytest.raises(UserError) as failure:
            get_model(name)
        assert f"'{name}'" in str(failure.value) and f"did you mean '{near}'?" in str(failure.value)
        assert "lightgbm" not in str(failure.value)

    def test_an_unknown_model_that_is_near_to_none(self):
        with pytest.raises(ValueError, match="no model named 'qqqqqqqq'"):
            Config(model="qqqqqqqq", dataset="ml-100k")

    def test_known_models(self):
        known = registry.known_models()
        assert known[: len(registry.MODELS)] == list(registry.MODELS)
        assert {"SASRec", "Random", "LightGBM", "XGBoost", "xDeepFM"} <= set(known) and "lightgbm" not in known
        for name in known[len(registry.MODELS) :]:
            if name not in ("LightGBM", "XGBoost"):
                assert get_model(name).__name__ == name

    def test_a_missing_library_of_a_known_model_is_still_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "lightgbm", None)
        for name in [name for name in sys.modules if name.startswith("recbole.model.exlib_recommender")]:
            monkeypatch.delitem(sys.modules, name)
        with pytest.raises(ImportError, match="lightgbm"):
            get_model("LightGBM")


class TestSettings:
    def test_ours_come_after_recboles_and_before_the_users(self, toy, our_settings, settings):
        config = Config(model="Toy", dataset="toy", config_dict={**settings, "from_our_yaml": 6})
        (first, model, model_class, dataset, before), (last, finished, final) = our_settings
        assert (first, last) == ("load_internal", "finish")
        assert (model, model_class, dataset, finished) == ("Toy", Toy, "toy", "Toy")
        assert before["epochs"] == 300  # RecBole's overall.yaml
        assert (config["epochs"], config["from_our_yaml"]) == (1, 6)
        assert final == config.final_config_dict

    def test_a_class_is_as_good_as_a_name(self, toy, our_settings, settings):
        Config(model=Toy, dataset="toy", config_dict=settings)
        assert [call[0] for call in our_settings] == ["load_internal", "finish"]

    @pytest.mark.parametrize("protocol", ["retrieval", None])
    def test_a_stock_model_gets_them_with_a_protocol_only(self, protocol, our_settings, settings):
        Config(model="BPR", dataset="toy", config_dict={**settings, "protocol": protocol})
        assert [call[0] for call in our_settings] == (["load_internal", "finish"] if protocol else [])


class TestRun:
    def test_run_recbole(self, toy, our_settings, settings):
        seen = []
        ToyTrainer.fit = lambda self, *args, **kwargs: seen.append(self) or Trainer.fit(self, *args, **kwargs)
        try:
            result = run_recbole(model="Toy", dataset="toy", config_dict=settings)
        finally:
            del ToyTrainer.fit
        assert 0 < result["test_result"]["hit@10"] <= 1
        assert type(seen[0].model) is Toy
        assert len(seen) == 1

    def test_the_dataset_is_ours(self, toy, our_settings, settings):
        config = Config(model="Toy", dataset="toy", config_dict=settings)
        assert type(create_dataset(config)) is ToyDataset

    def test_a_saved_dataset_is_not_loaded_for_other_texts(self, tmp_path):
        def texts(**settings):
            config = make_config(
                "LLMSRec",
                "ml-100k",
                config_dict={"save_dataset": True, "checkpoint_dir": str(tmp_path), "show_progress": False, **settings},
            )
            return create_dataset(config).item_texts

        first = texts()
        assert list(tmp_path.glob("*.pth"))
        assert texts(trust_files=True) == first
        assert texts(trust_files=True, item_text=["movie_title", "release_year"])[1] == f"{first[1]}, 1996"

    @pytest.mark.parametrize("model", ["LLMSRec", "SASRec"])
    @pytest.mark.parametrize("kind", ["dataset", "named dataset", "dataloaders", "named dataloaders"])
    def test_a_saved_dataset_is_not_unpickled_without_trust(self, tmp_path, model, kind):
        class Evil:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "executed",))

        key = "dataset_save_path" if "dataset" in kind else "dataloaders_save_path"
        usual = "ml-100k-TextSequentialDataset.pth" if model == "LLMSRec" else "ml-100k-SequentialDataset.pth"
        usual = usual if "dataset" in kind else f"ml-100k-for-{model}-dataloader.pth"
        file = tmp_path / ("odd.pkl" if "named" in kind else usual)
        file.write_bytes(pickle.dumps(Evil()))
        given = {"checkpoint_dir": str(tmp_path), "protocol": "retrieval", "show_progress": False}
        given |= {key: str(file)} if "named" in kind else {}
        config = make_config(model, "ml-100k", config_dict=given)
        with pytest.raises(UserError, match=f"{key}: .*{file.name} would be unpickled.*set trust_files to True"):
            create_dataset(config) if "dataset" in kind else data_preparation(config, None)
        assert not (tmp_path / "executed").exists()

    def test_flops_of_ours_are_counted_without_a_copy(self, toy, our_settings, settings):
        config = Config(model="Toy", dataset="toy", config_dict=settings)
        dataset = create_dataset(config)
        train, _, _ = data_preparation(config, dataset)
        model = Toy(config, train._dataset).train()
        arguments = (dataset, torch.device("cpu"), logging.getLogger(), construct_transform(config))
        flops = get_flops(model, *arguments)
        length, width, inner, layers = 5, 8, 8, 2
        projections = 4 * width * width + 2 * width * inner
        # Two FLOPs per multiplication and addition; attention's two products; the dot product is no matrix product.
        assert flops == layers * 2 * (length * projections + 2 * length * length * width)
        assert model.training and not any("total_ops" in name for name, _ in model.named_buffers())

        class Stock(SASRec):
            pass

        stock = get_flops(Stock(config, train._dataset), *arguments)
        assert stock > 0 and stock != flops  # RecBole's own count, which counts otherwise


class TestCandidates:
    def splits(self, settings, **changes):
        changes = {**settings, "train_neg_sample_args": None, **changes}
        config = Config(model="SASRec", dataset="toy", config_dict=changes)
        dataset = create_dataset(config)
        return config, dataset, dataset.build()

    def mode(self, valid: str, test: str) -> dict:
        return {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": {"valid": valid, "test": test}}

    def test_only_where_they_are_asked_for(self, settings):
        config, dataset, splits = self.splits(settings, eval_args=self.mode("uni9", "uni9"))
        for sampling in (None, "recbole"):
            config["candidate_sampling"] = sampling
            samplers = create_samplers(config, dataset, splits)
            assert [type(sampler) for sampler in samplers] == [NoneType, RepeatableSampler, RepeatableSampler]

    def test_only_for_the_phase_that_draws(self, settings):
        arguments = {"eval_args": self.mode("full", "uni9"), "candidate_sampling": "non_interacted"}
        config, dataset, splits = self.splits(settings, **arguments)
        train, valid, test = create_samplers(config, dataset, splits)
        assert train is None and not isinstance(valid, CandidateSampler)
        assert isinstance(test, CandidateSampler)
        assert test.phase == "test" and test.dataset is splits[2]

    def test_by_popularity_is_a_contradiction(self, settings):
        arguments = {"eval_args": self.mode("uni9", "pop9"), "candidate_sampling": "non_interacted"}
        with pytest.raises(UserError, match=r"candidate_sampling.*pop9"):
            create_samplers(*self.splits(settings, **arguments))

    @pytest.mark.parametrize("model", ["SASRec", "BPR"])
    def test_a_stock_model_meets_no_item_of_the_users_own(self, model, settings):
        arguments = {"eval_args": self.mode("uni9", "uni9"), "candidate_sampling": "non_interacted"}
        if model == "SASRec":
            arguments["train_neg_sample_args"] = None
        config = Config(model=model, dataset="toy", config_dict={**settings, **arguments})
        dataset = create_dataset(config)
        own = interacted(settings)
        checked = 0
        for data in data_preparation(config, dataset)[1:]:
            for batch, row, _, positives in data:
                users = dataset.id2token("user_id", batch["user_id"].numpy())
                items = dataset.id2token("item_id", batch["item_id"].numpy())
                for user in sorted(set(row.tolist())):
                    target, *others = items[row.numpy() == user]
                    token = users[row.numpy() == user][0]
                    assert target in own[token] and target == dataset.id2token("item_id", positives[user].item())
                    assert len(set(others)) == 9 and not own[token] & set(others)
                    checked += 1
        assert checked == 60

    def test_all_items_of_a_user_are_known_though_histories_are_cut(self, settings):
        _, dataset, splits = self.splits(settings)
        items = plugin._user_items(splits)
        own = interacted(settings)
        assert len(items) == dataset.user_num and len(items[0]) == 0
        for user in range(1, dataset.user_num):
            tokens = dataset.id2token("item_id", items[user])
            assert len(tokens) == 9 and set(tokens) == own[dataset.id2token("user_id", user)]


class TestLoading:
    @pytest.fixture
    def loaded(self, monkeypatch):
        module = ModuleType("recbole_llm.loading")
        module.load_data_and_model = lambda file: ("loaded", file)
        monkeypatch.setitem(sys.modules, "recbole_llm.loading", module)
        monkeypatch.setattr(recbole_llm, "loading", module, raising=False)

    @pytest.mark.parametrize("kind", [str, Path])
    def test_a_checkpoint_of_ours(self, loaded, tmp_path, kind):
        (tmp_path / "recbole_llm.json").write_text("{}")
        (tmp_path / "model.safetensors").write_bytes(b"")
        for file in (kind(tmp_path), kind(tmp_path / "model.safetensors")):
            assert load_data_and_model(file) == ("loaded", file)
            assert quick_start_module.load_data_and_model(file) == ("loaded", file)

    @pytest.mark.parametrize("file", ["", "model.safetensors"])
    def test_a_folder_of_something_else(self, loaded, tmp_path, file):
        with pytest.raises(UserError, match=r"recbole_llm\.json"):
            load_data_and_model(str(tmp_path / file))

    def test_a_stock_checkpoint_goes_the_stock_way(self, loaded, tmp_path):
        (tmp_path / "recbole_llm.json").write_text("{}")
        with pytest.raises(FileNotFoundError):
            load_data_and_model(str(tmp_path / "BPR.pth"))


def test_registering_again_changes_nothing():
    def state():
        functions = (get_model, get_flops, create_samplers, load_data_and_model)
        methods = (Config.__init__, Config._load_internal_config_dict)
        hooks = (recbole.trainer.__getattr__, recbole.data.dataset.__getattr__)
        return [*(function.__kwdefaults__["_replacement"] for function in functions), *methods, *hooks]

    before = state()
    plugin.register()
    assert all(one is other for one, other in zip(before, state(), strict=True))


@pytest.mark.parametrize("name", plugin.ENTRY_POINTS)
def test_an_entry_point_is_sent_to_workers_by_a_name_of_ours(name):
    function = getattr(quick_start_module, name)
    assert b"recbole_llm.plugin" in pickle.dumps(function)
    assert pickle.loads(pickle.dumps(function)) is function


# RecBole first, as it comes; then with us; then in a worker, which imports this file under another name than __main__
# and so nothing of ours by itself.
SCRIPT = """
import hashlib, json, sys
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed

def stock_results():
    settings = json.loads({settings!r})
    configs = {{}}
    for model in ("BPR", "SASRec", "FM", "KGAT"):  # ml-100k has a YAML file of ours, too
        config = Config(model=model, dataset="ml-100k", config_dict=dict(settings, train_neg_sample_args=None))
        configs[model] = {{key: str(value) for key, value in vars(config).items() if key != "yaml_loader"}}
    config = Config(model="BPR", dataset="toy", config_dict=dict(settings, epochs=2))
    init_seed(config["seed"], True)
    train, valid, test = data_preparation(config, create_dataset(config))
    model = get_model("BPR")(config, train._dataset)
    trainer = get_trainer(config["MODEL_TYPE"], "BPR")(config, model)
    trainer.fit(train, valid, verbose=False, saved=False)
    weights = hashlib.sha256(b"".join(w.numpy().tobytes() for w in model.state_dict().values())).hexdigest()
    return [configs, weights, dict(trainer.evaluate(test, load_best_model=False))]

if __name__ == "__main__":
    try:
        results = [stock_results() and stock_results()]  # the first Config grows RecBole's global lists
    except AttributeError as error:
        results = [str(error)]
    import recbole_llm
    heavy = {{"transformers", "peft", "ray", "recbole_llm.trainer.trainer", "recbole_llm.data.dataset"}} & set(sys.modules)
    results += [stock_results(), sorted(heavy)]
    try:
        get_model("LLMSTARR")
    except ValueError as error:
        results.append(str(error))
    print(json.dumps(results), flush=True)
    from recbole.quick_start import run
    run("LLMSTARR", "ml-100k", nproc=1, world_size=1)
"""


@pytest.mark.slow
class TestOtherProcesses:
    @pytest.fixture(scope="class")
    def process(self, settings, tmp_path_factory):
        """What SCRIPT printed, and its errors."""
        folder = tmp_path_factory.mktemp("script")
        (folder / "script.py").write_text(SCRIPT.format(settings=json.dumps(settings)))
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "script.py"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.stdout, done.stderr
        return json.loads(done.stdout.splitlines()[-1]), done.stderr

    def test_stock_models_are_untouched(self, process):
        """Settings, trained weights and metrics, to the last bit."""
        without, with_plugin, _, _ = process[0]
        if "float_" in without:
            pytest.skip("RecBole itself does not run under NumPy 2")
        assert "ml-100k" in without[0]["SASRec"]["final_config_dict"] and without[2]["ndcg@10"] > 0
        assert with_plugin == without

    def test_the_import_is_light(self, process):
        assert process[0][2] == []

    def test_names_imported_before_us_know_our_models(self, process):
        assert process[0][3].endswith("did you mean 'LLMSTAR'?")

    def test_a_spawned_worker_knows_our_models(self, process):
        assert "ProcessRaisedException" in process[1]
        assert "UserError: There is no model named 'LLMSTARR'; did you mean 'LLMSTAR'?" in process[1]


# --- models of other packages -----------------------------------------------------------------------------------------

OUTSIDE_MODEL = '''
from recbole_llm.model.llmstar import LLMSTAR


class LLMX(LLMSTAR):
    """A model of another package."""


def register():
    from pathlib import Path

    from recbole_llm.registry import register_model

    register_model("LLMX", LLMX, Path(__file__).with_name("LLMX.yaml"), paper="Nobody, Nothing, 2030")


def fail():
    raise RuntimeError("it is broken")


def register_nothing():
    pass
'''
OUTSIDE_YAML = """\
# LLMX
forms: [retrieval, generation]
recommend_by: retrieval
tuning: lora
beta: 0.2                         # (float, >= 0) weight of something
similarity: cosine                # (str, one of cosine|dot) s
temperature: 1.0                  # (float, > 0) t
confidence: none                  # (str, one of cosine|none) c
negative_grad: True               # (bool) g
shuffle_negatives: 1              # (int, >= 0) n
window_negatives: 0               # (int, >= 0) n
last_negatives: 0                 # (int, >= 0) n
window_shortest: 2                # (int, >= 2) w
window_longest: 5                 # (int, >= 2) w
last_items: 3                     # (int, >= 2) l
item_projection_hidden_size: 8    # (int, > 0) h
share_prefix: True                # (bool) [cost] p
"""


@pytest.fixture
def no_models_of_others(monkeypatch):
    """The table as it is without other packages, and as it is again after the test."""
    monkeypatch.setattr(registry, "MODELS", dict(registry.MODELS))
    monkeypatch.setattr(plugin, "MODELS", registry.MODELS)
    monkeypatch.setenv("RECBOLE_LLM_MODELS", "{}")
    registry._warn_once.cache_clear()


@pytest.fixture
def outside(tmp_path, monkeypatch, no_models_of_others):
    """A folder on sys.path with the module ``llmx`` and its YAML file; nothing registered yet."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "llmx.py").write_text(OUTSIDE_MODEL)
    (folder / "LLMX.yaml").write_text(OUTSIDE_YAML)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    sys.modules.pop("llmx", None)


def install(folder: Path, name: str, value: str) -> None:
    """An installed distribution with one entry point."""
    info = folder / f"{name.lower()}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.lower()}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[recbole_llm.models]\n{name} = {value}\n")
    registry._entry_points.cache_clear()


def by_class(folder):
    import llmx

    registry.register_model("LLMX", llmx.LLMX, folder / "LLMX.yaml", paper="Nobody, Nothing, 2030")


def by_name(folder):
    recbole_llm.register_model("LLMX", "llmx:LLMX", str(folder / "LLMX.yaml"), paper="Nobody, Nothing, 2030")


def by_entry_point(folder):
    install(folder, "LLMX", "llmx:register")


class TestModelsOfOthers:
    @pytest.fixture(params=[by_class, by_name, by_entry_point], ids=lambda way: way.__name__)
    def registered(self, outside, request):
        request.param(outside)
        return outside

    def test_is_known_to_everything(self, registered):
        assert registry.is_ours("LLMX") and "LLMX" in registry.models() and "LLMX" in registry.known_models()
        assert get_model("LLMX").__name__ == "LLMX"
        assert get_trainer(get_model("LLMX").type, "LLMX").__name__ == "LLMTrainer"
        text = help_text(model="LLMX")
        assert "LLMX" in help_text() and "Nobody, Nothing, 2030" in help_text()
        assert "  beta = 0.2  (float, >= 0)\n      weight of something" in text and "  tuning = lora  (str, one of" in text
        keys = known_keys("LLMX")
        assert keys["tuning"].meaning and keys["tuning"].default == "lora" and keys["beta"].constraint == ">= 0"
        assert keys["recommend_by"].choices == ["retrieval", "generation"] and "title_prompts" in keys
        assert keys["share_prefix"].mark == "cost" and keys["beta"].where == f"{registered / 'LLMX.yaml'}:5"

    def test_its_settings_are_laid_and_checked(self, registered):
        config = make_config("LLMX", "ml-100k", config_dict={"out_tokens": 2})
        assert (config["tuning"], config["beta"], config["lora_r"], config["out_tokens"]) == ("lora", 0.2, 8, 2)
        assert config["item_text"] == ["movie_title"] and config["forms"] is None
        for given, said in (
            ({"beta": -1}, "beta must be a number >= 0, not -1"),
            ({"bta": 1}, "unknown key 'bta' (config_dict); did you mean 'beta'?"),
            ({"tuning": "ilp"}, "tuning must be one of frozen, lora, full"),
            ({"distill_weight": 1}, "'distill_weight' is a key of LLMSRec, not of LLMX"),
        ):
            with pytest.raises(UserError, match=re.escape(said)):
                make_config("LLMX", "ml-100k", config_dict=given)
        with pytest.raises(UserError, match=re.escape("'beta' is a key of LLMSTAR, RSLLM, LLMX, not of SASRec")):
            make_config("SASRec", "ml-100k", config_dict={"protocol": "full", "beta": 1})

    def test_its_variants_and_teacher(self, registered):
        models = ["SASRec", "LLMX", "LLMX:b"]
        given = {"LLMX:b.beta": 0, "beta": 0.5, "SASRec.n_layers": 1}
        found = {name: configure(name, "ml-100k", models, None, None, given) for name in models}
        assert [found[name]["beta"] for name in models] == [None, 0.5, 0]
        assert found["LLMX:b"]["teacher_settings"] == {"n_layers": 1}
        assert deciding_settings(teacher_config(found["LLMX"])) == deciding_settings(found["SASRec"])
        assert run_folder(found["LLMX"], "data") != run_folder(found["LLMX:b"], "data")
        with pytest.raises(UserError, match="RecBole has no model 'LLMX'"):
            make_config("LLMX", "ml-100k", config_dict={"teacher": "LLMX"})

    def test_a_typo_finds_it(self, registered):
        registry.models()
        with pytest.raises(UserError, match="did you mean 'LLMX'?"):
            get_model("LLMXX")

    @pytest.mark.slow
    def test_it_trains(self, registered, tiny_settings, chain_data):
        rows = compare(["LLMX"], "chain", settings={**tiny_settings, "epochs": 1, "eval_step": 1, "tuning": "frozen"})
        assert [row["model"] for row in rows] == ["LLMX", "SASRec"] and "error" not in rows[0]
        assert Path(rows[0]["checkpoint"]).name.startswith("LLMX-chain-")

    @pytest.mark.slow
    def test_a_spawned_worker_knows_it(self, registered):
        assert registry.is_ours("LLMX")
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as workers:
            assert workers.submit(what_a_worker_knows).result(timeout=100) == ("LLMX", 0.2)

    def test_the_same_model_may_be_registered_twice(self, registered):
        registry.models()
        by_name(registered)
        assert list(registry.models()).count("LLMX") == 1


def what_a_worker_knows() -> tuple[str, float]:
    return get_model("LLMX").__name__, make_config("LLMX", "ml-100k")["beta"]


class TestMistakesOfOthers:
    @pytest.mark.parametrize("name", ["LLMSTAR", "SASRec", "LightGBM"])
    def test_a_name_that_is_taken(self, outside, name):
        with pytest.raises(UserError, match=f"there is a model named {name} already; choose another name"):
            registry.register_model(name, "llmx:LLMX", outside / "LLMX.yaml")

    @pytest.mark.parametrize("name", ["LLM-X", "LLMX:b", "", None])
    def test_no_name(self, outside, name):
        with pytest.raises(UserError, match="is no name for a model"):
            registry.register_model(name, "llmx:LLMX", outside / "LLMX.yaml")

    def test_a_file_that_is_missing(self, outside):
        with pytest.raises(UserError, match=re.escape("LLMX names") + ".*missing.yaml as its properties, which is no file"):
            registry.register_model("LLMX", "llmx:LLMX", outside / "missing.yaml")
        assert "LLMX" not in registry.MODELS

    def test_a_class_that_no_other_process_finds(self, outside):
        class Local(Toy):
            pass

        for model in (Local, "llmx", "llmx.LLMX"):
            with pytest.raises(UserError, match="which is no module:class at the top of a module"):
                registry.register_model("LLMX", model, outside / "LLMX.yaml")

    @pytest.mark.parametrize(
        ("value", "said"),
        [
            ("llmx:fail", "model: LLMX cannot be registered by llmx:fail (it is broken)."),
            ("llmx:missing", "model: LLMX cannot be registered by llmx:missing (module 'llmx' has no attribute 'missing')."),
            ("nowhere:register", "model: LLMX cannot be registered by nowhere:register (No module named 'nowhere')."),
            ("llmx:register_nothing", "llmx:register_nothing registers no model named LLMX: call register_model there."),
        ],
    )
    def test_a_broken_entry_point_is_one_sentence(self, outside, caplog, value, said):
        install(outside, "LLMX", value)
        with pytest.raises(UserError, match=re.escape(said)):
            registry.is_ours("LLMX")
        with pytest.raises(UserError, match=re.escape(said)):
            make_config("LLMX", "ml-100k")
        # Others are not disturbed, and hear of it once.
        for _ in range(2):
            assert make_config("LLMSTAR", "ml-100k")["beta"] == 0.4 and "LLMX" not in registry.models()
        assert [record.getMessage() for record in caplog.records if "LLMX" in record.getMessage()] == [
            said if said.startswith("model:") else f"model: {said}"
        ]

    def test_an_entry_point_takes_no_name_of_recbole(self, outside):
        install(outside, "SASRec", "llmx:fail")
        assert not registry.is_ours("SASRec") and get_model("SASRec") is SASRec
        assert make_config("SASRec", "ml-100k", config_dict={"protocol": "full"})["model"] == "SASRec"

    def test_a_file_that_cannot_be_read_names_itself(self, outside):
        by_name(outside)
        (outside / "LLMX.yaml").write_text("forms: [chat]\n")
        with pytest.raises(UserError, match=re.escape(f"{outside / 'LLMX.yaml'}: forms must be a list of any of generation, ")):
            make_config("LLMX", "ml-100k")
