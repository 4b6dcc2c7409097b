"""Checkpoints: trained weights in safetensors and a JSON record beside them. Nothing is pickled or unpickled.

::

    saved/LLMSTAR-ml-100k-seed2020-1f3c.../
        recbole_llm.json       what it is: model, dataset, data fingerprint, backbone, settings, results
        model.safetensors      trained parameters only, float32
        adapter/               LoRA matrices once more, as PEFT writes them (only where the LLM was tuned by LoRA)
        merged/                the LLM with them merged, as a Hugging Face folder (only under merge_adapter)
        resume/                state of an unfinished training (removed when it ends)
            state.json         position and best score
            state.safetensors  weights and optimizer state
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from recbole_llm.errors import UserError, first_line
from recbole_llm.files import replace_file, replace_text

RECORD = "recbole_llm.json"
WEIGHTS = "model.safetensors"
MERGED = "merged"
FORMAT = 1


def exists(folder: str | Path) -> bool:
    """Whether ``folder`` holds a finished checkpoint."""
    return (Path(folder) / RECORD).is_file() and (Path(folder) / WEIGHTS).is_file()


def folder_of(path: str | Path) -> Path:
    """The checkpoint folder of ``path``, which is the folder itself or a file in it."""
    path = Path(path)
    return path.parent if path.is_file() else path


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a safetensors file in one step; ``metadata`` goes into its header."""
    ready: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        # A file holds no two tensors in one memory. What owns its memory is not copied: an item head may have gigabytes.
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        ready[name] = tensor
    replace_file(file, lambda temporary: save_file(ready, str(temporary), metadata=dict(metadata or {}) or None))


def as_json(value: Any) -> Any:
    """``value`` as it comes back from JSON (tuples become lists, paths text), for comparison with a record."""
    return json.loads(json.dumps(value, default=str))


def write_json(file: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON file in one step."""
    replace_text(file, json.dumps(record, indent=2, default=str, allow_nan=True) + "\n")


def write(folder: str | Path, record: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write a checkpoint. The record is written last: a folder with a record has its weights."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, weights)
    write_json(folder / RECORD, {"format": FORMAT, **record})


def write_adapter(folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write LoRA matrices as PEFT does: ``adapter/adapter_config.json`` and ``adapter/adapter_model.safetensors``."""
    folder = Path(folder) / "adapter"
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "adapter_model.safetensors", tensors)
    write_json(folder / "adapter_config.json", config)


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: the file is missing, truncated or no JSON object.
    """
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} does not exist: give the folder of a checkpoint that this library wrote.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is truncated or not a checkpoint of this library ({first_line(error)}).") from None
    if not isinstance(record, dict):
        raise UserError(f"{file} is not a checkpoint of this library.")
    return record


def read_record(folder: str | Path) -> dict[str, Any]:
    """Read the record of a checkpoint folder.

    Raises:
        UserError: no checkpoint, a foreign one, or one of a newer format.
    """
    folder = folder_of(folder)
    record = read_json(folder / RECORD)
    if not isinstance(record.get("format"), int) or not isinstance(record.get("model"), str):
        raise UserError(f"{folder / RECORD} is not a checkpoint of this library.")
    if record["format"] > FORMAT:
        raise UserError(f"{folder} was written by a newer version of recbole-llm: update the library to read it.")
    return record


def read_tensors(file: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        UserError: the file is missing, truncated or of another format.
    """
    try:
        return load_file(str(file), device=str(device))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is missing, truncated or no safetensors file ({first_line(error)}).") from None


def read_tensors_of(file: Path, identity: str) -> dict[str, Tensor] | None:
    """Read a safetensors file whose header has this ``identity``; None where it is of another one, or damaged."""
    try:
        with safe_open(str(file), framework="pt") as opened:
            if (opened.metadata() or {}).get("identity") != identity:
                return None
            return {name: opened.get_tensor(name) for name in opened.keys()}
    except (OSError, SafetensorError):
        return None


def read_weights(folder: str | Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read the weights of a checkpoint folder."""
    return read_tensors(folder_of(folder) / WEIGHTS, device)


def check(record: Mapping[str, Any], folder: str | Path, **expected: Any) -> None:
    """Refuse a checkpoint that is of another model, dataset, split or backbone.

    Raises:
        UserError: naming the first difference.
    """
    for key, value in expected.items():
        if record.get(key) == value:
            continue
        if key == "fingerprint":
            raise UserError(
                f"The checkpoint {folder} was trained on other data (dataset {record.get('dataset')}, or another split or "
                f"filter of it): train it again on this one, or give the dataset and split that it belongs to."
            )
        raise UserError(f"The checkpoint {folder} has {key} {record.get(key)!r}, not {value!r}.")


def has_resume_state(folder: str | Path) -> bool:
    """Whether ``folder`` holds the state of an unfinished training, or a part of one."""
    return any((Path(folder) / "resume").glob("state*"))


def remove_resume_state(folder: str | Path) -> None:
    """Delete the state of an unfinished training."""
    shutil.rmtree(Path(folder) / "resume", ignore_errors=True)
