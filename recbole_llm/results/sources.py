"""What a tested run was made from, in its folder: by this it is found again without loading its LLM.

The name of a run's folder tells the same, but some of what it is made from is known from the loaded LLM alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recbole_llm import checkpoint
from recbole_llm.errors import UserError

FILE = "sources.json"


@dataclass(frozen=True)
class Sources:
    """What is known of a run before its LLM is loaded.

    Attributes:
        digest: of the settings as they were given, the data, and the bytes of the LLM's files.
        teacher: the teacher's identity; None without one.
    """

    digest: str
    teacher: str | None


def digest_of(settings: Mapping[str, Any], data: str, llm: Mapping[str, Any], device: str) -> str:
    """The digest of :class:`Sources`; ``device`` decides the type of the LLM's weights where no setting does."""
    text = json.dumps([dict(settings), data, dict(llm), device], default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_sources(folder: Path, sources: Sources) -> None:
    """Write the sources of a run that was tested."""
    checkpoint.write_json(folder / FILE, {"digest": sources.digest, "teacher": sources.teacher})


def folders_of(checkpoint_dir: Path, model: str, dataset: str) -> Iterator[tuple[Path, Sources]]:
    """The runs of a model and data set that say what they were made from, with it."""
    for file in sorted(checkpoint_dir.glob(f"{model}-*/{FILE}")):
        if not file.parent.name.startswith(f"{model}-{dataset}-"):
            continue
        try:
            read = checkpoint.read_json(file)
        except UserError:
            continue
        if isinstance(read.get("digest"), str) and isinstance(read.get("teacher"), (str, type(None))):
            yield file.parent, Sources(read["digest"], read["teacher"])
