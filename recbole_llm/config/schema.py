"""What is known of every setting, read from the comments of the YAML files.

The comments in ``properties/`` are the schema, and its only copy::

    # Speed and memory                <- section: a comment line after an empty line, up to its first : . or ;

    micro_batch_tokens: 8192          # (int, > 0) [cost] most padded tokens in one call of the LLM
    ^key                ^default        ^type ^constraint ^mark ^meaning

 * type: ``int``, ``float``, ``bool``, ``str``, ``list``, ``pair`` (a list of two), ``dict``, ``None``, or several
   joined by ``or``;
 * constraint (may be absent): ``> 0`` (also ``>=``, ``<``, ``<=``), ``in [0, 1]`` (a round bracket excludes its end),
   ``one of a|b|c``; of a list it constrains each entry;
 * mark (may be absent): whether the key decides what a trained model becomes, see :data:`MARKS`.

The comment stands behind its key, or alone on the line above it. A file that gives a key again, with another default,
needs no such comment: type, constraint, mark, meaning and section are those of the file below it. The files, from the
lowest: ``overall``, ``protocol/``, ``stock`` (for RecBole's own models alone), ``llm``, ``form/`` (one for each way of being
asked that ``forms:`` in the model's file names), ``model/``, ``dataset/``, ``backbone/``, ``targets/`` (what a value of
``train_targets`` brings with it).
``recbole.yaml`` only marks keys of RecBole. RecBole's own comments, ``# (type) meaning``, are read too, as far as its
defaults bear them out.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from dataclasses import dataclass, replace
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from recbole_llm import registry
from recbole_llm.config.stock_sources import keys_read_by
from recbole_llm.errors import UserError

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_TYPE = r"(?:int|float|bool|str|list|pair|dict|None)"
_CONSTRAINT = rf"[<>]=?\s*{_NUMBER}|in\s*[\[(]\s*{_NUMBER}\s*,\s*{_NUMBER}\s*[\])]|one of [^()]+"
_COMMENT = re.compile(
    rf"(?:^|\s)#\s*\((?P<type>{_TYPE}(?: or {_TYPE})*)(?:,\s*(?P<constraint>{_CONSTRAINT}))?\)"
    r"(?:\s*\[(?P<mark>\w+)\])?\s*(?P<meaning>.*)$"
)
_STOCK_COMMENT = re.compile(r"(?:^|\s)#\s*\((?P<type>[^)]*)\)\s*(?P<meaning>.*)$")

# What a mark says of a key. A key that decides takes part in the identity of a trained model, see config/identity.py.
MARKS = {
    "": "decides what a model becomes",
    "data": "decides it, as a part of the data that all models of a run read",
    "training": "decides it, but belongs to one training: a pre-training on other datasets does not take it over",
    "text": "texts of items or prompts: decides what an LLM recommender becomes, nothing for a model of ids",
    "teacher": "about the teacher: decides what an LLM recommender becomes, nothing for a model without a teacher",
    "cost": "time or memory only",
    "output": "what is shown, logged or written, and where files lie",
}

# What RecBole's own comments do not say about its keys.
_STOCK_CONSTRAINTS = {
    "epochs": "> 0",
    "train_batch_size": "> 0",
    "eval_batch_size": "> 0",
    "learning_rate": "> 0",
    "learner": "one of adam|adamw|sgd|adagrad|rmsprop|sparse_adam",
    "eval_step": ">= 0",
    "stopping_step": ">= 0",
    "weight_decay": ">= 0",
    "worker": ">= 0",
    "seed": "in [0, 4294967295]",
    "loss_decimal_place": "in [0, 15]",
    "metric_decimal_place": "in [0, 15]",
    "MAX_ITEM_LIST_LENGTH": "> 0",
    "topk": "> 0",
}

# Keys of RecBole's that cannot be None.
_STOCK_REQUIRED = set(
    """
    data_path checkpoint_dir USER_ID_FIELD ITEM_ID_FIELD TIME_FIELD ITEM_LIST_LENGTH_FIELD LIST_SUFFIX field_separator
    seq_separator seed state epochs train_batch_size eval_batch_size learner learning_rate weight_decay eval_step stopping_step
    eval_args metrics valid_metric loss_decimal_place metric_decimal_place MAX_ITEM_LIST_LENGTH
    """.split()
)
_MAY_BE_EMPTY = ("gpu_id",)  # texts that mean something while they are empty
_LARGEST_NUMBER = 2**63 - 1  # of a whole number: what NumPy and PyTorch count with

# Keys that RecBole sets or reads and documents in no YAML file of its own.
_UNDOCUMENTED = (
    "model dataset config_files config_file_list config_file nproc world_size ip port offset group_offset local_rank "
    "single_spec device encoding verbose MODEL_TYPE MODEL_INPUT_TYPE eval_type valid_neg_sample_args "
    "test_neg_sample_args neg_sampling training_neg_sample_num tail_ratio"
).split()


# --- YAML ---------------------------------------------------------------------------------------------------------


class SettingsLoader(yaml.SafeLoader):
    """YAML that builds plain values only, reads ``1e-4`` as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            name = getattr(key_node, "value", None)
            if isinstance(name, str) and name != "<<":
                if name in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key '{name}' is given twice", key_node.start_mark
                    )
                seen.add(name)
        return super().construct_mapping(node, deep=deep)


SettingsLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^(?:[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+|[-+]?\.[0-9][0-9_]*[eE][-+]?[0-9]+)$"),
    list("-+0123456789."),
)


def load_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """Read a YAML file of settings.

    Raises:
        UserError: the file is missing, not UTF-8, not YAML, or not a mapping of keys to values.
    """
    return read_settings_file(Path(path))[0]


def read_settings_file(path: Path) -> tuple[dict[str, Any], dict[str, int], list[str]]:
    """Return a settings file's values, the line index of each key, and its lines."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"the config file '{path}' cannot be read: {error.strerror or error}.") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: the file is not UTF-8; save it in that encoding.") from None
    try:
        loader = SettingsLoader(text)
        node = loader.get_single_node()
        values = loader.construct_document(node) if node is not None else {}
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: this is no valid YAML: {error.problem}.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: this is no valid YAML: {' '.join(str(error).split())}.") from None
    if values is None:
        values, node = {}, None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{path}: a config file holds lines of the form 'key: value'.")
    lines_of_keys = {key.value: key.start_mark.line for key, _ in node.value} if node is not None else {}
    return values, lines_of_keys, text.splitlines()


def parse_value(text: str) -> Any:
    """Read one YAML value; raises ``yaml.YAMLError`` or ``ValueError``."""
    return yaml.load(text, Loader=SettingsLoader)


# --- the schema ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """What is known of one setting.

    Attributes:
        name: the key.
        type: as its comment says, e.g. ``"int or None"``; empty where nothing is said (then any value fits).
        constraint: e.g. ``"> 0"``, ``"in [0, 1]"``, ``"one of a|b"``, or empty.
        meaning: one sentence.
        default: the value in the file.
        where: file and line, relative to ``properties/``.
        mark: one of :data:`MARKS`.
        section: heading of the keys that it stands among.
    """

    name: str
    type: str = ""
    constraint: str = ""
    meaning: str = ""
    default: Any = None
    where: str = ""
    mark: str = ""
    section: str = ""

    @property
    def types(self) -> tuple[str, ...]:
        return tuple(self.type.split(" or ")) if self.type else ()

    @property
    def choices(self) -> list[str]:
        """The entries of ``one of``, else nothing."""
        listed = self.constraint[len("one of") :] if self.constraint.startswith("one of") else ""
        return [choice.strip() for choice in listed.split("|") if listed]

    def fit(self, value: Any) -> Any:
        """Return ``value`` in the key's type: 3.0 as the int 3, ``"1e-4"`` as a number, a lone text as a list of one.

        Raises:
            ValueError: the value cannot be what the key wants.
        """
        if type(value).__module__ == "numpy" and hasattr(value, "item"):
            value = value.item()  # hyper-parameter searches draw numpy numbers
        if not self.type:
            return value
        fitted = self._typed(value)
        if isinstance(fitted, str) and not fitted.strip() and not self._may_be_blank(fitted):
            raise ValueError
        if isinstance(fitted, list):
            self._check_entries(fitted)
        for entry in fitted if isinstance(fitted, list) else [fitted]:
            if not self._allowed(entry):
                raise ValueError
        return fitted

    def _may_be_blank(self, value: str) -> bool:
        """Whether an empty text, or one of spaces alone, makes sense: the wording of a prompt, not a name."""
        if self.mark == "text" or self.name in _MAY_BE_EMPTY:
            return True
        return isinstance(self.default, str) and not self.default.strip() and (bool(value) or not self.default)

    def _check_entries(self, entries: list) -> None:
        """Refuse what is no value in a list: lists, mappings and nothing, unless the key's default has such entries."""
        if self.types == ("pair",) and len(entries) != 2:
            raise ValueError
        usual = {type(entry) for entry in self.default} if isinstance(self.default, list) else set()
        for entry in entries:
            if isinstance(entry, (list, tuple, dict, set, type(None))) and type(entry) not in usual:
                raise ValueError
            if isinstance(entry, str) and not entry.strip() and self.mark != "text":
                raise ValueError
            if isinstance(entry, (int, float)) and not abs(entry) <= _LARGEST_NUMBER:  # nor NaN
                raise ValueError

    def _typed(self, value: Any) -> Any:
        types = self.types
        if (value is None or value == "None") and "None" in types:  # "None" is how Python's users write YAML's ~
            return None
        if isinstance(value, bool):
            if "bool" in types:
                return value
        elif isinstance(value, (int, float)):
            if "int" in types and abs(value) <= _LARGEST_NUMBER and value == int(value):
                return int(value)
            if "float" in types and (abs(value) <= _LARGEST_NUMBER if isinstance(value, int) else math.isfinite(value)):
                return float(value)
        elif isinstance(value, date) and "str" in types:  # as YAML reads 2021-08-11
            return value.isoformat()
        elif isinstance(value, dict) and "dict" in types:
            return value
        elif isinstance(value, (list, tuple)) and {"list", "pair"} & set(types):
            return list(value)
        elif isinstance(value, str):
            if {"list", "pair"} & set(types) and value.lstrip().startswith("["):
                return self._typed(self._parsed(value))
            if "str" in types:
                return value
            if not isinstance(parsed := self._parsed(value), str):
                return self._typed(parsed)
            if "list" in types:
                return [value]
        raise ValueError

    @staticmethod
    def _parsed(text: str) -> Any:
        try:
            return parse_value(text)
        except yaml.YAMLError:
            raise ValueError from None

    def _allowed(self, value: Any) -> bool:
        constraint = self.constraint
        if not constraint or value is None or isinstance(value, dict):
            return True
        if self.choices:
            return str(value) in self.choices
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            # An unnumbered alternative, as "auto" in "(float or str, > 0)"; an entry of a list has to be a number.
            return isinstance(value, (bool, str)) and type(value).__name__ in self.types
        if constraint.startswith("in"):
            low, high = (float(bound) for bound in re.findall(_NUMBER, constraint))
            below = value < high if ")" in constraint else value <= high
            return below and (value > low if "(" in constraint else value >= low)
        sign, bound = re.fullmatch(rf"([<>]=?)\s*({_NUMBER})", constraint).groups()
        bound = float(bound)
        return {">": value > bound, ">=": value >= bound, "<": value < bound, "<=": value <= bound}[sign]

    def allowed_values(self) -> str:
        """Say in words what fits, e.g. ``"a number in [0, 1] or None"``."""
        words = {
            "int": "a whole number",
            "float": "a number",
            "bool": "True or False",
            "str": "a text",
            "list": "a list such as [a, b]",
            "pair": "a list of two numbers such as [0.9, 0.98]",
            "dict": "a mapping such as {a: 1}",
        }
        kinds = [kind for kind in self.types if kind != "None"]
        if self.choices:
            allowed = "one of " + ", ".join(self.choices)
            if "list" in kinds:
                allowed = "a list of any of " + ", ".join(self.choices)
        else:
            if {"int", "float"} <= set(kinds):
                kinds.remove("int")
            allowed = " or ".join(words[kind] for kind in kinds)
            if self.constraint:
                of_lists = "a list of values" if "list" in kinds else "a list of two numbers" if "pair" in kinds else ""
                numbers = [words[kind] for kind in kinds if kind in ("int", "float")]
                others = [words[kind] for kind in kinds if kind not in ("int", "float", "list", "pair")]
                allowed = " or ".join([f"{kind} {self.constraint}" for kind in [*numbers, of_lists] if kind] + others)
        return allowed + (" or None" if "None" in self.types else "")


Schema = dict[str, dict[str, Key]]


def read_schema() -> Schema:
    """Read every key that the YAML files document.

    Returns:
        group -> key name -> :class:`Key`. Groups: ``recbole`` (its general and dataset keys), ``overall``, ``stock``, ``llm``,
        and ``protocol/<name>``, ``form/<name>``, ``model/<name>``, ``dataset/<name>``, ``backbone/<name>``, ``targets/<name>``,
        one for each of our files. A key that a file gives again without a comment says what the files below say of it.
    """
    schema = {"recbole": recbole_keys(), **shared_schema()}
    below = {**schema["recbole"], **_merged(schema, "protocol/"), **schema["overall"], **schema["llm"]}
    schema["stock"] = keys_of_stock_models()
    for kind in ("form", "dataset", "backbone"):
        schema.update({group: _inherited(keys, below) for group, keys in _groups(kind).items()})
    of_any_form = {**below, **_merged(schema, "form/")}
    schema.update({group: _inherited(keys, of_any_form) for group, keys in _groups("targets").items()})
    for name in registry.models():
        root, path = registry.properties_folder(), registry.properties_of(name)
        where = f"model/{path.name}" if path.is_relative_to(root) else str(path)
        of_forms = {key: said for form in forms_of(name) for key, said in schema[f"form/{form}"].items()}
        schema[f"model/{name}"] = _inherited(keys_of_file(path, where), {**below, **of_forms})
    return schema


def shared_schema() -> Schema:
    """The part of :func:`read_schema` that is the same for every model: ``overall``, ``llm`` and ``protocol/<name>``."""
    root = registry.properties_folder()
    overall = keys_of_file(root / "overall.yaml", "overall.yaml")
    llm = _inherited(keys_of_file(root / "llm.yaml", "llm.yaml"), overall)
    return {"overall": overall, "llm": llm, **_groups("protocol")}


def keys_of_stock_models() -> dict[str, Key]:
    """The keys of ours that every model of RecBole's own has."""
    path = registry.properties_folder() / "stock.yaml"
    return _inherited(keys_of_file(path, path.name), shared_schema()["llm"])


def _groups(kind: str) -> Schema:
    """The keys of each file of a folder of ``properties/``, as its own comments describe them."""
    files = sorted((registry.properties_folder() / kind).glob("*.yaml"))
    return {f"{kind}/{file.stem}": keys_of_file(file, f"{kind}/{file.name}") for file in files}


def _merged(schema: Schema, prefix: str) -> dict[str, Key]:
    return {name: key for group, keys in schema.items() if group.startswith(prefix) for name, key in keys.items()}


def _inherited(keys: dict[str, Key], below: dict[str, Key]) -> dict[str, Key]:
    """The keys of a file, where it leaves the description of one to the files below."""
    described = {}
    for name, key in keys.items():
        lower = below.get(name, Key(name))
        if not key.type:
            key = replace(lower, default=key.default, where=key.where)
        described[name] = replace(key, mark=key.mark or lower.mark, section=key.section or lower.section)
    return described


def forms_of(model: str) -> list[str]:
    """The ways in which one of our models can be asked: ``forms`` in its file.

    Raises:
        UserError: a form that has no file.
    """
    path = registry.properties_of(model)
    return list(_forms_of_file(path, _stamp(path)))


@lru_cache(maxsize=512)
def _forms_of_file(path: Path, stamp: int) -> tuple[str, ...]:
    """``stamp``: the file's time of change, so that the cache notices one."""
    forms = load_yaml(path).get("forms") or []
    forms = list(forms) if isinstance(forms, list) else [forms]
    known = sorted(file.stem for file in (registry.properties_folder() / "form").glob("*.yaml"))
    for form in forms:
        if form not in known:
            raise UserError(f"{path}: forms must be a list of any of {', '.join(known)}, not {form!r}.")
    return tuple(forms)


def settings_files(model: str) -> list[Path]:
    """The files of one of our models, a later one over those before: of all LLM recommenders, its forms', its own."""
    root = registry.properties_folder()
    return [root / "llm.yaml", *(root / "form" / f"{form}.yaml" for form in forms_of(model)), registry.properties_of(model)]


def known_keys(model: str, model_class: type | None = None) -> dict[str, Key]:
    """Return every key that a run of ``model`` accepts, name -> :class:`Key`.

    Args:
        model: name of one of our models, or of a stock RecBole model.
        model_class: its class, where the caller has it.
    """
    return dict(_known_keys(model, model_class, _state_of_files()))


def _state_of_files() -> tuple[tuple[str, int], ...]:
    """All files that keys come from, with the times of their last change: a comparison asks for the keys again and again."""
    files = [*registry.properties_folder().rglob("*.yaml"), *map(registry.properties_of, registry.models())]
    return tuple(sorted((str(file), _stamp(file)) for file in files))


@lru_cache(maxsize=256)
def _known_keys(model: str, model_class: type | None, state: tuple[tuple[str, int], ...]) -> dict[str, Key]:
    schema = read_schema()
    known = {**schema["recbole"], **_merged(schema, "protocol/"), **_merged(schema, "dataset/")}
    if registry.is_ours(model):
        return {**known, **_merged(schema, "backbone/"), **schema["overall"], **llm_keys(model, schema)}
    for name in schema["llm"].keys() - schema["recbole"].keys():  # what a dataset's file says for LLM recommenders alone
        known.pop(name, None)
    known.update(schema["overall"])
    for name, key in stock_model_keys(model, model_class).items():
        if name not in known or key.where != "recbole":  # of a key that its source reads, nothing more is known
            known[name] = key
    return known


def llm_keys(model: str, schema: Schema | None = None) -> dict[str, Key]:
    """The keys of one of our models: of all LLM recommenders, of its forms, its own."""
    schema, forms = schema or read_schema(), forms_of(model)
    keys = dict(schema["llm"])
    for form in forms:
        keys.update(schema[f"form/{form}"])
    keys.update(schema[f"model/{model}"])
    del keys["forms"]  # for the model's file, not for a run
    if forms and "recommend_by" in keys:
        keys["recommend_by"] = replace(keys["recommend_by"], constraint="one of " + "|".join(forms))
    return keys


@lru_cache(maxsize=1)
def recbole_arguments() -> dict[str, tuple[str, ...]]:
    """The names of RecBole's keys by category: ``general``, ``training``, ``evaluation``, ``dataset``.

    As RecBole's file lists them: its own lists grow with each Config, and importing them imports PyTorch.
    """
    place = registry.recbole_folder() / "utils" / "argument_list.py"
    spec = importlib.util.spec_from_file_location("recbole_argument_list", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    categories = ("general", "training", "evaluation", "dataset")
    return {category: tuple(getattr(module, f"{category}_arguments")) for category in categories}


def _stamp(path: Path) -> int:
    return path.stat().st_mtime_ns


def keys_of_file(path: Path, where: str, stock: bool = False) -> dict[str, Key]:
    """Return the keys of a YAML file as its comments describe them.

    Args:
        path: the file.
        where: what messages call it.
        stock: whether it is one of RecBole's, whose comments are less strict.
    """
    return dict(_keys_of_file(path, _stamp(path), where, stock))


@lru_cache(maxsize=512)
def _keys_of_file(path: Path, stamp: int, where: str, stock: bool) -> dict[str, Key]:
    """``stamp``: the file's time of change, so that the cache notices one."""
    values, line_of_key, lines = read_settings_file(path)
    keys, sections = {}, _sections(lines)
    for name, default in values.items():
        line = line_of_key[name]
        place = f"{where}:{line + 1}"
        if stock:
            keys[name] = _stock_key(name, default, lines[line], place)
            continue
        match = _COMMENT.search(lines[line])
        if match is None and line > 0 and lines[line - 1].lstrip().startswith("#"):
            match = _COMMENT.search(lines[line - 1])
        said = {part: (text or "").strip() for part, text in match.groupdict().items()} if match else {}
        keys[name] = Key(name=name, default=default, where=place, section=sections[line], **said)
    return keys


def _sections(lines: list[str]) -> list[str]:
    """The heading above each line of a file, empty above the first."""
    sections, section = [], ""
    for line, before in zip(lines, ["#", *lines], strict=False):
        if line.startswith("#") and not before.strip() and not _COMMENT.search(line):
            section = re.split(r"[:.;]", line.lstrip("# "))[0].strip()
        sections.append(section)
    return sections


def _stock_key(name: str, default: Any, line: str, where: str) -> Key:
    """Read RecBole's comment ``# (type) meaning`` leniently: where its own default does not fit, nothing is said."""
    match = _STOCK_COMMENT.search(line)
    if match is None:
        return Key(name=name, default=default, where=where)
    alike = {
        "int": ["int"] if "model/" not in where else ["int", "float"],
        "float": ["float"],
        "bool": ["bool"],
        "str": ["str", "int", "float"],
        "string": ["str", "int", "float"],
        "list": ["list", "str"],
        "dict": ["dict"],
    }
    types: list[str] = []
    for word in re.split(r"\s+or\s+|\s*,\s*", match["type"].strip()):
        if word in ("None", "optional"):
            continue
        word = "list" if word.startswith("list of") else word
        if word not in alike:
            types = []
            break
        types += [kind for kind in alike[word] if kind not in types]
    key = Key(name=name, meaning=match["meaning"].strip(), default=default, where=where)
    if types:
        of_model = "model/" in where
        constraint = "" if of_model else _STOCK_CONSTRAINTS.get(name, "")
        required = not of_model and name in _STOCK_REQUIRED
        typed = replace(key, type=" or ".join(types if required else [*types, "None"]), constraint=constraint)
        try:
            typed.fit(default)
        except ValueError:
            return key
        return typed
    return key


def recbole_keys() -> dict[str, Key]:
    """Return the keys that every RecBole run knows, with the marks that ``properties/recbole.yaml`` gives them."""
    root = registry.recbole_folder() / "properties"
    keys: dict[str, Key] = {}
    for file in ("overall.yaml", "dataset/sample.yaml"):
        keys.update(keys_of_file(root / file, f"recbole/{file}", stock=True))
    for name in (*(name for names in recbole_arguments().values() for name in names), *_UNDOCUMENTED):
        keys.setdefault(name, Key(name=name, where="recbole"))
    for name, key in keys_of_file(registry.properties_folder() / "recbole.yaml", "recbole.yaml").items():
        said = keys.get(name, key)
        keys[name] = replace(said, type=said.type or key.type, mark=key.mark, meaning=key.meaning)
    return keys


def stock_model_keys(model: str, model_class: type | None) -> dict[str, Key]:
    """Return the keys of a stock model: ours, its YAML file, and what its source reads beyond that."""
    keys = keys_of_stock_models()
    if model in registry.BASELINES:
        return {**keys, **_inherited(keys_of_file(registry.properties_of(model), f"model/{model}.yaml"), keys)}
    path = registry.recbole_folder() / "properties" / "model" / f"{model}.yaml"
    for name in keys_read_by(model if model_class is None else model_class):
        keys[name] = Key(name=name, where="recbole")
    if is_file_name(model) and path.is_file():
        keys.update(keys_of_file(path, f"recbole/model/{model}.yaml", stock=True))
    return keys


def is_file_name(name: Any) -> bool:
    """Whether a name is a mere file name, so that it cannot lead out of ``properties/``."""
    return isinstance(name, str) and bool(name) and Path(name).name == name and name not in (".", "..")
