"""The settings that a search tries: RecBole's format of them, from a file of ours or of the user's.

Two spellings are read, and nothing in them is evaluated. A YAML file holds kinds, keys and their values::

    choice: {hidden_size: [64, 128]}
    uniform: {hidden_dropout_prob: [0.1, 0.5]}      # lowest, highest
    quniform: {n_layers: [1, 4, 1]}                 # lowest, highest, step
    loguniform: {learning_rate: [-8, -5]}           # of e to the power of lowest to highest

Any other file is RecBole's ``hyper.test``: lines such as ``hidden_size choice [64,128]`` or ``learning_rate loguniform -8,-5``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from recbole_llm import registry
from recbole_llm.config.checks import fitted
from recbole_llm.config.schema import Key, load_yaml, parse_value
from recbole_llm.errors import UserError, printable

Space = dict[str, dict[str, list[Any]]]

_BOUNDS = {"uniform": 2, "quniform": 3, "loguniform": 2}


def built_in(model: str) -> Path | None:
    """The file of the ranges that are published for ``model``; None where there is none."""
    file = registry.properties_folder() / "tune" / f"{model}.yaml"
    return file if file.is_file() else None


def read_space(file: str | Path, keys: Mapping[str, Key]) -> Space:
    """Read a space.

    Args:
        file: see this module's docstring.
        keys: what the model knows, see ``schema.known_keys``.

    Returns:
        kind -> key -> values, as RecBole's ``HyperTuning`` takes it.

    Raises:
        UserError: the file cannot be read, or holds a kind, key or values that no search can have.
    """
    file = Path(file)
    given = load_yaml(file) if file.suffix in (".yaml", ".yml") else _read_lines(file)
    space: Space = {}
    for kind, ranges in given.items():
        if kind != "choice" and kind not in _BOUNDS:
            raise UserError(f"{file}: {printable(kind)!r} is no kind of range; write choice, {', '.join(_BOUNDS)}.")
        if not isinstance(ranges, Mapping):
            raise UserError(f"{file}: {kind} must hold keys and their values, such as {{hidden_size: [64, 128]}}.")
        for key, values in ranges.items():
            _check(file, kind, str(key), values, keys)
            space.setdefault(kind, {})[str(key)] = list(values)
    names = [key for ranges in space.values() for key in ranges]
    twice = [key for key in names if names.count(key) > 1]
    if twice or not names:
        raise UserError(f"{file}: {twice[0]} stands there twice." if twice else f"{file} holds no range to search.")
    return space


def _check(file: Path, kind: str, key: str, values: Any, keys: Mapping[str, Key]) -> None:
    if key not in keys:
        raise UserError(f"{file}: unknown key '{printable(key)}'; a space holds keys of the model.")
    if keys[key].mark in ("data", "text", "cost", "output"):
        raise UserError(f"{file}: {key} is no setting of the training, and trials that differ in it cannot be compared.")
    if not isinstance(values, list) or not values:
        raise UserError(f"{file}: {key} needs a list of values, such as [64, 128].")
    if kind == "choice":
        if any(values.count(value) > 1 for value in values):
            raise UserError(f"{file}: {key} has a value twice.")
        for value in values:
            fitted(keys[key], value, str(file))
        return
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    if len(values) != _BOUNDS[kind] or not numbers or values[0] >= values[1] or (kind == "quniform" and values[2] <= 0):
        step = ", step" if kind == "quniform" else ""
        raise UserError(f"{file}: {key} needs lowest, highest{step} for {kind}, as numbers.")


def _read_lines(file: Path) -> dict[str, dict[str, Any]]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"params_file: {file} cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'}).") from None
    found: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            key, kind, text = words[0], words[1], " ".join(words[2:])
            values = parse_value(text if text.startswith("[") else f"[{text}]")
        except (IndexError, yaml.YAMLError, ValueError):
            raise UserError(f"{file}:{number}: cannot read it; write: hidden_size choice [64,128].") from None
        if key in found.get(kind, {}):
            raise UserError(f"{file}: {printable(key)} stands there twice.")
        found.setdefault(kind, {})[key] = values
    return found
