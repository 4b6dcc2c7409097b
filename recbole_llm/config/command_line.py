"""Reading the command line: ``--key=value``."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import yaml

from recbole_llm.config.schema import (
    Key,
    Schema,
    parse_value,
    read_schema,
)
from recbole_llm.errors import UserError, closest

# Options that take text as it is written.
_TEXTS = frozenset(
    "model dataset config_files config_file_list checkpoint user against metric format output title over train params_file "
    "algo host hosts search".split()
)

# --- the command line -----------------------------------------------------------------------------------------------


SHORT = {"m": "--model", "d": "--dataset"}  # RecBole's short forms


def parse_command_line(argv: Sequence[str], flags: Collection[str] = ()) -> dict[str, Any]:
    """Read ``--key=value`` and ``--key value``.

    Values are YAML (``0.1``, ``true``, ``[10, 20]``, ``{mode: full}``, ``None``) and may contain ``=``; nothing is
    evaluated. A key that takes text keeps it as written, so ``--model``, ``--dataset`` and ``--results_file`` need no
    quotes. A bare ``--key`` sets a True/False key to True. ``--SASRec.epochs=5`` gives the key ``"SASRec.epochs"``, see
    :func:`settings_for`; ``--LLMSTAR:plain.beta=0`` gives ``"LLMSTAR:plain.beta"``. ``-m`` and ``-d`` are ``--model`` and
    ``--dataset``, as in RecBole. ``-h`` and ``--help`` give ``{"help": True}``.

    Args:
        argv: the words after the program's name.
        flags: further True/False keys, of a command of its own.

    Raises:
        UserError: a word that is no option, an option without value, a value that cannot be read, a key given twice.
    """
    schema = read_schema()
    settings: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            settings["help"] = True
            continue
        word = re.sub(r"^-([md])(?=$|=)", lambda short: SHORT[short[1]], word)
        match = re.match(r"--([A-Za-z_][\w.:-]*)(=|$)", word)
        if match is None:
            raise UserError(f"cannot read '{word}' on the command line; write --key=value.")
        name = match[1]
        kinds = {"bool"} if name in flags else _kinds(name.rpartition(".")[2], schema)
        if match[2]:
            text = word[match.end() :]
        elif words and not words[0].startswith("--"):
            text = words.pop(0)
        elif kinds == {"bool"}:
            text = "true"
        else:
            raise UserError(f"--{name} needs a value: write --{name}=value.")
        if name in settings:
            raise UserError(f"--{name} is given twice on the command line.")
        settings[name] = _command_line_value(name, text, kinds)
    return settings


def refuse_unknown(settings: Mapping[str, Any], known: set[str]) -> None:
    """Check that a sub-command knows the keys that it was given.

    Raises:
        UserError: one that is not among ``known``.
    """
    unknown = [name for name in settings if name not in known]
    if unknown:
        near = closest(unknown[0], known)
        raise UserError(f"unknown key --{unknown[0]}" + (f"; did you mean --{near}?" if near else f"; known: {sorted(known)}."))


def _kinds(name: str, schema: Schema) -> set[str]:
    """Return the types that the files give for a key."""
    if name in _TEXTS:
        return {"str"}
    ours = {kind for group, keys in schema.items() if group != "recbole" and name in keys for kind in keys[name].types}
    stock = schema["recbole"].get(name, Key(name)).types
    return ours or ({"str", "None"} if stock[:1] == ("str",) else set(stock))


def _command_line_value(name: str, text: str, kinds: set[str]) -> Any:
    if text == "None" or ("None" in kinds and text in ("~", "null", "")):
        return None
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if kinds and kinds <= {"str", "None"} and not quoted:
        return text
    try:
        return parse_value(text)
    except (yaml.YAMLError, ValueError):
        if "str" in kinds:
            return text
        raise UserError(f"--{name}: cannot read the value {text!r}; quote texts, and write lists as [a, b].") from None
