"""Which settings decide what a model becomes: what follows from the marks of the keys, see ``schema.MARKS``.

A trained model is kept under a digest of these settings, so that the same one is found again whatever else changed.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from recbole_llm import registry
from recbole_llm.config.schema import keys_of_stock_models, known_keys, recbole_arguments, recbole_keys, shared_schema

if TYPE_CHECKING:
    from recbole.config import Config

_NEVER = frozenset({"cost", "output"})
_FOR_LLM_ALONE = frozenset({"text", "teacher"})


def deciding_settings(config: Config, without: Collection[str] = ()) -> dict[str, Any]:
    """The resolved settings that decide what this model becomes, JSON-ready; a key that is None is left out.

    Args:
        config: a built configuration, of an LLM recommender or of a stock model.
        without: further marks whose keys are left out.
    """
    model = config["model"]
    left_out = _NEVER | set(without) | (frozenset() if registry.is_ours(model) else _FOR_LLM_ALONE)
    marks = {name: key.mark for name, key in known_keys(model).items()}
    unread = frozenset() if registry.is_ours(model) else _unread(config)
    settings = {
        name: value
        for name, value in config.final_config_dict.items()
        if value is not None and marks.get(name, "") not in left_out and name not in unread
    }
    return json.loads(json.dumps(settings, default=str, sort_keys=True))


def _unread(config: Config) -> set[str]:
    """Keys of ours that a stock model does not read, as its others are: they decide nothing."""
    keys, source = set(keys_of_stock_models()), config["item_vectors"]
    if not source:
        return keys
    of_llm = {"item_vectors_pooling", *(name for name in keys if name.startswith("backbone"))}
    of_sources = {"text": {"sentence_encoder"}, "llm": of_llm}
    read = of_sources.get(source, {"item_vectors_rows"})
    unread = {name for names in (*of_sources.values(), {"item_vectors_rows"}) for name in names} - read
    of_projection = {"item_vectors_projection", "item_vectors_hidden_size"}
    return unread if config["item_vectors_use"] == "project" else unread | of_projection


def data_settings(config: Config) -> dict[str, Any]:
    """The settings that decide what a ``TextSequentialDataset`` and its splits are, JSON-ready.

    Beside RecBole's own keys of data: those that all models share and that are marked [data] or [text].
    """
    schema = shared_schema()
    ours = (name for group in schema if group != "llm" for name, key in schema[group].items() if key.mark in ("data", "text"))
    names = dict.fromkeys(("dataset", "data_path", *recbole_arguments()["dataset"], *ours))
    return json.loads(json.dumps({name: config[name] for name in names}, default=str, sort_keys=True))


def settings_for_teacher(config: Config) -> dict[str, Any]:
    """What the user said of a run that holds for the teacher of its LLM recommender, too: data, evaluation, machine."""
    schema = shared_schema()
    overall = {name for name, key in schema["overall"].items() if key.mark in ("", "data", "text")}
    of_protocols = [key for group, keys in schema.items() if group.startswith("protocol/") for key in keys.values()]
    overall |= {key.name for key in of_protocols if key.mark == "data"}
    overall.add("resume")
    arguments = recbole_arguments()
    shared = {*arguments["general"], *arguments["evaluation"], *arguments["dataset"], *overall} - own_training_keys()
    return {name: value for name, value in config.external_config_dict.items() if name in shared}


def own_training_keys() -> set[str]:
    """Keys of training that a stock model beside an LLM recommender has values of its own for.

    RecBole's training keys, and those keys of every run that ``llm.yaml`` has another default for.
    """
    schema = shared_schema()
    return {*recbole_arguments()["training"], *(schema["overall"].keys() & schema["llm"].keys())}


def settings_for_pretraining(config: Config) -> dict[str, Any]:
    """What the user said of a run that holds for a pre-training of its LLM on other datasets, too."""
    known, of_recbole = known_keys(config["model"]), recbole_keys()

    def carried(name: str) -> bool:
        mark = known[name].mark if name in known else ""
        if name == "preset":
            return True
        return name not in ("model", "dataset") and mark != "training" and (mark != "output" or name in of_recbole)

    return {name: value for name, value in config.external_config_dict.items() if carried(name)}
