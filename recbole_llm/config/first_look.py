"""What of a command can be told wrong before RecBole and PyTorch are imported, which takes seconds.

It finds misspelled models, datasets and keys, and values of the wrong kind. Whatever it lets pass is checked in full when the
configurations are built (:mod:`recbole_llm.config.checks`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_llm import registry
from recbole_llm.config.checks import did_you_mean, fitted, no_such_model
from recbole_llm.config.identity import own_training_keys
from recbole_llm.config.protocols import protocol_names
from recbole_llm.config.schema import Key, known_keys, read_schema, read_settings_file
from recbole_llm.config.settings import check_dataset, lone, model_of
from recbole_llm.errors import UserError


def first_look(models: Sequence[str], dataset: str, settings: Mapping[str, Any], files: Sequence[str] = ()) -> None:
    """Check the words of a command.

    Args:
        models: labels, such as ``LLMSTAR`` or ``LLMSTAR:plain``.
        dataset: its name.
        settings: keys of the command line, ``"SASRec.epochs"`` among them.
        files: YAML files below them.

    Raises:
        UserError: a model, dataset, key or value that no run can have.
    """
    known = registry.known_models()
    models = [part for label in models for part in label.split("+") if part]  # of fused rows as well
    for label in models:
        if model_of(label) not in known:
            raise no_such_model(model_of(label))
    given: dict[str, tuple[Any, str]] = {}
    for file in files:
        values, lines, _ = read_settings_file(Path(file))
        given.update({name: (value, f"{file}:{lines[name] + 1}") for name, value in values.items()})
    given.update({name: (value, "command line") for name, value in settings.items()})
    if "protocol" in given:
        value, where = given["protocol"]
        if len(protocol_names(value)) > 1:
            del given["protocol"]  # they are all known
        else:
            given["protocol"] = lone(value), where
    _check_keys(models, given)
    data_path = given.get("data_path", ("dataset/", ""))[0]
    if dataset != "ml-100k" and isinstance(data_path, str):  # RecBole has its files in its own package
        check_dataset(dataset, Path(data_path) / dataset)


def _check_keys(models: Sequence[str], given: Mapping[str, tuple[Any, str]]) -> None:
    keys = {label: known_keys(model_of(label)) for label in models}
    ours = [label for label in models if registry.is_ours(model_of(label))]
    own = own_training_keys() if ours else set()  # of the baselines: what is said to all is not said to them
    elsewhere: dict[str, Key] = {}
    for group in read_schema().values():
        elsewhere.update(group)
    for name, (value, where) in given.items():
        owner, dot, key = name.partition(".")
        if dot and owner not in keys:
            continue  # of a teacher, or of no model of the run: which of them, the configurations tell
        those = {owner: keys[owner]} if dot else {label: keys[label] for label in (ours if name in own else models)}
        key = key if dot else name
        for known in those.values():
            if key in known:
                fitted(known[key], value, where)
        if not any(key in known for known in those.values()) and key not in elsewhere:
            everything = {key for known in those.values() for key in known}
            hint = did_you_mean(key, everything) or "; --help lists the keys."
            _refuse_unless_teacher(models, given, key, f"unknown key '{key}' ({where}){hint}")


def _refuse_unless_teacher(models: Sequence[str], given: Mapping[str, tuple[Any, str]], key: str, sentence: str) -> None:
    """A key of a teacher alone has a sentence of its own, which knows the teacher; the full check says it."""
    teachers = {str(value) for name, (value, _) in given.items() if name.rpartition(".")[2] == "teacher"} | {"SASRec"}
    if any(map(registry.is_ours, map(model_of, models))) and any(key in known_keys(name) for name in teachers):
        return
    raise UserError(sentence)
