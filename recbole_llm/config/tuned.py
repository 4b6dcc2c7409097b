"""Settings that were tuned for a dataset: ``properties/tuned/<dataset>/<Model>.yaml``, as ``recbole-llm tune`` wrote them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recbole_llm import registry
from recbole_llm.config.schema import is_file_name
from recbole_llm.config.settings import model_of
from recbole_llm.errors import UserError

TEACHER = "SASRec"


def files_for(models: Sequence[str], dataset: str) -> list[str]:
    """The files of tuned settings for ``models`` on ``dataset``; of the usual teacher as well where one is an LLM recommender.

    Raises:
        UserError: there is none for any of them.
    """
    root = registry.properties_folder() / "tuned"
    names = [model_of(part) for label in models for part in label.split("+")]
    wanted = dict.fromkeys([*names, *([TEACHER] if any(map(registry.is_ours, names)) else [])])
    files = [root / dataset / f"{name}.yaml" for name in wanted if is_file_name(dataset) and is_file_name(name)]
    found = [str(file) for file in files if file.is_file()]
    if not found:
        known = ", ".join(f"{file.stem} on {file.parent.name}" for file in _all(root)) or "none"
        raise UserError(f"tuned: there are no tuned settings of {', '.join(names)} on {dataset}; there are: {known}.")
    return found


def _all(root: Path) -> list[Path]:
    return sorted(root.glob("*/*.yaml"))
