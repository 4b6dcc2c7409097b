"""The configuration of one model of a comparison: what of the comparison's settings is meant for it, and for its teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recbole.config import Config
from recbole.utils import ModelType, get_model

from recbole_llm.config.identity import own_training_keys
from recbole_llm.config.presets import preset_named, preset_settings
from recbole_llm.config.schema import known_keys, load_yaml, read_schema
from recbole_llm.config.settings import make_config, model_of, settings_for
from recbole_llm.errors import UserError
from recbole_llm.processes import group as processes
from recbole_llm.registry import is_ours


def configure(
    name: str,
    dataset: str,
    models: Sequence[str],
    seed: int | None,
    config_file_list: Sequence[str] | None,
    settings: Mapping[str, Any],
) -> Config:
    """The configuration of one model, or variant of one, of a comparison."""
    files = settings_of_files(config_file_list)
    together = {**files, **settings}
    ours = [label for label in models if is_ours(model_of(label))]
    # A teacher may be addressed by its name ("SASRec.epochs") whether or not it is among the models.
    teachers = {label: _teacher_of(label, together) for label in ours}
    named = list(teachers.values())
    from_files = {"protocol": default_protocol(ours, together), **settings_for(name, files, models, named)}
    given = settings_for(name, settings, models, named)
    if seed is not None:
        given["seed"] = seed
    if not processes.is_main():
        given |= {"show_progress": False, "log_wandb": False}
    if name not in ours and ours:
        # A baseline beside LLM recommenders keeps RecBole's training settings, as their teacher does: the LLM's learning rate
        # or epochs would not make it a fair baseline. What is given in its own name holds.
        for values, source in ((from_files, files), (given, settings)):
            own = {key.rpartition(".")[2] for key in source if key.startswith((f"{name}.", f"{model_of(name)}."))}
            for key in own_training_keys() - own:
                values.pop(key, None)
    if name in ours:
        teacher = f"{teachers[name]}."
        for_teacher = {key.removeprefix(teacher): value for key, value in together.items() if key.startswith(teacher)}
        if teachers[name] in models:  # what is said of all models that know a key is said of it, as a teacher too
            of_both = known_keys(teachers[name]).keys() - known_keys(model_of(name)).keys()
            for_teacher = {**{key: together[key] for key in together if key in of_both}, **for_teacher}
        named_settings = [values.get("teacher_settings") or {} for values in (from_files, given)]
        if for_teacher and all(isinstance(values, Mapping) for values in named_settings):  # else a mistake, told by make_config
            given["teacher_settings"] = {**named_settings[0], **named_settings[1], **for_teacher}
    of_teacher = together.get("teacher_settings")
    if name in teachers.values() and isinstance(of_teacher, dict):  # as the teacher of the others, so that it is trained once
        given = {**of_teacher, **given}
    if name in teachers.values():
        recipes = {_preset_of(label, together).get("teacher_preset") for label in ours if teachers[label] == name}
        if len(recipes) == 1 and "teacher_preset" not in together:
            from_files["teacher_preset"] = recipes.pop()
    config = make_config(model_of(name), dataset, config_dict=from_files, command_line=given)
    if config["MODEL_TYPE"] not in (ModelType.SEQUENTIAL, ModelType.GENERAL, ModelType.TRADITIONAL):
        raise UserError(
            f"model: {name} reads features or knowledge of users and items, which a comparison here has none of; take a "
            f"sequential or a general recommender, or compare it with RecBole's own run_recbole."
        )
    return config


def settings_of_files(config_file_list: Sequence[str] | None) -> dict[str, Any]:
    files: dict[str, Any] = {}
    for file in config_file_list or ():
        files.update(load_yaml(file))
    return files


def _teacher_of(label: str, settings: Mapping[str, Any]) -> str:
    """The name of the teacher of one of our models, or of a variant."""
    keys = (f"{label}.teacher", f"{model_of(label)}.teacher", "teacher")
    return str(next((settings[key] for key in keys if settings.get(key)), "SASRec"))


def _preset_of(label: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the recipe that a comparison names for one of our models, or for a variant."""
    model = model_of(label)
    return preset_settings(model, preset_named(settings, label, model), None)


def default_protocol(ours: Sequence[str], settings: Mapping[str, Any]) -> str:
    """The protocol of a comparison that names none: that of the form in which models are asked, or of the first of our models
    which has one of its own."""
    schema, own = read_schema(), []
    for label in ours:
        model = model_of(label)
        preset = _preset_of(label, settings)
        asked = settings.get("recommend_by", preset.get("recommend_by"))
        form = getattr(get_model(model), "forms", {}).get(str(asked))
        if form is not None and form.protocol is not None:
            return form.protocol
        usual = {key: said.default for key, said in schema[f"model/{model}"].items()} | preset
        if "protocol" in usual and asked in (None, usual.get("recommend_by", asked)):
            own.append(usual["protocol"])
    return own[0] if own else "retrieval"
