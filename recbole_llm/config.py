"""Settings: RecBole's Config with our YAML files below the user's, and every mistake named.

Precedence, highest first: command line, ``config_dict``, config files, then our files (backbone, dataset, model,
protocol, overall), then RecBole's own. A stock model sees our files, and is checked, only where ``protocol`` is set.
Types, ranges and meanings of the keys come from the comments of the YAML files, see :mod:`recbole_llm.schema`.
"""

from __future__ import annotations

import copy
import logging
import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from recbole_llm.errors import UserError, closest
from recbole_llm.schema import (
    Key,
    Schema,
    SettingsLoader,
    is_file_name,
    known_keys,
    load_yaml,
    parse_value,
    read_schema,
    read_settings_file,
    recbole_folder,
    stock_model_keys,
    stock_models,
)

__all__ = [
    "Key",
    "applies",
    "datasets_in",
    "finish",
    "help_text",
    "known_keys",
    "load_internal",
    "load_yaml",
    "make_config",
    "parse_command_line",
    "read_schema",
    "model_of",
    "settings_for",
    "stock_models",
    "validate",
]

_NESTED = {
    "eval_args": ("split", "order", "group_by", "mode"),
    "train_neg_sample_args": ("distribution", "sample_num", "alpha", "dynamic", "candidate_num"),
    "clip_grad_norm": ("max_norm", "norm_type", "error_if_nonfinite", "foreach"),
}
_ATOMIC_FILES = ("inter", "user", "item", "kg", "link", "net")


# --- our files under RecBole's --------------------------------------------------------------------------------------


def applies(model: str, external: Mapping[str, Any]) -> bool:
    """Whether our files and checks hold for a run: for our models always, for a stock one where ``protocol`` is set."""
    from recbole_llm.registry import is_ours

    return is_ours(model) or external.get("protocol") is not None


def load_internal(config: Any, model: str, model_class: type, dataset: str) -> None:
    """Lay our YAML files over RecBole's defaults, below what the user says, and check the user's settings.

    To be called at the end of ``Config._load_internal_config_dict``; changes ``config.internal_config_dict``.

    Raises:
        UserError: see :func:`validate`.
    """
    from recbole_llm.registry import MODELS, is_ours, properties_folder

    external = config.external_config_dict
    if not applies(model, external):
        return
    ours = is_ours(model)
    root, internal = properties_folder(), config.internal_config_dict
    recbole_negatives = internal.get("train_neg_sample_args")

    overall = load_yaml(root / "overall.yaml")
    of_model = load_yaml(root / MODELS[model].properties) if ours else {}
    protocol = external.get("protocol", of_model.get("protocol", overall["protocol"]))
    protocols = sorted(path.stem for path in (root / "protocol").glob("*.yaml"))
    if protocol not in protocols:
        raise UserError(
            f"protocol must be one of {', '.join(protocols)}, not {protocol!r}{_hint(protocol, protocols)}"
            f" ({_origin(config, 'protocol')})."
        )
    files = [overall, load_yaml(root / "protocol" / f"{protocol}.yaml"), of_model, _optional(root, "dataset", dataset)]
    for values in files:
        internal.update(copy.deepcopy(values))
    if ours:
        backbone = external.get("backbone", internal.get("backbone"))
        internal.update(copy.deepcopy(_optional(root, "backbone", backbone)))
    else:
        _fit_to_stock_model(internal, external, model_class, recbole_negatives)

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


def _fit_to_stock_model(internal: dict, external: Mapping, model_class: type, recbole_negatives: Any) -> None:
    """Take back from the preset what only suits sequential models trained by cross-entropy."""
    from recbole.utils import ModelType

    if _draws_negatives(model_class, {**internal, **external}):
        internal["train_neg_sample_args"] = copy.deepcopy(recbole_negatives)
    if model_class.type != ModelType.SEQUENTIAL:
        internal["repeatable"] = False


def _draws_negatives(model_class: type, settings: Mapping) -> bool:
    """Whether RecBole's dataloader draws training negatives for a stock model: not under a softmax over all items."""
    from recbole.utils import ModelType

    return model_class.type != ModelType.SEQUENTIAL or settings.get("loss_type") not in ("CE", "NLL")


def finish(config: Any) -> None:
    """Check the finished Config once more and set what RecBole leaves open; for the end of ``Config.__init__``.

    Raises:
        UserError: see :func:`validate`.
    """
    if not applies(config.model, config.external_config_dict):
        return
    validate(config)
    import torch

    # RecBole reads `use_gpu` in some places only; here it decides the device, and the two always agree.
    final = config.final_config_dict
    if not final.get("use_gpu", True):
        final["device"] = torch.device("cpu")
    final["use_gpu"] = torch.device(final["device"]).type != "cpu"


# --- checks ---------------------------------------------------------------------------------------------------------


def validate(config: Any) -> None:
    """Check every setting that the user gave, and what they amount to together.

    Values are put into their key's type (see :meth:`Key.fit`). A key that nobody knows is an error, except on a foreign
    program's command line (``sys.argv`` of pytest, say), which RecBole reads too: there it is dropped with a warning.

    Raises:
        UserError: an unknown key, a value of the wrong type or out of range, settings that exclude each other.
    """
    model, model_class = config.model, config.model_class
    external, known = config.external_config_dict, known_keys(config.model, config.model_class)
    for name in list(external):
        value, where = external[name], _origin(config, name)
        if name not in known:
            if name in config.cmd_config_dict and not _isolated(config):
                logging.getLogger().warning("command line: '%s' is no key of %s and is ignored", name, model)
                del external[name]
                continue
            raise UserError(_unknown(name, model, known, config, where))
        external[name] = _fitted(known[name], value, where)
    settings = {**config.internal_config_dict, **external}
    _check_nested(config, settings)
    _check_columns(config, settings)
    _check_evaluation(config, settings)
    _check_labels(config, settings)
    _check_training(config, settings, model, model_class)
    _check_teacher(config, settings)


def _isolated(config: Any) -> bool:
    return "setting_origins" in config.__dict__


def _origin(config: Any, name: str) -> str:
    """Say where a setting came from."""
    origins = config.__dict__.get("setting_origins", {})
    if name in origins:
        return origins[name]
    if name in config.cmd_config_dict:
        return "command line"
    if name in config.variable_config_dict:
        return "config_dict"
    if name in config.file_config_dict:
        return "config file"
    return "default"


def _hint(name: Any, known: Iterable[str]) -> str:
    near = closest(str(name), known)
    return f"; did you mean '{near}'?" if near else ""


def _fitted(key: Key, value: Any, where: str) -> Any:
    try:
        return key.fit(value)
    except ValueError:
        shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
        hint = _hint(value, key.choices) if isinstance(value, str) else ""
        raise UserError(f"{key.name} must be {key.allowed_values()}, not {shown}{hint} ({where}).") from None


def _unknown(name: str, model: str, known: Iterable[str], config: Any, where: str) -> str:
    """Say what is wrong with a key that the model does not know."""
    from recbole_llm.registry import is_ours

    schema = read_schema()
    owners = [group[len("model/") :] for group, keys in schema.items() if group.startswith("model/") and name in keys]
    if owners:
        return f"'{name}' is a key of {', '.join(owners)}, not of {model} ({where})."
    settings = {**config.internal_config_dict, **config.external_config_dict}
    teacher = settings.get("teacher")
    if is_ours(model) and isinstance(teacher, str) and name in stock_model_keys(teacher, None):
        return (
            f"'{name}' is a key of the teacher {teacher}, not of {model}: "
            f"write teacher_settings: {{{name}: ...}} ({where})."
        )
    return f"unknown key '{name}' ({where}){_hint(name, known) or '; --help lists the keys.'}"


def _check_nested(config: Any, settings: Mapping) -> None:
    for name, parts in _NESTED.items():
        value = settings.get(name)
        if isinstance(value, dict):
            _check_parts(name, value, parts, _origin(config, name))
    suffixes = settings.get("additional_feat_suffix") or []
    files = [*_ATOMIC_FILES, *([suffixes] if isinstance(suffixes, str) else suffixes)]
    for name in ("load_col", "unload_col"):
        columns = settings.get(name)
        if isinstance(columns, dict):
            _check_parts(name, columns, files, _origin(config, name))
            for file, fields in columns.items():
                if not isinstance(fields, (list, tuple)) and fields != "*":
                    raise UserError(
                        f"{name}: the columns of '{file}' must be a list such as [user_id, item_id], not {fields!r} "
                        f"({_origin(config, name)})."
                    )


def _check_columns(config: Any, settings: Mapping) -> None:
    """Check that the columns a sequence needs are read, and that timestamps stay what they are."""
    from recbole.utils import ModelType

    if config.model_class.type != ModelType.SEQUENTIAL or settings.get("benchmark_filename"):
        return
    time = settings["TIME_FIELD"]
    columns = (settings.get("load_col") or {}).get("inter")
    if isinstance(columns, (list, tuple)):
        for field in ("USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD"):
            if settings[field] not in columns:
                raise UserError(
                    f"load_col: the columns of 'inter' lack '{settings[field]}', the {field} "
                    f"({_origin(config, 'load_col')})."
                )
    if _ours(config) and (settings.get("normalize_all") or time in (settings.get("normalize_field") or [])):
        key = "normalize_all" if settings.get("normalize_all") else "normalize_field"
        raise UserError(
            f"{key} would rescale '{time}' to [0, 1] and destroy order and dates; name other fields in normalize_field "
            f"({_origin(config, key)})."
        )


def _check_parts(name: str, value: Mapping, parts: Sequence[str], where: str) -> None:
    for part in value:
        if part not in parts:
            hint = _hint(part, parts) or f"; it has {', '.join(parts)}."
            raise UserError(f"unknown key '{part}' in {name} ({where}){hint}")


def _check_evaluation(config: Any, settings: Mapping) -> None:
    """Check split, candidates and metrics against each other."""
    from recbole.evaluator import metric_types
    from recbole.utils import EvaluatorType, ModelType

    model, where = config.model, _origin(config, "eval_args")
    sequential = config.model_class.type == ModelType.SEQUENTIAL
    arguments = settings["eval_args"]

    split = arguments.get("split")
    good = isinstance(split, dict) and len(split) == 1
    if good and "LS" in split:
        good = split["LS"] in ("valid_and_test", "valid_only", "test_only")
    elif good:
        ratios = split.get("RS")
        good = isinstance(ratios, (list, tuple)) and all(
            isinstance(ratio, (int, float)) and not isinstance(ratio, bool) and ratio >= 0 for ratio in ratios
        )
    if not good:
        raise UserError(
            f"eval_args: split must be {{LS: valid_and_test}} (also valid_only, test_only) or {{RS: [0.8, 0.1, 0.1]}}, "
            f"not {split!r} ({where})."
        )
    order = arguments.get("order")
    if order not in ("TO", "RO"):
        raise UserError(f"eval_args: order must be TO (by time) or RO (random), not {order!r} ({where}).")
    if sequential and order != "TO":
        raise UserError(f"eval_args: {model} is a sequential model and needs order TO, not {order} ({where}).")
    if arguments.get("group_by") not in ("user", "none", None):
        raise UserError(f"eval_args: group_by must be user or none, not {arguments['group_by']!r} ({where}).")
    if sequential and settings.get("repeatable") is False:
        raise UserError(f"{model} is a sequential model: repeatable must be True ({_origin(config, 'repeatable')}).")

    names = settings["metrics"]
    names = [names] if isinstance(names, str) else names
    for name in names:
        if str(name).lower() not in metric_types:
            known = [*metric_types, "NDCG", "Hit", "Recall", "MRR", "Precision", "MAP", "AUC", "LogLoss"]
            raise UserError(f"metrics: there is no metric '{name}'{_hint(name, known)} ({_origin(config, 'metrics')}).")
    if not names:
        raise UserError(f"metrics must name at least one metric ({_origin(config, 'metrics')}).")
    values = [name for name in names if metric_types[name.lower()] == EvaluatorType.VALUE]
    if values and (len(values) < len(names) or (_ours(config) and settings.get("recommend_by") != "yes_no")):
        raise UserError(
            f"metrics: {values[0]} judges predicted ratings and cannot be used with ranking metrics or by {model} "
            f"({_origin(config, 'metrics')})."
        )

    modes = arguments.get("mode")
    for mode in modes.values() if isinstance(modes, dict) else [modes]:
        match = re.fullmatch(r"(?:full|labeled|(?:uni|pop)([1-9]\d*))", mode) if isinstance(mode, str) else None
        if match is None:
            raise UserError(
                f"eval_args: mode must be full, or uni and the number of other candidates as in uni99, not {mode!r} "
                f"({where})."
            )
        if mode.startswith("pop") and settings.get("candidate_sampling") == "non_interacted":
            raise UserError(
                f"eval_args: mode {mode} draws popular items, which candidate_sampling: non_interacted does not; "
                f"take uni{match[1]}, or candidate_sampling: recbole ({where})."
            )
        if mode == "labeled" and not values:
            raise UserError(f"eval_args: mode labeled needs metrics such as AUC, but {names[0]} ranks items ({where}).")
        if mode == "full" and values:
            raise UserError(f"metrics: {values[0]} cannot rank the whole catalogue; take mode labeled ({where}).")
    if isinstance(modes, dict):
        _check_parts("eval_args.mode", modes, ("valid", "test"), where)
        if not modes:
            raise UserError(f"eval_args: mode must name valid or test ({where}).")

    cuts = settings["topk"]
    cuts = [cuts] if isinstance(cuts, int) else cuts
    if cuts and not all(isinstance(cut, int) for cut in cuts):
        raise UserError(f"topk must be whole numbers, not {cuts} ({_origin(config, 'topk')}).")
    if not cuts and not values:
        raise UserError(f"topk must name at least one cut-off, e.g. [10] ({_origin(config, 'topk')}).")
    name, _, cut = str(settings["valid_metric"]).partition("@")
    measured = [metric.lower() for metric in names]
    without_cut = values or name.lower() == "gauc"
    if name.lower() not in measured or (not without_cut and cut not in map(str, cuts)):
        example = f"{name if name.lower() in measured else names[0]}@{cuts[0]}" if not without_cut else names[0]
        changed = [key for key in ("valid_metric", "metrics", "topk") if key in config.external_config_dict]
        raise UserError(
            f"valid_metric {settings['valid_metric']} is not measured with metrics {', '.join(names)} and topk {cuts}; "
            f"set valid_metric too, e.g. {example} ({_origin(config, (changed or ['valid_metric'])[0])})."
        )


def _check_labels(config: Any, settings: Mapping) -> None:
    """Check that answers of yes and no are judged by labels, and that there are ratings to make them of."""
    mode = settings["eval_args"].get("mode")
    labeled = set(mode.values() if isinstance(mode, dict) else [mode]) == {"labeled"}
    if _ours(config) and settings.get("recommend_by") == "yes_no" and not labeled:
        raise UserError(
            f"recommend_by: yes_no judges each user's own item and ranks nothing: set protocol: yes_no "
            f"({_origin(config, 'recommend_by')})."
        )
    if not labeled:
        return
    if settings.get("like_threshold") is None:
        raise UserError(
            f"eval_args: mode labeled needs protocol: yes_no, which makes labels of ratings ({_origin(config, 'eval_args')})."
        )
    if not _ours(config) and not _isolated(config) and not settings.get("threshold"):
        raise UserError(
            f"protocol: yes_no: RecBole's own runner makes labels for {config.model} by its key threshold; compare by "
            f"run_recbole_llm.py, or set threshold ({_origin(config, 'protocol')})."
        )
    rating = settings["RATING_FIELD"]
    if settings.get("normalize_all") or rating in (settings.get("normalize_field") or []):
        key = "normalize_all" if settings.get("normalize_all") else "normalize_field"
        raise UserError(
            f"{key} would rescale '{rating}' to [0, 1], which like_threshold is compared with; name other fields in "
            f"normalize_field ({_origin(config, key)})."
        )
    if not _ours(config) and settings["valid_metric"].lower() != "auc":
        raise UserError(
            f"valid_metric {settings['valid_metric']} judges probabilities, and the scores of {config.model} are none; take "
            f"AUC ({_origin(config, 'valid_metric')})."
        )


def _ours(config: Any) -> bool:
    from recbole_llm.registry import is_ours

    return is_ours(config.model)


def _check_training(config: Any, settings: Mapping, model: str, model_class: type) -> None:
    """Check the training negatives against the loss, and the warm-up."""
    from recbole.utils import InputType

    if _ours(config) and settings["warmup_steps"] > 1 and settings["warmup_steps"] != int(settings["warmup_steps"]):
        raise UserError(
            f"warmup_steps must be a whole number of steps, or below 1 their share of all steps, not "
            f"{settings['warmup_steps']} ({_origin(config, 'warmup_steps')})."
        )

    arguments, where = settings.get("train_neg_sample_args"), _origin(config, "train_neg_sample_args")
    none = arguments in (None, "None") or arguments.get("distribution") in (None, "None", "none")
    if _ours(config):
        if not none:
            raise UserError(f"{model} draws its own training negatives: train_neg_sample_args must be None ({where}).")
        return
    if not _draws_negatives(model_class, settings):
        if not none:
            raise UserError(
                f"{model} with loss_type {settings['loss_type']} takes no negatives: train_neg_sample_args must be "
                f"None, or loss_type BPR ({where})."
            )
        return
    pairs = getattr(model_class, "input_type", None) == InputType.PAIRWISE or settings.get("loss_type") == "BPR"
    if pairs and none:
        raise UserError(
            f"{model} learns from pairs of items and needs negatives: leave train_neg_sample_args away, or write "
            f"{{distribution: uniform, sample_num: 1}} ({where})."
        )


def _check_teacher(config: Any, settings: Mapping) -> None:
    """Check that the teacher is a stock sequential model and that its settings are keys of it."""
    from recbole.utils import ModelType

    teacher = settings.get("teacher")
    if teacher is None or not (_ours(config) or "teacher" in config.external_config_dict):
        return
    teacher_class = _stock_class(teacher)
    if teacher_class is None:
        hint = _hint(teacher, stock_models())
        raise UserError(f"teacher: RecBole has no model '{teacher}'{hint} ({_origin(config, 'teacher')}).")
    if teacher_class.type != ModelType.SEQUENTIAL:
        raise UserError(
            f"teacher: {teacher} is no sequential model; take SASRec, GRU4Rec, Caser or BERT4Rec "
            f"({_origin(config, 'teacher')})."
        )
    given, where = settings.get("teacher_settings") or {}, _origin(config, "teacher_settings")
    known = known_keys(teacher, teacher_class)
    for name, value in given.items():
        if name not in known:
            raise UserError(
                f"unknown key '{name}' in teacher_settings, for the teacher {teacher} ({where})"
                f"{_hint(name, known) or '; --help lists the keys.'}"
            )
        _fitted(known[name], value, f"teacher_settings, {where}")


def _stock_class(name: Any) -> type | None:
    """Return the class of a stock model, None where RecBole has none of that name."""
    from recbole.utils import get_model

    if not isinstance(name, str) or name not in stock_models():
        return None
    try:
        return get_model(name)
    except (ImportError, ValueError, AttributeError):  # LightGBM, XGBoost: not installed
        return None


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
    import recbole_llm.registry as registry

    registry.register()
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
    _check_dataset(config)
    return config


def _check_dataset(config: Any) -> None:
    """Refuse a dataset that has no folder, unless RecBole knows where to fetch it."""
    folder = Path(config["data_path"])
    if folder.is_dir() or config.dataset in load_yaml(recbole_folder() / "properties" / "dataset" / "url.yaml"):
        return
    found = datasets_in(folder.parent)
    raise UserError(
        f"unknown dataset '{config.dataset}': there is no folder '{folder}'"
        f"{_hint(config.dataset, [*found, 'ml-100k'])} "
        f"(data_path holds {', '.join(found) or 'no dataset'}; ml-100k comes with RecBole)."
    )


def datasets_in(data_path: str | os.PathLike) -> list[str]:
    """Return the names of the datasets found under ``data_path``: folders with an ``.inter`` file of some kind."""
    root = Path(data_path)
    if not root.is_dir():
        return []
    return sorted(folder.name for folder in root.iterdir() if folder.is_dir() and any(folder.glob("*.inter")))


# --- the command line -----------------------------------------------------------------------------------------------


def parse_command_line(argv: Sequence[str]) -> dict[str, Any]:
    """Read ``--key=value`` and ``--key value``.

    Values are YAML (``0.1``, ``true``, ``[10, 20]``, ``{mode: full}``, ``None``) and may contain ``=``; nothing is
    evaluated. A key that takes text keeps it as written, so ``--model``, ``--dataset`` and ``--results_file`` need no
    quotes. A bare ``--key`` sets a True/False key to True. ``--SASRec.epochs=5`` gives the key ``"SASRec.epochs"``, see
    :func:`settings_for`; ``--LLMSTAR:plain.beta=0`` gives ``"LLMSTAR:plain.beta"``. ``-h`` and ``--help`` give
    ``{"help": True}``.

    Args:
        argv: the words after the program's name.

    Raises:
        UserError: a word that is no option, an option without value, a value that cannot be read, a key given twice.
    """
    schema = read_schema()
    settings: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            settings["help"] = True
            continue
        match = re.match(r"--([A-Za-z_][\w.:-]*)(=|$)", word)
        if match is None:
            raise UserError(f"cannot read '{word}' on the command line; write --key=value.")
        name = match[1]
        kinds = _kinds(name.rpartition(".")[2], schema)
        if match[2]:
            text = word[match.end() :]
        elif words and not words[0].startswith("--"):
            text = words.pop(0)
        elif kinds == {"bool"}:
            text = "true"
        else:
            raise UserError(f"--{name} needs a value: write --{name}=value.")
        if name in settings:
            raise UserError(f"--{name} is given twice on the command line.")
        settings[name] = _command_line_value(name, text, kinds)
    return settings


def _kinds(name: str, schema: Schema) -> set[str]:
    """Return the types that the files give for a key."""
    if name in ("model", "dataset", "config_files", "config_file_list", "checkpoint", "user", "against"):
        return {"str"}
    ours = {kind for group, keys in schema.items() if group != "recbole" and name in keys for kind in keys[name].types}
    stock = schema["recbole"].get(name, Key(name)).types
    return ours or ({"str", "None"} if stock[:1] == ("str",) else set(stock))


def _command_line_value(name: str, text: str, kinds: set[str]) -> Any:
    if text == "None" or ("None" in kinds and text in ("~", "null", "")):
        return None
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if kinds and kinds <= {"str", "None"} and not quoted:
        return text
    try:
        return parse_value(text)
    except (yaml.YAMLError, ValueError):
        if "str" in kinds:
            return text
        raise UserError(f"--{name}: cannot read the value {text!r}; quote texts, and write lists as [a, b].") from None


def settings_for(model: str, settings: Mapping[str, Any], models: Sequence[str]) -> dict[str, Any]:
    """Return the part of a run's settings that is meant for one of its models.

    ``{"SASRec.epochs": 5}`` is for SASRec only, and wins over a plain ``epochs``; ``{"SASRec:long.epochs": 50}`` is for the
    variant ``SASRec:long`` only, and wins over both. A plain key that this model does not know goes to those of ``models``
    that do; one that none of them knows stays, so that it is reported.

    Args:
        model: the model, or a variant of one.
        settings: as from :func:`parse_command_line`.
        models: all models and variants of the run.

    Raises:
        UserError: a prefix that names no model of the run.
    """
    known = {name: known_keys(model_of(name), _stock_class(model_of(name))) for name in models}
    may_be = {*models, *map(model_of, models)}
    general: dict[str, Any] = {}
    special: dict[str, Any] = {}
    of_variant: dict[str, Any] = {}
    for name, value in settings.items():
        prefix, dot, key = name.partition(".")
        if dot:
            if prefix not in may_be:
                raise UserError(
                    f"'{name}': '{prefix}' is no model of this run ({', '.join(models)}){_hint(prefix, may_be)}"
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


# --- help -----------------------------------------------------------------------------------------------------------


def help_text(data_path: str | os.PathLike = "dataset/") -> str:
    """Return what ``--help`` prints: models, datasets, backbones, and every key with type, default and meaning.

    Args:
        data_path: the folder of the user's datasets.
    """
    from recbole_llm.registry import MODELS

    schema = read_schema()

    def names(kind: str) -> list[str]:
        return [group.partition("/")[2] for group in schema if group.startswith(kind + "/")]

    hanging = {"subsequent_indent": "  "}
    indent = {"initial_indent": "  ", "subsequent_indent": "  "}
    lines = [
        "python run_recbole_llm.py --model=SASRec,LLMSRec,LLMSTAR --dataset=ml-100k [--key=value ...]",
        "",
        "Models:",
        *(f"  {name:<12} {entry.paper}" for name, entry in MODELS.items()),
        *textwrap.wrap("and every model of RecBole: " + ", ".join(stock_models()), 118, **indent),
        "",
        *textwrap.wrap("Datasets with settings of their own: " + ", ".join(names("dataset")), 118, **hanging),
        *textwrap.wrap(f"Datasets under {data_path}: " + (", ".join(datasets_in(data_path)) or "none"), 118, **hanging),
        "Backbones with settings of their own: " + (", ".join(names("backbone")) or "none"),
        "  and any Hugging Face id, local folder or GGUF file of a causal language model.",
        "",
        "Keys, as --key=value (for one of several models: --SASRec.key=value) or in a file, --config_files=my.yaml:",
    ]
    first_seen: set[str] = set()
    for group, keys in schema.items():
        kind, _, name = group.partition("/")
        if group == "recbole":
            continue
        title = {"overall": "Every run", "protocol": f"protocol: {name}", "model": name}.get(kind, f"{kind} {name}")
        lines += ["", f"{title} (properties/{group}.yaml)"]
        for key in keys.values():
            # Datasets, protocols and backbones repeat keys: their meaning is told once, their values each time.
            told = kind != "model" and key.name in first_seen
            lines += [_key_line(key, brief=told)]
            first_seen.add(key.name)
    lines += ["", "RecBole's own keys"]
    lines += [_key_line(key) for key in schema["recbole"].values() if key.meaning and key.name not in first_seen]
    return "\n".join(lines) + "\n"


def _key_line(key: Key, brief: bool = False) -> str:
    default = repr(key.default) if isinstance(key.default, str) and key.default.strip() != key.default else key.default
    if brief:
        return f"  {key.name} = {default}"
    kind = ", ".join(part for part in (key.type, key.constraint) if part)
    if key.where.startswith("recbole"):
        kind = kind.replace("str or int or float", "str")
    return f"  {key.name} = {default}  ({kind})\n      {key.meaning}"
