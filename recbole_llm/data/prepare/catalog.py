"""The sources and the datasets with a name: what the modules in ``sources/`` offer."""

from __future__ import annotations

import importlib
import pkgutil
from functools import lru_cache

import recbole_llm.data.prepare.sources as sources
from recbole_llm.data.prepare.source import Preset, Source
from recbole_llm.errors import UserError, closest


@lru_cache(maxsize=1)
def all_sources() -> dict[str, Source]:
    """Source name -> source."""
    return {module.SOURCE.name: module.SOURCE for module in _modules()}


@lru_cache(maxsize=1)
def all_presets() -> dict[str, Preset]:
    """Dataset name -> what it is."""
    return {preset.name: preset for module in _modules() for preset in module.PRESETS}


def _modules() -> list:
    names = sorted(entry.name for entry in pkgutil.iter_modules(sources.__path__))
    return [importlib.import_module(f"{sources.__name__}.{name}") for name in names]


def find(name: str) -> tuple[Source, Preset]:
    """The source and dataset of ``amazon-cds`` (a name) or ``amazon-2023:Gift_Cards`` (source and variant).

    Raises:
        UserError: there is no such dataset.
    """
    presets, known = all_presets(), all_sources()
    if name in presets:
        return known[presets[name].source], presets[name]
    source, colon, variant = name.partition(":")
    if source in known and (colon or "" in known[source].variants):
        return known[source], known[source].preset(variant)
    if source in known:
        forms = ", ".join(f"{source}:{variant}" for variant in known[source].variants)
        raise UserError(f"{name} is a source with several datasets: write {forms}.")
    movielens = "movielens-" + name.removeprefix("ml-")
    near = movielens if movielens in presets else closest(name, [*presets, *known])
    hint = f"did you mean {near}?" if near else "recbole-llm prepare --help lists what there is."
    raise UserError(f"no source offers {name!r}; {hint}")
