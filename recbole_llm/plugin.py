"""How RecBole finds the models of the registry, their settings and checkpoints: the only code that touches its look-ups."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from logging import getLogger
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from recbole_llm.compat import redirect
from recbole_llm.config.checks import no_such_model
from recbole_llm.config.identity import data_settings
from recbole_llm.errors import UserError
from recbole_llm.registry import BASELINES, MODELS, is_ours, known_models, resolve


def register() -> None:
    """Make RecBole know ``MODELS``. Called by ``import recbole_llm``; calling it again changes nothing."""
    import recbole.data.dataset
    import recbole.data.utils
    import recbole.quick_start.quick_start as quick_start
    import recbole.trainer
    import recbole.utils.logger
    import recbole.utils.utils
    from recbole.config import Config

    redirect(recbole.utils.utils.get_model, _get_model)
    redirect(recbole.utils.utils.get_flops, _get_flops)
    redirect(recbole.data.utils.create_dataset, _create_dataset)
    redirect(recbole.data.utils.load_split_dataloaders, _load_split_dataloaders)
    redirect(recbole.data.utils.create_samplers, _create_samplers)
    redirect(quick_start.load_data_and_model, _load_data_and_model)
    redirect(recbole.utils.logger.init_logger, _init_logger)
    _know_metrics()
    _offer(recbole.data.dataset, "Dataset", "dataset")
    _offer(recbole.trainer, "Trainer", "trainer")
    _wrap_method(Config, "_load_internal_config_dict", _load_internal_config_dict)
    _wrap_method(Config, "__init__", _init_config)
    for name in ENTRY_POINTS:
        _adopt(getattr(quick_start, name))


def _know_metrics() -> None:
    """Add the metric without a cut-off, ``MRR@all``, to RecBole's."""
    from recbole.evaluator import register as known
    from recbole.evaluator.base_metric import AbstractMetric
    from recbole.utils import EvaluatorType

    class MRRAll(AbstractMetric):
        """Mean reciprocal rank over all candidates, in RecBole's own runner; equal scores share their mean rank."""

        metric_type = EvaluatorType.RANKING
        metric_need = ["rec.meanrank"]

        def calculate_metric(self, dataobject):
            ranks = dataobject.get("rec.meanrank").double()
            return {"mrr@all": round(float((ranks[:, 2] / ranks[:, 0]).mean()), self.decimal_place)}

    if "mrr@all" not in known.metrics_dict:
        known.metrics_dict["mrr@all"] = MRRAll
        known.metric_types["mrr@all"] = MRRAll.metric_type
        known.metric_information["mrr@all"] = MRRAll.metric_need


# ---------------------------------------------------------------------------------------------------------------------
# Other processes
# ---------------------------------------------------------------------------------------------------------------------

ENTRY_POINTS = ("run", "run_recbole", "run_recboles", "objective_function", "load_data_and_model")


def __getattr__(name: str) -> Any:
    """A worker that looks for one of RecBole's functions here has not imported RecBole yet."""
    if name in ENTRY_POINTS:
        register()
        return globals()[name]
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def _adopt(function: FunctionType) -> None:
    """Let whoever unpickles RecBole's ``function`` import this library.

    ``mp.spawn`` and Ray send a function to their workers by the name of its module. The worker imports that module,
    and knows our models if it is this one.
    """
    function.__module__ = __name__
    setattr(sys.modules[__name__], function.__name__, function)


# ---------------------------------------------------------------------------------------------------------------------
# Models, datasets, trainers
# ---------------------------------------------------------------------------------------------------------------------


def _get_model(stock: FunctionType) -> Callable:
    def get_model(model_name):
        if is_ours(model_name):
            return resolve(MODELS[model_name].model)
        if model_name in BASELINES:
            return resolve(BASELINES[model_name].model)
        try:
            return stock(model_name)
        except (ValueError, AttributeError, ImportError):
            # RecBole looks for an unknown name in lightgbm and xgboost last, and complains that those are missing.
            known = known_models()
            if not isinstance(model_name, str) or model_name in known:
                raise
            raise no_such_model(model_name) from None

    return get_model


def _get_flops(stock: FunctionType) -> Callable:
    """RecBole counts on a deep copy of the model, with a buffer in every module: too much of an LLM."""

    def get_flops(model, dataset, device, logger, transform, verbose=False):
        if not is_ours(type(model).__name__):
            return stock(model, dataset, device, logger, transform, verbose)
        import torch
        from torch.utils.flop_counter import FlopCounterMode

        interaction = transform(dataset, dataset[torch.tensor([1])].to(device))
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                try:
                    model.predict(interaction)
                except UserError:  # a form that ranks candidates together: one is scored
                    model.score(interaction, interaction[model.ITEM_ID][:, None])
        finally:
            model.train(was_training)
        return counter.get_total_flops()

    return get_flops


def _offer(module: ModuleType, suffix: str, part: str) -> None:
    """Let ``module`` have an attribute ``<Model><suffix>`` for each of our models, imported when it is asked for."""
    previous = vars(module).get("__getattr__")
    if getattr(previous, "__module__", None) == __name__:
        return

    def __getattr__(name: str) -> Any:
        model = name.removesuffix(suffix)
        if name.endswith(suffix) and (is_ours(model) or model in BASELINES):
            return resolve(getattr(MODELS.get(model) or BASELINES[model], part))
        if previous is not None:
            return previous(name)
        raise AttributeError(f"module '{module.__name__}' has no attribute '{name}'")

    module.__getattr__ = __getattr__


def _init_logger(stock: FunctionType) -> Callable:
    """Metrics of our protocols are not rounded: RecBole's messages would print all their digits."""

    def init_logger(config):
        stock(config)
        if _uses_our_settings(config, config["model"]):
            from recbole_llm.results.log import Readable  # with TensorBoard: slow to import

            for handler in getLogger().handlers:
                handler.addFilter(Readable())

    return init_logger


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------


def _wrap_method(owner: type, name: str, make_wrapper: Callable[[Callable], Callable]) -> None:
    stock = getattr(owner, name)
    if not hasattr(stock, "_stock_of_recbole_llm"):
        wrapper = functools.wraps(stock)(make_wrapper(stock))
        wrapper._stock_of_recbole_llm = stock
        setattr(owner, name, wrapper)


def _uses_our_settings(config: Any, model: Any) -> bool:
    return is_ours(model) or getattr(config, "external_config_dict", {}).get("protocol") is not None


def _load_internal_config_dict(stock: Callable) -> Callable:
    def _load_internal_config_dict(self, model, model_class, dataset):
        stock(self, model, model_class, dataset)
        if _uses_our_settings(self, model) or model in BASELINES:
            from recbole_llm.config.settings import load_internal

            load_internal(self, model, model_class, dataset)

    return _load_internal_config_dict


def _init_config(stock: Callable) -> Callable:
    def __init__(self, *args, **kwargs):
        stock(self, *args, **kwargs)
        if _uses_our_settings(self, self.model):
            from recbole_llm.config.settings import finish

            finish(self)
        if "setting_origins" not in self.__dict__:  # one of RecBole's own runners
            _tell_of_other_protocols(self)

    return __init__


_MEASURED: dict[str | None, str] = {}  # protocol -> the first model of this process that RecBole's own runners measured by it


def _tell_of_other_protocols(config: Any) -> None:
    """Warn once where models of one process are measured by different protocols: their metrics cannot be compared."""
    protocol = config["protocol"]
    others = {other: model for other, model in _MEASURED.items() if other != protocol}
    if protocol not in _MEASURED and others:
        (other, model), *_ = others.items()
        names = {name: f"protocol: {name}" if name else "RecBole's own protocol" for name in (protocol, other)}
        wanted, changed = (other, config["model"]) if other is not None else (protocol, model)
        getLogger().warning(
            "%s is measured by %s, %s by %s: their metrics are not comparable. For a comparison set protocol: %s for %s too, "
            "or run both by run_recbole_llm.py.",
            config["model"], names[protocol], model, names[other], wanted, changed,
        )  # fmt: skip
    _MEASURED.setdefault(protocol, config["model"])


# ---------------------------------------------------------------------------------------------------------------------
# Data and candidates
# ---------------------------------------------------------------------------------------------------------------------


def _check_trust(config: Any, key: str, file: str) -> None:
    """Refuse to unpickle a data set that RecBole would take up, in runs of ours: unpickling runs what the file says.

    Raises:
        UserError: the file is there, and trust_files is not set.
    """
    path = Path(config[key] or Path(config["checkpoint_dir"]) / file)
    if os.path.lexists(path) and not config["trust_files"] and (is_ours(config["model"]) or config["protocol"] is not None):
        raise UserError(
            f"{key}: {path} would be unpickled, which runs whatever the file says; remove it, name another file, or set "
            f"trust_files to True if you know where it comes from."
        )


def _dataset_class(config: Any) -> str:
    """The name of the class that RecBole makes a data set of, by which it names the file."""
    import recbole.data.dataset
    from recbole.utils import ModelType

    own = getattr(recbole.data.dataset, f"{config['model']}Dataset", None)
    if own is not None:
        return own.__name__
    kinds = {ModelType.SEQUENTIAL: "SequentialDataset", ModelType.KNOWLEDGE: "KnowledgeBasedDataset"}
    return kinds.get(config["MODEL_TYPE"], "Dataset")


def _load_split_dataloaders(stock: FunctionType) -> Callable:
    def load_split_dataloaders(config):
        _check_trust(config, "dataloaders_save_path", f"{config['dataset']}-for-{config['model']}-dataloader.pth")
        return stock(config)

    return load_split_dataloaders


def _create_dataset(stock: FunctionType) -> Callable:
    def create_dataset(config):
        _check_trust(config, "dataset_save_path", f"{config['dataset']}-{_dataset_class(config)}.pth")
        # RecBole loads a saved dataset again where its own settings are as they were; the texts' are not among them.
        dataset = stock(config)
        if not is_ours(config["model"]) or data_settings(dataset.config) == data_settings(config):
            return dataset
        dataset = type(dataset)(config)
        if config["save_dataset"]:
            dataset.save()
        return dataset

    return create_dataset


def _create_samplers(stock: FunctionType) -> Callable:
    def create_samplers(config, dataset, built_datasets):
        train, *evaluation = stock(config, dataset, built_datasets)
        if "candidate_sampling" not in config or config["candidate_sampling"] != "non_interacted":
            return train, *evaluation
        from recbole_llm.evaluation.candidates import CandidateSampler

        for place, phase in enumerate(("valid", "test")):
            arguments = config[f"{phase}_neg_sample_args"]
            if not isinstance(arguments["sample_num"], int):  # full ranking, or labels: nothing is drawn
                continue
            if arguments["distribution"] != "uniform":
                raise UserError(
                    f"candidate_sampling: non_interacted draws candidates uniformly, but eval_args asks for "
                    f"'{config['eval_args']['mode'][phase]}'; use uniN, or candidate_sampling: recbole."
                )
            split = built_datasets[1 + place]
            if not hasattr(split, "user_items"):
                split.user_items = _user_items(built_datasets)
            evaluation[place] = CandidateSampler(split, config, phase)
        return train, *evaluation

    return create_samplers


def _user_items(splits: Sequence[Any]) -> Any:
    """Per internal user id, the sorted distinct items of the user in all splits of one of RecBole's own datasets."""
    import numpy as np

    from recbole_llm.data.sequences import Ragged

    users, items = [], []
    for split in splits:
        rows = split.inter_feat
        users.append(rows[split.uid_field].numpy())
        items.append(rows[split.iid_field].numpy())
        histories = split.iid_field + split.config["LIST_SUFFIX"]
        if histories in rows:
            # Every item of a user is some row's target, but the first one, which opens the first row's history.
            users.append(users[-1])
            items.append(rows[histories][:, 0].numpy())
    pairs = np.unique(np.stack([np.concatenate(users), np.concatenate(items)]), axis=1)
    return Ragged(pairs[1], np.searchsorted(pairs[0], np.arange(splits[0].user_num + 1)))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def _load_data_and_model(stock: FunctionType) -> Callable:
    def load_data_and_model(model_file):
        path = Path(model_file)
        folder = path.parent if path.suffix == ".safetensors" else path
        if (folder / "recbole_llm.json").is_file():
            from recbole_llm.loading import load_data_and_model

            return load_data_and_model(model_file)
        if path.is_dir() or path.suffix == ".safetensors":
            raise UserError(f"{folder} holds no recbole_llm.json: it is not a checkpoint of this library.")
        return stock(model_file)

    return load_data_and_model
