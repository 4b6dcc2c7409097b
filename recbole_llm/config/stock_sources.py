"""Which keys a stock model reads: what its source says, and that of the classes it stands on. Nothing is imported for it."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from functools import lru_cache
from pathlib import Path

from recbole_llm import registry


@lru_cache(maxsize=128)
def keys_read_by(model: str | type) -> tuple[str, ...]:
    """The keys that the source of a stock model and of the classes it stands on reads."""
    if isinstance(model, str):
        sources = _sources_of_class(model, _source_of_model(model), {})
    else:
        sources = []
        for owner in model.__mro__:
            if owner.__module__.startswith("recbole."):
                try:
                    sources.append(inspect.getsource(sys.modules[owner.__module__]))
                except (OSError, TypeError):
                    continue
    names = [name for source in sources for name in re.findall(r"config(?:\.get\(|\[)\s*['\"](\w+)['\"]", source)]
    return tuple(dict.fromkeys(names))


def _source_of_model(model: str) -> Path | None:
    """The module of a stock model, which is named like it. It is not imported: that takes seconds."""
    if model not in registry.stock_models():
        return None
    return next(iter(sorted((registry.recbole_folder() / "model").glob(f"*_recommender/{model.lower()}.py"))), None)


def _sources_of_class(name: str, path: Path | None, seen: dict[Path, str]) -> list[str]:
    """The text of the module of a RecBole class, and of the modules of its base classes."""
    if path is None or path in seen or not path.is_file():
        return list(seen.values())
    seen[path] = text = path.read_text(encoding="utf-8")
    nodes = ast.parse(text).body
    bases = {node.name: [getattr(base, "id", "") for base in node.bases] for node in nodes if isinstance(node, ast.ClassDef)}
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    modules = {alias.asname or alias.name: node.module for node in imports for alias in node.names}
    waiting = [name]
    while waiting:
        for base in bases.pop(waiting.pop(), []):
            module = modules.get(base) or ""
            if base in bases:
                waiting.append(base)
            elif module.startswith("recbole."):
                within = module.split(".")[1:]
                _sources_of_class(base, registry.recbole_folder().joinpath(*within).with_suffix(".py"), seen)
    return list(seen.values())
