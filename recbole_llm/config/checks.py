"""Checks of a run's settings: each mistake is one sentence that names the key and the remedy."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from recbole_llm import registry
from recbole_llm.config.schema import (
    Key,
    forms_of,
    known_keys,
    llm_keys,
    load_yaml,
    read_schema,
    stock_model_keys,
)
from recbole_llm.errors import UserError, closest

# The parts of keys that are mappings; of those without a Key, the value is checked elsewhere.
_NESTED: dict[str, dict[str, Key | None]] = {
    "eval_args": dict.fromkeys(("split", "order", "group_by", "mode")),
    "train_neg_sample_args": {
        "distribution": Key("distribution", "str or None", "one of uniform|popularity|none|None"),
        "sample_num": Key("sample_num", "int or str or None", "> 0"),
        "alpha": Key("alpha", "float", ">= 0"),
        "dynamic": Key("dynamic", "bool"),
        "candidate_num": Key("candidate_num", "int", ">= 0"),
    },
    "clip_grad_norm": {
        "max_norm": Key("max_norm", "float", "> 0"),
        "norm_type": Key("norm_type", "float", "> 0"),
        "error_if_nonfinite": Key("error_if_nonfinite", "bool"),
        "foreach": Key("foreach", "bool or None"),
    },
}
_INTERVAL_KEYS = ("user_inter_num_interval", "item_inter_num_interval", "entity_kg_num_interval", "relation_kg_num_interval")
_BOUND = r"\s*([-+]?(?:inf|\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*"
_INTERVAL = re.compile(rf"[\[(]{_BOUND},{_BOUND}[\])]")
# Files that RecBole's models unpickle, which runs what they say.
UNPICKLED = ("pre_model_path", "mf_pretrain_path", "mlp_pretrain_path", "pretrain_path", "warm_up")
# What the caller may say in place of a checkpoint's record: whom to ask, and where things have moved.
ENDPOINT = ("endpoint_url", "endpoint_model", "endpoint_key_variable")
GIVEN = ("data_path", "teacher_checkpoint", "pretrained", "backbone", *ENDPOINT)
# RecBole's models whose score is the product of what `forward` returns and the item's vector, and nothing else.
SCORED_BY_VECTORS = ("SASRec", "GRU4Rec", "NARM")
_ATOMIC_FILES = ("inter", "user", "item", "kg", "link", "net")


def draws_negatives(model_class: type, settings: Mapping) -> bool:
    """Whether RecBole's dataloader draws training negatives for a stock model: not under a softmax over all items."""
    from recbole.utils import ModelType

    return model_class.type != ModelType.SEQUENTIAL or settings.get("loss_type") not in ("CE", "NLL")


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
        value, where = external[name], origin_of(config, name)
        if name not in known:
            if name in config.cmd_config_dict and not _isolated(config):
                hint = did_you_mean(name, known)
                logging.getLogger().warning("command line: '%s' is no key of %s and is ignored%s", name, model, hint)
                del external[name]
                continue
            raise UserError(_unknown(name, model, known, config, where))
        external[name] = fitted(known[name], value, where)
    settings = {**config.internal_config_dict, **external}
    _check_nested(config, settings)
    _check_intervals(config, settings)
    _check_columns(config, settings)
    _check_evaluation(config, settings)
    _check_labels(config, settings)
    _check_training(config, settings, model, model_class)
    _check_teacher(config, settings)
    _check_residual(config, settings, model, model_class)
    _check_trust(config, settings)
    _check_item_vectors(config, settings)
    if isinstance(settings.get("valid_users"), str) and settings["valid_users"] != "auto":
        raise UserError(
            f"valid_users must be a whole number > 0, auto or None, not {settings['valid_users']!r} "
            f"({origin_of(config, 'valid_users')})."
        )


def _isolated(config: Any) -> bool:
    return "setting_origins" in config.__dict__


def origin_of(config: Any, name: str) -> str:
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


# Other programs' names of keys, which look like none of ours.
_KNOWN_ELSEWHERE = {
    "lr": "learning_rate",
    "bs": "train_batch_size",
    "batch_size": "train_batch_size",
    "wd": "weight_decay",
    "l2": "weight_decay",
    "gpu": "gpu_id",
    "maxlen": "MAX_ITEM_LIST_LENGTH",
    "max_len": "MAX_ITEM_LIST_LENGTH",
    "llm": "backbone",
    "config": "config_files",
    "k": "topk",
}


def no_such_model(name: Any) -> UserError:
    near = closest(str(name), registry.known_models())
    hint = f"did you mean '{near}'?" if near else "see `recbole-llm --help` for the names."
    return UserError(f"There is no model named '{name}'; {hint}")


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    known = list(known)
    near = _KNOWN_ELSEWHERE.get(str(name).lower())
    near = near if near in known else closest(str(name), known)
    return f"; did you mean '{near}'?" if near else ""


def fitted(key: Key, value: Any, where: str) -> Any:
    try:
        return key.fit(value)
    except ValueError:
        if isinstance(value, int) and abs(value) >= 10**77:  # Python refuses to write very long numbers
            shown = f"a number of {value.bit_length()} bits"
        else:
            shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
        hint = did_you_mean(value, key.choices) if isinstance(value, str) else ""
        raise UserError(f"{key.name} must be {key.allowed_values()}, not {shown}{hint} ({where}).") from None


def _unknown(name: str, model: str, known: Iterable[str], config: Any, where: str) -> str:
    """Say what is wrong with a key that the model does not know."""
    schema = read_schema()
    settings = {**config.internal_config_dict, **config.external_config_dict}
    teacher = settings.get("teacher")
    if registry.is_ours(model) and isinstance(teacher, str) and name in stock_model_keys(teacher, None):
        return (
            f"'{name}' is a key of the teacher {teacher}, not of {model}: "
            f"write teacher_settings: {{{name}: ...}} ({where})."
        )
    owners = [other for other in registry.models() if name in llm_keys(other, schema)]
    if owners:
        return f"'{name}' is a key of {', '.join(owners)}, not of {model} ({where})."
    return f"unknown key '{name}' ({where}){did_you_mean(name, known) or '; --help lists the keys.'}"


def _check_nested(config: Any, settings: Mapping) -> None:
    for name, parts in _NESTED.items():
        value = settings.get(name)
        if isinstance(value, dict):
            where = origin_of(config, name)
            _check_parts(name, value, parts, where)
            for part, key in parts.items():
                if key is not None and part in value:
                    value[part] = fitted(replace(key, name=f"{name}: {part}"), value[part], where)
    if settings.get("clip_grad_norm") is not None and "max_norm" not in settings["clip_grad_norm"]:
        where = origin_of(config, "clip_grad_norm")
        raise UserError(f"clip_grad_norm must name max_norm, e.g. {{max_norm: 1.0}} ({where}).")
    suffixes = settings.get("additional_feat_suffix") or []
    files = [*_ATOMIC_FILES, *([suffixes] if isinstance(suffixes, str) else suffixes)]
    for name in ("load_col", "unload_col"):
        columns = settings.get(name)
        if isinstance(columns, dict):
            _check_parts(name, columns, files, origin_of(config, name))
            for file, fields in columns.items():
                if not isinstance(fields, (list, tuple)) and fields != "*":
                    raise UserError(
                        f"{name}: the columns of '{file}' must be a list such as [user_id, item_id], not {fields!r} "
                        f"({origin_of(config, name)})."
                    )


def _check_intervals(config: Any, settings: Mapping) -> None:
    """Check intervals, which RecBole ignores where it cannot read them."""
    texts = [(name, settings.get(name), name) for name in _INTERVAL_KEYS]
    of_columns = settings.get("val_interval")
    if isinstance(of_columns, dict):
        texts += [("val_interval", text, f"val_interval: {column}") for column, text in of_columns.items()]
    for name, text, shown in texts:
        if text is None:
            continue
        for part in str(text).split(";"):
            match = _INTERVAL.fullmatch(part.strip())
            if match is None or not float(match[1]) <= float(match[2]):
                raise UserError(
                    f"{shown} must be an interval such as '[5,inf)', or several with ; between them, not {text!r} "
                    f"({origin_of(config, name)})."
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
                    f"({origin_of(config, 'load_col')})."
                )
    if _ours(config) and (settings.get("normalize_all") or time in (settings.get("normalize_field") or [])):
        key = "normalize_all" if settings.get("normalize_all") else "normalize_field"
        raise UserError(
            f"{key} would rescale '{time}' to [0, 1] and destroy order and dates; name other fields in normalize_field "
            f"({origin_of(config, key)})."
        )


def _check_parts(name: str, value: Mapping, parts: Collection[str], where: str) -> None:
    for part in value:
        if part not in parts:
            hint = did_you_mean(part, parts) or f"; it has {', '.join(parts)}."
            raise UserError(f"unknown key '{part}' in {name} ({where}){hint}")


def _check_evaluation(config: Any, settings: Mapping) -> None:
    """Check split, candidates and metrics against each other."""
    from recbole.evaluator import metric_types
    from recbole.utils import EvaluatorType, ModelType

    model, where = config.model, origin_of(config, "eval_args")
    sequential = config.model_class.type == ModelType.SEQUENTIAL
    arguments = settings["eval_args"]

    split = arguments.get("split")
    good = isinstance(split, dict) and len(split) == 1
    if good and "LS" in split:
        good = split["LS"] in ("valid_and_test", "valid_only", "test_only")
    elif good and "TC" in split:
        good = split["TC"] == "valid_and_test"
        if not _ours(config) and not _isolated(config):
            raise UserError(
                f"protocol: temporal: RecBole's own runner knows no split by a cut in time for {model}; compare by "
                f"run_recbole_llm.py ({where})."
            )
    elif good:
        ratios = split.get("RS")
        good = isinstance(ratios, (list, tuple)) and all(
            isinstance(ratio, (int, float)) and not isinstance(ratio, bool) and 0 <= ratio < math.inf for ratio in ratios
        )
        good = good and sum(ratios) > 0
    if not good:
        raise UserError(
            f"eval_args: split must be {{LS: valid_and_test}} (also valid_only, test_only), {{RS: [0.8, 0.1, 0.1]}} or "
            f"{{TC: valid_and_test}}, not {split!r} ({where})."
        )
    of_cuts = [key for key in ("valid_from", "test_from", "unseen", "test_targets") if key in config.external_config_dict]
    if of_cuts and "TC" not in split:
        raise UserError(f"{of_cuts[0]} needs protocol: temporal ({origin_of(config, of_cuts[0])}).")
    order = arguments.get("order")
    if order not in ("TO", "RO"):
        raise UserError(f"eval_args: order must be TO (by time) or RO (random), not {order!r} ({where}).")
    if sequential and order != "TO":
        raise UserError(f"eval_args: {model} is a sequential model and needs order TO, not {order} ({where}).")
    if arguments.get("group_by") not in ("user", "none", None):
        raise UserError(f"eval_args: group_by must be user or none, not {arguments['group_by']!r} ({where}).")
    if sequential and settings.get("repeatable") is False:
        raise UserError(f"{model} is a sequential model: repeatable must be True ({origin_of(config, 'repeatable')}).")

    names = settings["metrics"]
    names = [names] if isinstance(names, str) else names
    for name in names:
        if str(name).lower() not in metric_types:
            known = [*metric_types, "NDCG", "Hit", "Recall", "MRR", "Precision", "MAP", "AUC", "LogLoss"]
            raise UserError(
                f"metrics: there is no metric '{name}'{did_you_mean(name, known)} ({origin_of(config, 'metrics')})."
            )
    if not names:
        raise UserError(f"metrics must name at least one metric ({origin_of(config, 'metrics')}).")
    values = [name for name in names if metric_types[name.lower()] == EvaluatorType.VALUE]
    if values and (len(values) < len(names) or (_ours(config) and settings.get("recommend_by") != "yes_no")):
        raise UserError(
            f"metrics: {values[0]} judges predicted ratings and cannot be used with ranking metrics or by {model} "
            f"({origin_of(config, 'metrics')})."
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
        raise UserError(f"topk must be whole numbers, not {cuts} ({origin_of(config, 'topk')}).")
    if not cuts and not values:
        raise UserError(f"topk must name at least one cut-off, e.g. [10] ({origin_of(config, 'topk')}).")
    name, _, cut = str(settings["valid_metric"]).partition("@")
    if str(settings["valid_metric"]).lower() == "mrr@all":
        name, cut = "mrr@all", str(cuts[0])
    measured = [metric.lower() for metric in names]
    without_cut = values or name.lower() == "gauc"
    if name.lower() not in measured or (not without_cut and cut not in map(str, cuts)):
        example = f"{name if name.lower() in measured else names[0]}@{cuts[0]}" if not without_cut else names[0]
        changed = [key for key in ("valid_metric", "metrics", "topk") if key in config.external_config_dict]
        raise UserError(
            f"valid_metric {settings['valid_metric']} is not measured with metrics {', '.join(names)} and topk {cuts}; "
            f"set valid_metric too, e.g. {example} ({origin_of(config, (changed or ['valid_metric'])[0])})."
        )


def _check_labels(config: Any, settings: Mapping) -> None:
    """Check that answers of yes and no are judged by labels, and that there are ratings to make them of."""
    mode = settings["eval_args"].get("mode")
    labeled = set(mode.values() if isinstance(mode, dict) else [mode]) == {"labeled"}
    if _ours(config) and settings.get("recommend_by") == "yes_no" and not labeled:
        raise UserError(
            f"recommend_by: yes_no judges each user's own item and ranks nothing: set protocol: yes_no "
            f"({origin_of(config, 'recommend_by')})."
        )
    if not labeled:
        return
    if settings.get("like_threshold") is None:
        raise UserError(
            f"eval_args: mode labeled needs protocol: yes_no, which makes labels of ratings ({origin_of(config, 'eval_args')})."
        )
    if not _ours(config) and not _isolated(config) and not settings.get("threshold"):
        raise UserError(
            f"protocol: yes_no: RecBole's own runner makes labels for {config.model} by its key threshold; compare by "
            f"run_recbole_llm.py, or set threshold ({origin_of(config, 'protocol')})."
        )
    rating = settings["RATING_FIELD"]
    if settings.get("normalize_all") or rating in (settings.get("normalize_field") or []):
        key = "normalize_all" if settings.get("normalize_all") else "normalize_field"
        raise UserError(
            f"{key} would rescale '{rating}' to [0, 1], which like_threshold is compared with; name other fields in "
            f"normalize_field ({origin_of(config, key)})."
        )
    if not _ours(config) and settings["valid_metric"].lower() != "auc":
        raise UserError(
            f"valid_metric {settings['valid_metric']} judges probabilities, and the scores of {config.model} are none; take "
            f"AUC ({origin_of(config, 'valid_metric')})."
        )


def _ours(config: Any) -> bool:
    return registry.is_ours(config.model)


def _check_training(config: Any, settings: Mapping, model: str, model_class: type) -> None:
    """Check the training negatives against the loss, and the warm-up."""
    from recbole.utils import InputType

    if _ours(config) and settings["warmup_steps"] > 1 and settings["warmup_steps"] != int(settings["warmup_steps"]):
        raise UserError(
            f"warmup_steps must be a whole number of steps, or below 1 their share of all steps, not "
            f"{settings['warmup_steps']} ({origin_of(config, 'warmup_steps')})."
        )

    if _ours(config) and settings["train_targets"] == "window":
        form = settings.get("recommend_by") or next(iter(forms_of(model)), None)
        if form != "retrieval":
            raise UserError(
                f"train_targets: window is for models that recommend by retrieval, and {model} "
                f"{f'is asked by {form}' if form else 'is asked in a way of its own'}; take last or all "
                f"({origin_of(config, 'train_targets')})."
            )

    arguments, where = settings.get("train_neg_sample_args"), origin_of(config, "train_neg_sample_args")
    none = arguments in (None, "None") or arguments.get("distribution") in (None, "None", "none")
    if _ours(config):
        if not none:
            raise UserError(f"{model} draws its own training negatives: train_neg_sample_args must be None ({where}).")
        return
    if not draws_negatives(model_class, settings):
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
    teacher_class = stock_class(teacher)
    if teacher_class is None:
        hint = did_you_mean(teacher, registry.stock_models())
        raise UserError(f"teacher: RecBole has no model '{teacher}'{hint} ({origin_of(config, 'teacher')}).")
    if teacher_class.type != ModelType.SEQUENTIAL:
        raise UserError(
            f"teacher: {teacher} is no sequential model; take SASRec, GRU4Rec, Caser or BERT4Rec "
            f"({origin_of(config, 'teacher')})."
        )
    given, where = settings.get("teacher_settings") or {}, origin_of(config, "teacher_settings")
    known = known_keys(teacher, teacher_class)
    for name, value in given.items():
        if name not in known:
            raise UserError(
                f"unknown key '{name}' in teacher_settings, for the teacher {teacher} ({where})"
                f"{did_you_mean(name, known) or '; --help lists the keys.'}"
            )
        fitted(known[name], value, f"teacher_settings, {where}")


def _check_residual(config: Any, settings: Mapping, model: str, model_class: type) -> None:
    """Check that ``residual_to_teacher`` or ``soft_targets`` finds a teacher's scores, and the former validations."""
    named = [key for key in ("residual_to_teacher", "soft_targets") if settings.get(key) and key in config.external_config_dict]
    if not named or not _ours(config):
        return
    key, where = named[0], origin_of(config, named[0])
    if len(named) == 2:
        raise UserError(f"residual_to_teacher leaves out what soft_targets asks for, the teacher's scores: take one ({where}).")
    if not getattr(model_class, "has_item_vectors", False):
        raise UserError(f"{key}: {model} has no teacher ({where}).")
    if settings["teacher"] not in SCORED_BY_VECTORS:
        raise UserError(
            f"{key} needs a teacher whose score is a product of vectors, {' or '.join(SCORED_BY_VECTORS)}, "
            f"not {settings['teacher']} ({origin_of(config, 'teacher')})."
        )
    form = settings.get("recommend_by") or next(iter(forms_of(model)), None)
    if form != "retrieval":
        raise UserError(f"{key} is for models that recommend by retrieval, and {model} is asked by {form} ({where}).")
    if key == "residual_to_teacher" and settings["eval_step"] <= 0:
        where = origin_of(config, "eval_step")
        raise UserError(f"residual_to_teacher: validations choose the LLM's weight; set eval_step above 0 ({where}).")


def _check_trust(config: Any, settings: Mapping) -> None:
    """Check that nothing is unpickled that the user has not vouched for."""
    for of_teacher, values in ((False, config.external_config_dict), (True, settings.get("teacher_settings") or {})):
        for name in UNPICKLED:
            if not values.get(name):
                continue
            key = f"teacher_settings: {name}" if of_teacher else name
            where = origin_of(config, "teacher_settings" if of_teacher else name)
            if not settings.get("trust_files"):
                raise UserError(
                    f"{key}: {values[name]!r} would be unpickled, which runs whatever the file says; set trust_files to True "
                    f"if you know where it comes from ({where})."
                )
            logging.getLogger().warning("%s: unpickling %r, which runs whatever the file says", key, values[name])


def _check_item_vectors(config: Any, settings: Mapping) -> None:
    """Check what the item embeddings of a stock model are made of, as far as the settings say it."""
    source, where = settings.get("item_vectors"), origin_of(config, "item_vectors")
    if not source and registry.BASELINES.get(config.model) and "item_vectors" in config.external_config_dict:
        if load_yaml(registry.properties_of(config.model)).get("item_vectors"):
            raise UserError(f"item_vectors: {config.model} is made of them; take text, llm or a file ({where}).")
    if not source or _ours(config):
        return
    if not _isolated(config):
        raise UserError(
            f"item_vectors: RecBole's own runner builds {config.model} without them; run it by run_recbole_llm.py ({where})."
        )
    if source not in ("text", "llm") and not str(source).endswith((".npy", ".safetensors")):
        raise UserError(
            f"item_vectors must be text, llm or a .npy or .safetensors file, not {source!r}"
            f"{did_you_mean(source, ('text', 'llm'))} ({where})."
        )


def stock_class(name: Any) -> type | None:
    """Return the class of a stock model, None where RecBole has none of that name."""
    from recbole.utils import get_model

    if not isinstance(name, str) or name not in registry.stock_models():
        return None
    try:
        return get_model(name)
    except (ImportError, ValueError, AttributeError):  # LightGBM, XGBoost: not installed
        return None
