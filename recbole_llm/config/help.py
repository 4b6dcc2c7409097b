"""What ``--help`` prints."""

from __future__ import annotations

import os
import textwrap

from recbole_llm import registry
from recbole_llm.config.schema import (
    Key,
    read_schema,
)
from recbole_llm.config.settings import datasets_in

# --- help -----------------------------------------------------------------------------------------------------------


def help_text(data_path: str | os.PathLike = "dataset/") -> str:
    """Return what ``--help`` prints: models, datasets, backbones, and every key with type, default and meaning.

    Args:
        data_path: the folder of the user's datasets.
    """
    schema = read_schema()

    def names(kind: str) -> list[str]:
        return [group.partition("/")[2] for group in schema if group.startswith(kind + "/")]

    hanging = {"subsequent_indent": "  "}
    indent = {"initial_indent": "  ", "subsequent_indent": "  "}
    lines = [
        "python run_recbole_llm.py --model=SASRec,LLMSRec,LLMSTAR --dataset=ml-100k [--key=value ...]",
        "",
        "Models:",
        *(f"  {name:<12} {entry.paper}" for name, entry in registry.models().items()),
        *textwrap.wrap("and every model of RecBole: " + ", ".join(registry.stock_models()), 118, **indent),
        "",
        *textwrap.wrap("Datasets with settings of their own: " + ", ".join(names("dataset")), 118, **hanging),
        *textwrap.wrap(f"Datasets under {data_path}: " + (", ".join(datasets_in(data_path)) or "none"), 118, **hanging),
        "Backbones with settings of their own: " + (", ".join(names("backbone")) or "none"),
        "  and any Hugging Face id, local folder or GGUF file of a causal language model.",
        "",
        "Keys, as --key=value (for one of several models: --SASRec.key=value) or in a file, --config_files=my.yaml:",
    ]
    first_seen: set[str] = set()
    for group, keys in schema.items():
        kind, _, name = group.partition("/")
        if group == "recbole":
            continue
        title = {"overall": "Every run", "protocol": f"protocol: {name}", "model": name}.get(kind, f"{kind} {name}")
        lines += ["", f"{title} (properties/{group}.yaml)"]
        for key in keys.values():
            # Datasets, protocols and backbones repeat keys: their meaning is told once, their values each time.
            told = kind != "model" and key.name in first_seen
            lines += [_key_line(key, brief=told)]
            first_seen.add(key.name)
    lines += ["", "RecBole's own keys"]
    lines += [_key_line(key) for key in schema["recbole"].values() if key.meaning and key.name not in first_seen]
    return "\n".join(lines) + "\n"


def _key_line(key: Key, brief: bool = False) -> str:
    default = repr(key.default) if isinstance(key.default, str) and key.default.strip() != key.default else key.default
    if brief:
        return f"  {key.name} = {default}"
    kind = ", ".join(part for part in (key.type, key.constraint) if part)
    if key.where.startswith("recbole"):
        kind = kind.replace("str or int or float", "str")
    return f"  {key.name} = {default}  ({kind})\n      {key.meaning}"
