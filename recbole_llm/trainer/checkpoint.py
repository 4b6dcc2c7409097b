"""Checkpoints of a model: its trained weights, and the state of a training that is not finished."""

from __future__ import annotations

from collections.abc import Mapping
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recbole_llm import checkpoint
from recbole_llm.backbone.lora import adapter_config, adapter_tensors, save_merged
from recbole_llm.backbone.model_card import model_card
from recbole_llm.errors import UserError
from recbole_llm.files import replace_text
from recbole_llm.recommender.base import Recommender

CARD = "README.md"  # where the Hugging Face hub looks for a model card


def backbone_identities(model: Recommender) -> dict[str, Any]:
    """What a checkpoint says of the model's LLMs: the identity of each, ready for JSON, by its name."""
    return {name: checkpoint.as_json(backbone.identity) for name, backbone in model.backbones.items()}


# Trained weights


def save_weights(folder: Path, record: Mapping[str, Any], model: Recommender) -> None:
    """Write the trained weights and the record; LoRA matrices also in PEFT's own format, for use without this library."""
    for name, backbone in model.backbones.items():
        tensors = adapter_tensors(backbone)
        if tensors:
            place = _folder_of_backbone(folder, name)
            checkpoint.write_adapter(place, adapter_config(backbone), tensors)
            replace_text(place / "adapter" / CARD, model_card(backbone, "adapter", record))
    checkpoint.write(folder, record, model.trained_parameters())


def save_merged_backbones(folder: Path, record: Mapping[str, Any], model: Recommender) -> None:
    """Write each LLM with its LoRA matrices merged, as a Hugging Face folder."""
    for name, backbone in model.backbones.items():
        place = _folder_of_backbone(folder, name) / checkpoint.MERGED
        save_merged(backbone, place)
        replace_text(place / CARD, model_card(backbone, "merged", record))


def _folder_of_backbone(folder: Path, name: str) -> Path:
    """Where the files of one LLM lie: those of the usual one in the checkpoint's own folder."""
    return folder if name == "backbone" else folder / name


def load_trained_weights(model: Recommender, folder: str | Path, name: str) -> dict[str, Any]:
    """Load the trained weights in ``folder`` into ``model`` and return the checkpoint's record.

    Raises:
        UserError: the checkpoint is foreign, truncated, or of another model, dataset, backbone or teacher.
    """
    folder = checkpoint.folder_of(folder)
    record = checkpoint.read_record(folder)
    checkpoint.check(record, folder, model=name, fingerprint=model.fingerprint, **backbone_identities(model))
    if model.teacher is not None and (record["teacher"] or {}).get("vectors") != model.teacher.identity:
        raise UserError(
            f"The checkpoint {folder} was trained with another teacher than {model.teacher_run.folder}: give the folder of "
            f"its own teacher ({(record['teacher'] or {}).get('folder')}) as teacher_checkpoint."
        )
    weights = checkpoint.read_weights(folder)
    parameters = model.trained_parameters()
    if set(weights) != set(parameters):
        different = sorted(set(weights) ^ set(parameters))
        raise UserError(f"The checkpoint {folder} does not fit this configuration of {name}: it differs in {different[0]}.")
    with torch.no_grad():
        for key, parameter in parameters.items():
            if weights[key].shape != parameter.shape:
                raise UserError(
                    f"The checkpoint {folder} does not fit this configuration of {name}: {key} is "
                    f"{tuple(weights[key].shape)} there and {tuple(parameter.shape)} here."
                )
            parameter.copy_(weights[key])
    getLogger().info(f"Loading trained weights from {folder}")
    return record


# An unfinished training: two files that belong together by their step


def has_training_state(folder: str | Path) -> bool:
    """Whether ``folder`` holds the state of an unfinished training."""
    return (Path(folder) / "resume" / "state.json").is_file()


def save_training_state(
    folder: Path, model: Recommender, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> None:
    """Write all that the rest of a training depends on: ``state``, JSON-ready with its ``step``, weights and optimizer."""
    parameters = model.trained_parameters()
    names = list(parameters)
    tensors = {f"weight/{name}": value for name, value in parameters.items()}
    scalars: dict[str, dict[str, float]] = {}
    for index, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{names[index]}/{key}"] = value
            else:
                scalars.setdefault(names[index], {})[key] = value
    # A batch whose gradients wait for the optimizer's step is part of the state as well.
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            tensors[f"gradient/{name}"] = parameter.grad
    resume = folder / "resume"
    resume.mkdir(parents=True, exist_ok=True)
    file = resume / f"state-{state['step']}.safetensors"
    checkpoint.write_tensors(file, tensors)
    checkpoint.write_json(resume / "state.json", {"format": checkpoint.FORMAT, **state, "optimizer_scalars": scalars})
    for old in resume.glob("state-*.safetensors"):
        if old.name != file.name:
            old.unlink(missing_ok=True)


def load_training_state(
    folder: Path,
    model: Recommender,
    optimizer: torch.optim.Optimizer,
    device: torch.device | str,
    expected: Mapping[str, Any],
) -> dict[str, Any]:
    """Put the state in ``folder`` into model and optimizer, and return what else was saved.

    Args:
        expected: entries of the state that must be these, JSON-ready.

    Raises:
        UserError: no such state, or one of another run.
    """
    state = checkpoint.read_json(folder / "resume" / "state.json")
    checkpoint.check(state, folder, **expected)
    tensors = checkpoint.read_tensors(folder / "resume" / f"state-{state['step']}.safetensors", device)
    parameters = model.trained_parameters()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"weight/{name}"])
            if f"gradient/{name}" in tensors:
                parameter.grad = tensors[f"gradient/{name}"].clone()
    states = optimizer.state_dict()
    states["state"] = {}
    for index, name in enumerate(parameters):
        entries: dict[str, Any] = dict(state["optimizer_scalars"].get(name, {}))
        prefix = f"optimizer/{name}/"
        entries |= {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
        if entries:
            states["state"][index] = entries
    optimizer.load_state_dict(states)
    return state
