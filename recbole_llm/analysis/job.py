"""What an analysis is asked for, and where its results are kept."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from recbole.config import Config

from recbole_llm._version import __version__
from recbole_llm.analysis.tables import plain
from recbole_llm.configure import configure
from recbole_llm.errors import UserError
from recbole_llm.files import replace_text

RESULT = "result.json"
PER_USER = "per_user.tsv"


@dataclass(frozen=True)
class Job:
    """A request for an analysis.

    Attributes:
        dataset: a dataset's name.
        models: names as ``recbole-llm run`` takes them; the first is reported first.
        seeds: each model is analyzed once per seed; empty: the configured one.
        files: YAML files with settings.
        settings: settings of the models and the data, as :func:`recbole_llm.quick_start.compare` takes them.
        output: folder of the results.
    """

    dataset: str
    models: Sequence[str] = ()
    seeds: Sequence[int] = ()
    files: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    output: str = "analyses"

    def configs(self, **changes: Any) -> list[tuple[str, Config]]:
        """Each model's name and configuration, seed by seed.

        Args:
            changes: settings that replace those of the job.

        Raises:
            UserError: no model, or a mistake in the settings.
        """
        if not self.models:
            raise UserError("name the models to analyze: --model=SASRec,LLMSRec.")
        return [
            (name, configure(name, self.dataset, self.models, seed, self.files, {**self.settings, **changes}))
            for seed in (list(self.seeds) or [None])
            for name in self.models
        ]

    def folder(self, analysis: str, name: str, config: Config, identity: Any, *more: str) -> Path:
        """Where the result of an analysis of one model is kept.

        Args:
            analysis: its name.
            name: of the model.
            config: of the model.
            identity: all that the result depends on, for JSON.
            more: further words of the folder's name.
        """
        words = [analysis, name.replace(":", "-"), *more, config["dataset"], f"seed{config['seed']}", digest(identity)]
        return Path(self.output) / "-".join(words)

    def data_config(self) -> Config:
        """A configuration for analyses of the data alone."""
        models = list(self.models) or ["SASRec"]  # any model: the data is the same for all
        return configure(models[0], self.dataset, models, None, self.files, self.settings)


def digest(*parts: Any) -> str:
    """Ten letters that stand for values: equal values, equal letters."""
    text = json.dumps(parts, default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def stored(folder: Path, identity: Any, compute: Callable[[], tuple[dict[str, Any], dict[str, Sequence] | None]]) -> dict:
    """Read a result that was computed before for the same identity, or compute and keep it.

    Args:
        folder: where the result is kept: ``result.json`` and, where there are results by user, ``per_user.tsv``.
        identity: all that the result depends on, for JSON.
        compute: returns the result and the columns of the results by user (None: there are none).

    Returns:
        the result; ``read`` in it says whether it was read, ``folder`` where it is kept.
    """
    identity = json.loads(json.dumps(plain(identity), default=str, sort_keys=True))
    file = folder / RESULT
    if file.is_file():
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            known = None
        if isinstance(known, dict) and known.get("identity") == identity:
            return {**known, "read": True, "folder": str(folder)}
    result, columns = compute()
    folder.mkdir(parents=True, exist_ok=True)
    if columns is not None:
        write_columns(folder / PER_USER, columns)
    kept = plain({"identity": identity, "version": __version__, **result})
    replace_text(file, json.dumps(kept, indent=2, allow_nan=False, ensure_ascii=False) + "\n")  # last: a result has its columns
    return {**kept, "read": False, "folder": str(folder)}


def write_columns(file: Path, columns: Mapping[str, Sequence]) -> None:
    """Write columns of one length as text, separated by tabs; numbers with nine digits."""
    cells = [
        [f"{value:.9g}" for value in column] if np.asarray(column).dtype.kind == "f" else [str(value) for value in column]
        for column in columns.values()
    ]
    text = io.StringIO()
    table = csv.writer(text, delimiter="\t", lineterminator="\n")
    table.writerow(columns)
    table.writerows(zip(*cells, strict=True))
    replace_text(file, text.getvalue())


def read_columns(file: str | Path) -> dict[str, np.ndarray]:
    """Read the columns of a tab-separated file; metrics (names with ``@``) as float64, the others as text.

    Raises:
        UserError: no such file, or no table.
    """
    try:
        lines = list(csv.reader(io.StringIO(Path(file).read_text(encoding="utf-8")), delimiter="\t"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} cannot be read ({getattr(error, 'strerror', None) or error}).") from None
    header, rows = lines[0] if lines else [], lines[1:]
    if not {"model", "seed", "user"} <= set(header) or any(len(row) != len(header) for row in rows):
        raise UserError(f"{file} holds no results by user: give a per_user_file of a run, or a {PER_USER} of analyze order.")
    columns = dict(zip(header, map(list, zip(*rows, strict=True)), strict=True)) if rows else {name: [] for name in header}
    try:
        return {
            name: np.array([value or "nan" for value in values], dtype=np.float64) if "@" in name else np.array(values, str)
            for name, values in columns.items()
        }
    except ValueError as error:
        raise UserError(f"{file} holds a value that is no number ({error}): write the file again.") from None
