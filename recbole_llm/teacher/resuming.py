"""The training of a stock model goes on where it was stopped, and ends with the numbers of one that was not.

At the beginning of an epoch all that the rest depends on is written beside the model's folder-to-be: weights, the best ones
so far, the optimizer's state, and the states of all random numbers (safetensors and JSON, as for LLM recommenders).
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.trainer import PretrainTrainer, S3RecTrainer, Trainer
from torch import Tensor

from recbole_llm import checkpoint
from recbole_llm.errors import UserError

MOST_TIME = 0.05  # share of the time that may go into writing states: very short epochs have none of their own
_GOES_ON = (Trainer, PretrainTrainer, S3RecTrainer)  # RecBole's others keep more between epochs than is written here


class ResumedTraining:
    """Trainer mix-in, in front of the others: keeps the best weights in memory, and states from which it goes on.

    Attributes:
        best_weights: the model's ``state_dict`` at the best validation, on CPU; None before the first.
        earlier_seconds: what the training took before it was stopped.
    """

    # RecBole's Trainer, and RecordedTraining, have these.
    config: Any
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    phase: str | None
    curve: list[dict[str, Any]]

    def __init__(self, config, model):
        super().__init__(config, model)
        self.best_weights: dict[str, Tensor] | None = None
        self.earlier_seconds = 0.0
        self._folder: Path | None = None
        self._identity: dict[str, Any] = {}
        self._of_run: dict[str, Any] = {}
        self._read: dict[str, Any] | None = None
        self._began, self._written, self._took = time.perf_counter(), 0.0, 0.0

    def keep_states(self, folder: Path, identity: Mapping[str, Any], of_run: Mapping[str, Any]) -> None:
        """Write states to ``folder`` from now on.

        Args:
            folder: of the run, held by this process.
            identity: what another training must have in common to go on from them, JSON-ready.
            of_run: what else the next process wants to know, JSON-ready.
        """
        of_recbole = next(kind for kind in type(self).__mro__ if kind.__module__.startswith("recbole.trainer"))
        if of_recbole in _GOES_ON:
            self._folder, self._identity, self._of_run = folder, dict(identity), dict(of_run)

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Take over a state of :func:`read_state`."""
        tensors = state["tensors"]
        self.model.load_state_dict({name: tensors[f"weight/{name}"] for name in self.model.state_dict()})
        best = {name: tensors[f"best/{name}"] for name in self.model.state_dict() if f"best/{name}" in tensors}
        self.best_weights = best or None
        entries: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in state["optimizer"].items()}
        for name, value in tensors.items():
            if name.startswith("optimizer/"):
                _, index, key = name.split("/", 2)
                entries.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": entries})
        self.start_epoch, self.cur_step = state["epoch"], state["cur_step"]
        self.best_valid_score, self.best_valid_result = state["best_valid_score"], state["best_valid_result"]
        self.curve, self._steps, self._seconds = list(state["curve"]), state["steps"], state["seconds"]
        self.earlier_seconds = state["train_seconds"]
        self._read = dict(state)

    def _save_checkpoint(self, epoch, verbose=True, **kwargs):
        self.best_weights = {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}

    def _train_epoch(self, train_data, epoch_idx, loss_func=None, show_progress=False):
        if self._read is not None:  # what has drawn numbers since this process began is as if it had not
            _set_random_states(self._read, train_data)
            self._read = None
        elif self._folder is not None and epoch_idx > self.start_epoch:
            now = time.perf_counter()
            if self._took <= MOST_TIME * (now - self._written):
                self._write_state(train_data, epoch_idx)
                self._written = time.perf_counter()
                self._took = self._written - now
        return super()._train_epoch(train_data, epoch_idx, loss_func=loss_func, show_progress=show_progress)

    def _write_state(self, train_data: Any, epoch: int) -> None:
        tensors = {f"weight/{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"best/{name}": value for name, value in (self.best_weights or {}).items()}
        numbers: dict[str, dict[str, Any]] = {}
        for index, entries in self.optimizer.state_dict()["state"].items():
            for key, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{index}/{key}"] = value
                else:
                    numbers.setdefault(str(index), {})[key] = value
        random_tensors, random_numbers = _random_states(train_data)
        resume = self._folder / "resume"
        resume.mkdir(parents=True, exist_ok=True)
        file = resume / f"state-{epoch}{'' if self.phase is None else f'-{self.phase}'}.safetensors"
        checkpoint.write_tensors(file, {**tensors, **random_tensors})
        state = {
            "format": checkpoint.FORMAT,
            "kind": "stock",
            "identity": self._identity,
            "of_run": self._of_run,
            "file": file.name,
            "phase": self.phase,
            "epoch": epoch,
            "cur_step": self.cur_step,
            "best_valid_score": float(self.best_valid_score),
            "best_valid_result": self.best_valid_result,
            "curve": self.curve,
            "steps": self._steps,
            "seconds": self._seconds,
            "train_seconds": self.earlier_seconds + time.perf_counter() - self._began,
            "optimizer": numbers,
            "random": random_numbers,
        }
        checkpoint.write_json(resume / "state.json", state)
        for old in resume.glob("state-*.safetensors"):
            if old.name != file.name:
                old.unlink(missing_ok=True)


def read_state(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state in a run's folder from which a training goes on; None where there is none, or one that cannot be used."""
    if not checkpoint.has_resume_state(folder):
        return None
    try:
        state = checkpoint.read_json(folder / "resume" / "state.json")
        if state.get("kind") != "stock" or state.get("identity") != dict(identity):
            raise UserError(f"{folder / 'resume'} is the state of another training.")
        state["tensors"] = checkpoint.read_tensors(folder / "resume" / Path(str(state["file"])).name)
    except UserError as error:
        getLogger().warning(f"{error} The training starts again.")
        return None
    return state


def _random_states(train_data: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The states of Python's, NumPy's and PyTorch's random numbers, and of the order of batches."""
    tensors = {"random/torch": torch.get_rng_state(), "random/loader": train_data.generator.get_state()}
    if torch.cuda.is_available():
        tensors |= {f"random/cuda{place}": state for place, state in enumerate(torch.cuda.get_rng_state_all())}
    name, keys, place, has_gauss, gauss = np.random.get_state()
    tensors["random/numpy"] = torch.from_numpy(keys.astype(np.int64))
    return tensors, {"python": random.getstate(), "numpy": [name, place, has_gauss, gauss]}


def _set_random_states(state: Mapping[str, Any], train_data: Any) -> None:
    tensors = state["tensors"]
    torch.set_rng_state(tensors["random/torch"])
    train_data.generator.set_state(tensors["random/loader"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all([tensors[f"random/cuda{place}"] for place in range(torch.cuda.device_count())])
    name, place, has_gauss, gauss = state["random"]["numpy"]
    np.random.set_state((name, tensors["random/numpy"].numpy().astype(np.uint32), place, has_gauss, gauss))
    version, internal, following = state["random"]["python"]
    random.setstate((version, tuple(internal), following))
