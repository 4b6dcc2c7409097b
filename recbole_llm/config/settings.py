"""Settings: RecBole's Config with our YAML files below the user's, and every mistake named.

Precedence, highest first: command line, ``config_dict``, config files, then our files (targets, backbone, preset, dataset,
model, forms, llm or stock, protocol, overall), then RecBole's own. A stock model sees our files, and is checked, only where
``protocol`` is set.
Types, ranges and meanings of the keys come from the comments of the YAML files, see :mod:`recbole_llm.config.schema`.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from recbole_llm import registry
from recbole_llm.config.checks import did_you_mean, draws_negatives, origin_of, validate
from recbole_llm.config.presets import preset_settings, presets_of
from recbole_llm.config.schema import (
    SettingsLoader,
    is_file_name,
    known_keys,
    load_yaml,
    read_settings_file,
    settings_files,
    shared_schema,
)
from recbole_llm.errors import UserError

VALID_USERS = {True: 2000, False: 150}  # of valid_users: auto, by whether there is a GPU

# --- our files under RecBole's --------------------------------------------------------------------------------------


def applies(model: str, external: Mapping[str, Any]) -> bool:
    """Whether our files and checks hold for a run: for our models always, for a stock one where ``protocol`` is set."""
    return registry.is_ours(model) or external.get("protocol") is not None


def lone(value: Any) -> Any:
    """The entry of a list of one, anything else as it is: ``protocol: [full]`` is ``protocol: full``."""
    return value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value


def load_internal(config: Any, model: str, model_class: type, dataset: str) -> None:
    """Lay our YAML files over RecBole's defaults, below what the user says, and check the user's settings.

    To be called at the end of ``Config._load_internal_config_dict``; changes ``config.internal_config_dict``.

    Raises:
        UserError: see :func:`validate`.
    """
    external = config.external_config_dict
    of_model: dict[str, Any] = {}
    if model in registry.BASELINES:
        of_model = load_yaml(registry.properties_of(model))
        config.internal_config_dict.update(copy.deepcopy(of_model))
    if not applies(model, external):
        return
    ours = registry.is_ours(model)
    root, internal = registry.properties_folder(), config.internal_config_dict
    recbole_negatives = internal.get("train_neg_sample_args")

    overall = load_yaml(root / "overall.yaml")
    for file in settings_files(model) if ours else ():
        of_model.update(load_yaml(file))
    of_model.pop("forms", None)
    of_preset = preset_settings(model, external.get("preset"), dataset, origin_of(config, "preset")) if ours else {}
    usual = {**of_model, **of_preset}.get("recommend_by")
    if usual is not None and external.get("recommend_by", usual) != usual:
        for values in (of_model, of_preset):
            values.pop("protocol", None)  # of the form in which it is not asked
    if "protocol" in external:
        external["protocol"] = lone(external["protocol"])
    protocol = external.get("protocol", {**overall, **of_model, **of_preset}["protocol"])
    protocols = sorted(path.stem for path in (root / "protocol").glob("*.yaml"))
    if protocol not in protocols:
        raise UserError(
            f"protocol must be one of {', '.join(protocols)}, not {protocol!r}{did_you_mean(protocol, protocols)}"
            f" ({origin_of(config, 'protocol')})."
        )
    of_dataset = _optional(root, "dataset", dataset) or beside_data(config, dataset)
    of_stock = {} if ours else load_yaml(root / "stock.yaml")
    if not ours:  # it may say things for LLM recommenders alone, such as the wording of prompts
        schema = shared_schema()
        for_llm = schema["llm"].keys() - schema["overall"].keys() - internal.keys()
        of_dataset = {key: value for key, value in of_dataset.items() if key not in for_llm}
    for values in (overall, load_yaml(root / "protocol" / f"{protocol}.yaml"), of_stock, of_model, of_dataset, of_preset):
        internal.update(copy.deepcopy(values))
    _limit_candidates(internal, external.get("most_candidates", internal["most_candidates"]))
    if ours:
        backbone = external.get("backbone", internal.get("backbone"))
        internal.update(copy.deepcopy(_optional(root, "backbone", backbone)))
        targets = external.get("train_targets", internal.get("train_targets"))
        internal.update(copy.deepcopy(_optional(root, "targets", targets)))
    else:
        of_preset = _of_teacher_preset(config, model)
        internal.update(of_preset)
        _fit_to_stock_model(internal, external, model_class, recbole_negatives)

    given = external.get("teacher_settings")
    if isinstance(given, dict) and of_preset.get("teacher_settings"):  # what is said of the teacher does not take the rest back
        external["teacher_settings"] = {**of_preset["teacher_settings"], **given}

    # RecBole replaces a mapping as a whole: `eval_args: {mode: full}` would also reset split and order.
    if isinstance(external.get("eval_args"), dict):
        external["eval_args"] = {**internal["eval_args"], **external["eval_args"]}
    fields = ("USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD")
    if any(field in external for field in fields):
        internal["load_col"] = {"inter": [external.get(field, internal[field]) for field in fields]}
    validate(config)


def _optional(root: Path, kind: str, name: Any) -> dict[str, Any]:
    path = root / kind / f"{name}.yaml"
    return load_yaml(path) if is_file_name(name) and path.is_file() else {}


def _of_teacher_preset(config: Any, model: str) -> dict[str, Any]:
    """The recipe that ``teacher_preset`` names, for a stock model that has one of that name."""
    name = config.external_config_dict.get("teacher_preset")
    return preset_settings(model, name, None) if name in presets_of(model) else {}


def beside_data(config: Any, dataset: Any) -> dict[str, Any]:
    """The settings that lie next to a dataset's files, as ``recbole-llm prepare`` writes them."""
    data_path = config.external_config_dict.get("data_path", config.internal_config_dict.get("data_path"))
    path = Path(str(data_path), str(dataset), f"{dataset}.yaml")
    return load_yaml(path) if is_file_name(dataset) and path.is_file() else {}


def _limit_candidates(internal: dict[str, Any], most: Any) -> None:
    """Let a protocol's uniN draw ``most`` other candidates where the catalogue is too small for N."""
    internal["eval_args"]["mode"] = limited_mode(internal["eval_args"]["mode"], most)


def limited_mode(mode: str, most: Any) -> str:
    """A protocol's ``mode`` with at most ``most`` other candidates; None: as many as it says."""
    number = re.fullmatch(r"uni(\d+)", str(mode))
    return f"uni{most}" if number is not None and isinstance(most, int) and most < int(number[1]) else mode


def _fit_to_stock_model(internal: dict, external: Mapping, model_class: type, recbole_negatives: Any) -> None:
    """Take back from the preset what only suits sequential models trained by cross-entropy."""
    from recbole.utils import ModelType

    if draws_negatives(model_class, {**internal, **external}):
        internal["train_neg_sample_args"] = copy.deepcopy(recbole_negatives)
    if model_class.type != ModelType.SEQUENTIAL:
        internal["repeatable"] = False


def finish(config: Any) -> None:
    """Set the device of the finished Config, which RecBole leaves open; for the end of ``Config.__init__``."""
    if not applies(config.model, config.external_config_dict):
        return
    import torch

    # RecBole reads `use_gpu` in some places only; here it decides the device, and the two always agree.
    final = config.final_config_dict
    if not final.get("use_gpu", True):
        final["device"] = torch.device("cpu")
    final["use_gpu"] = torch.device(final["device"]).type != "cpu"
    if final.get("valid_users") == "auto":
        final["valid_users"] = VALID_USERS[final["use_gpu"]]


# --- a Config in isolation ------------------------------------------------------------------------------------------


def make_config(
    model: str | type,
    dataset: str,
    config_file_list: Sequence[str | os.PathLike] | None = None,
    config_dict: Mapping[str, Any] | None = None,
    command_line: Mapping[str, Any] | None = None,
) -> Any:
    """Build a RecBole ``Config`` from these arguments and nothing else.

    Unlike ``Config(...)`` it reads no ``sys.argv``, evaluates no string as Python, and leaves RecBole's global lists
    and ``CUDA_VISIBLE_DEVICES`` as they were. Where the user names no ``gpu_id``, ``CUDA_VISIBLE_DEVICES`` holds.

    Args:
        model: name of one of our models or of a stock one, or a model class.
        dataset: name of a dataset, a folder under ``data_path``.
        config_file_list: YAML files, a later one wins.
        config_dict: settings, win over the files.
        command_line: settings from :func:`parse_command_line`, win over both.

    Raises:
        UserError: unknown model or dataset, or see :func:`validate`.
    """
    from recbole.config import Config

    files: dict[str, Any] = {}
    origins: dict[str, str] = {}
    paths = [config_file_list] if isinstance(config_file_list, (str, os.PathLike)) else config_file_list
    for path in paths or ():
        values, line_of_key, _ = read_settings_file(Path(path))
        files.update(values)
        origins.update({name: f"{path}:{line_of_key[name] + 1}" for name in values})
    origins.update(dict.fromkeys(config_dict or {}, "config_dict"))
    origins.update(dict.fromkeys(command_line or {}, "command line"))
    given = copy.deepcopy(dict(config_dict or {})), copy.deepcopy(dict(command_line or {}))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and "gpu_id" not in origins:
        given[0]["gpu_id"], origins["gpu_id"] = visible, "CUDA_VISIBLE_DEVICES"

    class IsolatedConfig(Config):
        def _init_parameters_category(self) -> None:
            super()._init_parameters_category()
            self.parameters = {category: list(names) for category, names in self.parameters.items()}

        def _build_yaml_loader(self) -> type:
            return SettingsLoader  # RecBole's grows yaml.FullLoader by one resolver at each Config

        def _load_config_files(self, file_list: Any) -> dict[str, Any]:
            return files

        def _load_variable_config_dict(self, config_dict: Any) -> dict[str, Any]:
            return given[0]

        def _load_cmd_line(self) -> dict[str, Any]:
            return given[1]

    config = IsolatedConfig.__new__(IsolatedConfig)
    config.setting_origins = origins
    try:
        config.__init__(model=model, dataset=dataset)
    finally:
        if visible is None:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
    config.__class__ = Config  # a stock trainer pickles the Config: its class must be one that can be imported
    config.yaml_loader = yaml.FullLoader
    check_dataset(config.dataset, Path(config["data_path"]))
    return config


def check_dataset(dataset: str, folder: Path) -> None:
    """Refuse a dataset whose ``folder`` is missing, unless RecBole knows where to fetch it.

    Raises:
        UserError: naming the datasets that are there.
    """
    if folder.is_dir() or dataset in load_yaml(registry.recbole_folder() / "properties" / "dataset" / "url.yaml"):
        return
    command = _optional(registry.properties_folder(), "dataset", dataset).get("prepare_command")
    if command:
        place = "" if folder.parent == Path("dataset") else f" --data-path={folder.parent}"
        raise UserError(f"the dataset '{dataset}' is not in '{folder}' yet: run `{command}{place}`, which makes it.")
    found = datasets_in(folder.parent)
    raise UserError(
        f"unknown dataset '{dataset}': there is no folder '{folder}'"
        f"{did_you_mean(dataset, [*found, 'ml-100k'])} "
        f"(data_path holds {', '.join(found) or 'no dataset'}; ml-100k comes with RecBole; "
        "`recbole-llm prepare --help` lists public ones)."
    )


def datasets_in(data_path: str | os.PathLike) -> list[str]:
    """Return the names of the datasets found under ``data_path``: folders with an ``.inter`` file of some kind."""
    root = Path(data_path)
    if not root.is_dir():
        return []
    return sorted(folder.name for folder in root.iterdir() if folder.is_dir() and any(folder.glob("*.inter")))


def settings_for(
    model: str, settings: Mapping[str, Any], models: Sequence[str], teachers: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the part of a run's settings that is meant for one of its models.

    ``{"SASRec.epochs": 5}`` is for SASRec only, and wins over a plain ``epochs``; ``{"SASRec:long.epochs": 50}`` is for the
    variant ``SASRec:long`` only, and wins over both. A plain key that this model does not know goes to those of ``models``
    that do; one that none of them knows stays, so that it is reported.

    Args:
        model: the model, or a variant of one.
        settings: as from :func:`parse_command_line`.
        models: all models and variants of the run.
        teachers: their teachers, which keys may name although they are not among the models.

    Raises:
        UserError: a prefix that names no model of the run.
    """
    known = {name: known_keys(model_of(name)) for name in models}
    may_be = {*models, *map(model_of, models), *teachers}
    general: dict[str, Any] = {}
    special: dict[str, Any] = {}
    of_variant: dict[str, Any] = {}
    for name, value in settings.items():
        prefix, dot, key = name.partition(".")
        if dot:
            if prefix not in may_be:
                raise UserError(
                    f"'{name}': '{prefix}' is no model of this run ({', '.join(models)}){did_you_mean(prefix, may_be)}"
                )
            if prefix == model_of(model):
                special[key] = value
            elif prefix == model:
                of_variant[key] = value
        elif name in known[model] or not any(name in keys for keys in known.values()):
            general[name] = value
    return {**general, **special, **of_variant}


def model_of(label: str) -> str:
    """The model of a variant: ``LLMSTAR`` of ``LLMSTAR:plain``; a model without a variant's name is its own."""
    return label.partition(":")[0]


T = TypeVar("T")


def select(kind: type[T], settings: Mapping[str, Any]) -> T:
    """Fill a frozen dataclass from a run's settings, so that no room reads the configuration itself.

    Each field takes the key of its name; ``field(metadata={"key": "beta"})`` names another key.

    Args:
        kind: a dataclass.
        settings: a RecBole Config, or a mapping. A key that it lacks is None, as in RecBole's Config.
    """
    values = {}
    for field in dataclasses.fields(kind):
        key = field.metadata.get("key", field.name)
        try:
            values[field.name] = settings[key]
        except KeyError:
            values[field.name] = None
    return kind(**values)
