"""Published recipes of a model, by name: ``properties/preset/<model>/<name>.yaml`` (key ``preset``).

A recipe is a file of settings, each with its source in a comment. It stands between what the model's and the data set's files
say and what the user says. Its key ``datasets`` holds settings for single data sets by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recbole_llm import registry
from recbole_llm.config.schema import load_yaml
from recbole_llm.errors import UserError, closest


def presets_of(model: str) -> dict[str, Path]:
    """The files of a model's recipes by name. A model of another package has its own beside its settings."""
    folders = [registry.properties_folder() / "preset" / model]
    if registry.is_ours(model):
        folders.append(registry.properties_of(model).parent / "preset" / model)
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def preset_settings(model: str, name: Any, dataset: Any, where: str = "") -> dict[str, Any]:
    """The settings of a model's recipe for a data set; none where ``name`` is None.

    Raises:
        UserError: the model has no recipe of that name.
    """
    if name is None:
        return {}
    known = presets_of(model)
    if not isinstance(name, str) or name not in known:
        near = closest(str(name), known)
        origin = f" ({where})" if where else ""
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise UserError(f"preset: {model} has no preset {name!r}; {has}{f', did you mean {near}?' if near else '.'}{origin}")
    settings = load_yaml(known[name])
    of_datasets = settings.pop("datasets", None) or {}
    return {**settings, **(of_datasets.get(str(dataset)) or {})}


def preset_named(settings: Mapping[str, Any], label: str, model: str) -> Any:
    """The preset that the settings of a comparison name for a model or a variant of one; None without one."""
    keys = (f"{label}.preset", f"{model}.preset", "preset")
    return next((settings[key] for key in keys if settings.get(key) is not None), None)
