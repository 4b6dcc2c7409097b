"""Stock RecBole models as baselines and teachers: RecBole's own model, trainer and settings, our protocol.

What differs from ``recbole.quick_start.run_recbole``: evaluation uses the candidate sets that every model of a run
shares, weights are kept as safetensors with a JSON beside them, and sequential models whose layers are causal can be
trained on all positions of a sequence at once (``teacher_training: causal``).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from recbole.data.utils import create_samplers, get_dataloader
from recbole.model.loss import BPRLoss
from recbole.utils import ModelType, get_model, get_trainer, init_seed
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from recbole_llm import checkpoint
from recbole_llm.config.identity import deciding_settings
from recbole_llm.data.item_catalog import ItemCatalog
from recbole_llm.data.padding import can_trim, groups_by_length, loss_without_padding
from recbole_llm.data.sequences import cut_windows, single_interactions, user_sequences
from recbole_llm.errors import UserError
from recbole_llm.evaluation.candidate_evaluation import CandidateEvaluation
from recbole_llm.files import reporting_full_disk
from recbole_llm.lock import held
from recbole_llm.loss.binary import binary_loss
from recbole_llm.results.describe import now, settings_of
from recbole_llm.results.log import note_settings, run_log, tracked
from recbole_llm.results.mlflow_tracker import Trackers
from recbole_llm.results.run import forget, read_curve, write_curve
from recbole_llm.teacher.item_embedding import CatalogueVectors, catalogue_vectors, identity_of, make_room, use_item_vectors
from recbole_llm.teacher.resuming import ResumedTraining, read_state

# Models whose state at position n sees items 1..n only, with one `gather_indexes` at the end of `forward`.
CAUSAL_MODELS = ("SASRec", "GRU4Rec", "eSASRec", "ZESRec", "CTRL", "UniSRec")


@contextmanager
def all_positions(model: nn.Module) -> Iterator[None]:
    """Within the context, ``model.forward`` returns the state at every position ``[B, L, d]``, not at the last alone."""
    model.gather_indexes = lambda output, index: output
    try:
        yield
    finally:
        del model.gather_indexes


def states_at_targets(model: nn.Module, windows: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """States of ``windows`` int64 ``[W, L + 1]`` at the positions that have a next item.

    Windows of about one length are computed together, without the padding of the longest.

    Returns:
        states ``[N, d]``, and the places of the next items in ``windows[:, 1:]``: rows and columns, int64 ``[N]`` each.
    """
    states, rows, columns = [], [], []
    lengths = (windows[:, 1:] > 0).sum(dim=1)
    whole = [(torch.arange(len(windows), device=windows.device), windows.shape[1] - 1)]
    with all_positions(model):
        for places, longest in groups_by_length(lengths) if can_trim(type(model)) else whole:
            inputs, real = windows[places, :longest], windows[places, 1 : longest + 1] > 0
            states.append(model.forward(inputs, (inputs > 0).sum(dim=1))[real])
            row, column = real.nonzero(as_tuple=True)
            rows.append(places[row])
            columns.append(column)
    return torch.cat(states), (torch.cat(rows), torch.cat(columns))


def all_positions_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """The mean loss of the next item at every position of ``windows`` int64 ``[W, L + 1]``.

    It is the model's own ``next_item_loss`` where it has one, else the cross-entropy over the catalogue.
    """
    states, places = states_at_targets(model, windows)
    targets = windows[:, 1:][places]
    if hasattr(model, "next_item_loss"):
        return model.next_item_loss(states, targets)
    return functional.cross_entropy(states @ model.item_embedding.weight.T, targets)


def is_pretraining(model: nn.Module) -> bool:
    """Whether ``model`` is one of two stages, in its first."""
    return getattr(model, "train_stage", None) == "pretrain"


def begin_finetuning(model: nn.Module) -> None:
    """Put ``model`` into its second stage."""
    if hasattr(model, "begin_finetuning"):
        model.begin_finetuning()
        return
    model.train_stage = "finetune"  # S3Rec
    model.loss_fct = BPRLoss() if model.loss_type == "BPR" else nn.CrossEntropyLoss()


class CausalTraining:
    """Trainer mix-in: one pass over a sequence trains all its positions.

    RecBole trains one row per prefix, that is L forward passes of length L for a sequence of L items; a causal model
    computes the same states in one pass. Batches hold as many targets as ``train_batch_size`` says, and an epoch meets
    every target once, as in RecBole.
    """

    def _train_epoch(self, train_data, epoch_idx, loss_func=None, show_progress=False):
        if is_pretraining(self.model):
            return super()._train_epoch(train_data, epoch_idx, loss_func, show_progress)
        self.model.train()
        if not hasattr(self, "_sequences"):
            self._sequences = user_sequences(train_data._dataset)
        rng = np.random.default_rng([self.config["seed"], epoch_idx])
        length = self.config["MAX_ITEM_LIST_LENGTH"]
        windows = cut_windows(self._sequences, length, rng)
        windows = torch.from_numpy(windows[rng.permutation(len(windows))])
        batches = self.batches(windows, rng)
        loss_func = loss_func or self.batch_loss
        total = 0.0
        for batch in batches:
            self.optimizer.zero_grad()
            loss = loss_func(batch.to(self.device))
            self._check_nan(loss)
            loss.backward()
            if self.clip_grad_norm:
                nn.utils.clip_grad_norm_(self.model.parameters(), **self.clip_grad_norm)
            self.optimizer.step()
            total += loss.item()
        return total

    def batches(self, windows: Tensor, rng: np.random.Generator) -> Sequence[Tensor]:
        """The windows of an epoch, int64 ``[W, L + 1]``, by steps."""
        targets = int((windows[:, 1:] > 0).sum())
        return windows.tensor_split(max(1, round(targets / self.config["train_batch_size"])))

    def batch_loss(self, windows: Tensor | Interaction) -> Tensor:
        """The loss of a batch of windows; of rows, one for each prefix, where the model is pre-trained."""
        return self.model.calculate_loss(windows) if is_pretraining(self.model) else all_positions_loss(self.model, windows)


class BinaryTraining(CausalTraining):
    """Trainer mix-in: as :class:`CausalTraining`, by binary cross-entropy with a negative at each position.

    A step takes ``train_batch_size`` windows, each with a column more: how its negatives are drawn.
    """

    def _build_optimizer(self, **kwargs):
        optimizer = super()._build_optimizer(**kwargs)
        for group in optimizer.param_groups:
            if "betas" in group:
                group["betas"] = (0.9, 0.98)  # SASRec's own
        return optimizer

    def batches(self, windows: Tensor, rng: np.random.Generator) -> Sequence[Tensor]:
        seeds = torch.from_numpy(rng.integers(2**62, size=(len(windows), 1)))
        return torch.cat([windows, seeds], dim=1).split(self.config["train_batch_size"])

    def batch_loss(self, windows: Tensor) -> Tensor:
        windows, seed = windows[:, :-1], int(windows[0, -1])
        states, places = states_at_targets(self.model, windows)
        drawn = negatives_of(windows, self.model.item_embedding.num_embeddings, np.random.default_rng(seed)).to(windows.device)
        positive, negative = (
            (states * self.model.item_embedding(items[places])).sum(dim=-1) for items in (windows[:, 1:], drawn)
        )
        return binary_loss(positive, negative)


def negatives_of(windows: Tensor, items: int, rng: np.random.Generator) -> Tensor:
    """A random item that is not in the window for each target of ``windows`` int64 ``[W, L + 1]``: int64 ``[W, L]``.

    A window of nearly the whole catalogue may keep an item of its own after some tries.
    """
    known = windows.cpu().numpy()
    drawn = rng.integers(1, items, (len(known), known.shape[1] - 1))
    offsets = items * np.arange(len(known))[:, None]
    ordered = np.sort(known + offsets, axis=1).ravel()  # one list, each row in a range of its own
    for _ in range(20):
        wanted = drawn + offsets
        place = np.searchsorted(ordered, wanted).clip(max=len(ordered) - 1)
        again = ordered[place] == wanted
        if not again.any():
            break
        drawn[again] = rng.integers(1, items, int(again.sum()))
    return torch.from_numpy(drawn)


class RecordedTraining:
    """Trainer mix-in: keeps the training's curve, and shows one bar for all epochs with the time that is left.

    Attributes:
        curve: losses and validations, see ``docs/runs.md``.
        phase: what the points of the curve say as their stage; None for a model that is trained in one.
    """

    def __init__(self, config, model):
        super().__init__(config, model)
        self.wandblogger = Trackers(self.wandblogger, config["log_mlflow"])
        self.curve: list[dict[str, Any]] = []
        self.phase: str | None = None
        self._bar: tqdm | None = None
        self._steps, self._seconds = 0, 0.0

    def _train_epoch(self, train_data, epoch_idx, loss_func=None, show_progress=False):
        started, before = time.perf_counter(), self._steps
        loss_func = loss_func or getattr(self, "batch_loss", self._loss)
        epochs = self.epochs if self.phase is None else self.pretrain_epochs
        if self._bar is None:
            name = self.config["model"] if self.phase is None else f"{self.config['model']}, {self.phase}"
            self._bar = tqdm(total=epochs, desc=f"Train {name}", unit="epoch", ncols=100, disable=not show_progress)
        share = 1 / max(1, len(train_data))

        def counted(batch):
            self._steps += 1
            self._bar.n = round(min(epoch_idx + 1, epoch_idx + (self._steps - before) * share), 1)
            self._bar.update(0)
            return loss_func(batch)

        total = super()._train_epoch(train_data, epoch_idx, loss_func=counted, show_progress=False)
        self._bar.n = epoch_idx + 1
        self._bar.refresh()
        self._seconds += time.perf_counter() - started
        sums = total if isinstance(total, tuple) else (total,)
        names = ["loss"] if len(sums) == 1 else [f"loss{place}" for place in range(1, len(sums) + 1)]
        batches = max(1, self._steps - before)
        point = {
            "step": self._steps,
            "epoch": epoch_idx + 1,
            "seconds": self._seconds,
            "losses": {name: float(part) / batches for name, part in zip(names, sums, strict=True)},
            "valid": None,
        }
        self.curve.append(point if self.phase is None else {**point, "stage": self.phase})
        return total

    def _loss(self, batch):
        if self.phase is None and can_trim(type(self.model)):  # a pre-training has losses of its own
            return loss_without_padding(self.model, batch)
        return self.model.calculate_loss(batch)

    def _valid_epoch(self, valid_data, show_progress=False):
        score, result = super()._valid_epoch(valid_data, show_progress=False)
        epoch = self.curve[-1]["epoch"]
        self.curve[-1]["valid"] = {name: float(value) for name, value in result.items()}
        for name, value in result.items():
            self.tensorboard.add_scalar(f"Valid/{name}", value, epoch)
        if self._bar is not None:
            best = max(score, self.best_valid_score) if self.valid_metric_bigger else min(score, self.best_valid_score)
            self._bar.set_postfix_str(f"best {self.valid_metric}: {best:.4f}", refresh=False)
        return score, result

    def close(self):
        """End the bar and the TensorBoard file."""
        if self._bar is not None:
            self._bar.close()
        self.tensorboard.close()


@dataclass
class StockRun:
    """A trained stock model.

    Attributes:
        model: in evaluation mode, on its device.
        config: its RecBole configuration.
        splits: what it was trained on and is to be tested on.
        folder: where its weights lie.
        train_seconds: what its training took (as recorded, where it was loaded).
        valid_result: metrics on the validation split at the chosen epoch.
        loaded: whether it came from the folder instead of being trained now.
        curve: losses and validations of its training.
        started: when its training began; None where that is not known.
    """

    model: nn.Module
    config: Config
    splits: dict[str, Any]
    folder: Path
    train_seconds: float
    valid_result: dict[str, float] = field(default_factory=dict)
    loaded: bool = False
    curve: list[dict[str, Any]] = field(default_factory=list)
    started: str | None = None


_MAY_TRAIN: ContextVar[bool] = ContextVar("may_train", default=True)


@contextmanager
def without_training() -> Iterator[None]:
    """Within the context, :func:`train_or_load` raises ``UserError`` where it would train."""
    token = _MAY_TRAIN.set(False)
    try:
        yield
    finally:
        _MAY_TRAIN.reset(token)


def may_train() -> bool:
    """Whether :func:`train_or_load` would train here what is not there."""
    return _MAY_TRAIN.get()


def train_or_load(config: Config, splits: dict[str, Any], training: str = "prefix") -> StockRun:
    """Return the stock model ``config["model"]`` trained on ``splits``, from its folder where the same was trained before.

    Args:
        config: a stock model's configuration (made for the same dataset as the splits).
        splits: ``train`` (one row per prefix), ``valid`` and ``test``; see ``TextSequentialDataset.build``.
        training: ``prefix`` (RecBole's own way) or ``causal`` (all positions at once) or ``binary`` (so too, by binary
            cross-entropy); both fall back to ``prefix`` for models that are not causal.

    Raises:
        UserError: the folder holds something else.
    """
    name = config["model"]
    if name not in CAUSAL_MODELS or (training == "causal" and config["loss_type"] != "CE"):
        training = "prefix"
    vectors = catalogue_vectors(config, splits["train"])
    settings = {**identity_of(deciding_settings(config), vectors), "training": training}
    if can_trim(get_model(name)):
        settings["padding"] = "none"  # the same model up to rounding and the draws of dropout: no number of another run
    fingerprint = data_identity(config, splits)
    digest = hashlib.sha256(json.dumps([settings, fingerprint], sort_keys=True).encode()).hexdigest()[:10]
    folder = Path(config["checkpoint_dir"]) / f"{name}-{config['dataset']}-seed{config['seed']}-{digest}"

    with held(folder):
        return _train_or_load(config, splits, training, folder, settings, fingerprint, vectors)


def _train_or_load(
    config: Config,
    splits: dict[str, Any],
    training: str,
    folder: Path,
    settings: dict[str, Any],
    fingerprint: str,
    vectors: CatalogueVectors | None,
) -> StockRun:
    """:func:`train_or_load` while no other process writes ``folder``."""
    name = config["model"]
    train = training_data(config, splits)
    train_data, valid_data = _dataloaders(config, splits, train)
    init_seed(config["seed"], config["reproducibility"])
    model = get_model(name)(config, train)
    if vectors is not None:
        use_item_vectors(model, config, vectors.vectors)
    model = model.to(config["device"])
    # What a traditional model knows (counts, similarities) is no weight of it, and takes one pass to count again.
    keeps_weights = config["MODEL_TYPE"] != ModelType.TRADITIONAL
    if keeps_weights and checkpoint.exists(folder) and not config["fresh"]:
        checkpoint.remove_resume_state(folder)  # of a process that was stopped at the very end
        record = _read_record(folder)
        checkpoint.check(record, folder, model=name, fingerprint=fingerprint)
        model.load_state_dict(checkpoint.read_weights(folder, config["device"]))
        getLogger().info(f"{name}: using the trained model in {folder}")
        return _read(model.eval(), config, splits, folder, record)

    if not may_train():
        raise UserError(
            f"there is no trained {name} of these data and settings in {folder.parent}, and loading a checkpoint trains "
            f"nothing: give the folder of the {name} that it belongs to as teacher_checkpoint."
        )
    resolved = settings_of(config)[0]
    with run_log(name, folder.name, config["fresh"]), tracked(folder.name, resolved):
        note_settings(folder.name, resolved)
        getLogger().info(f"{name}: training it now ({training}); it will be kept in {folder}")
        stored = [] if vectors is None else vectors.stored_files
        return _train(config, model, splits, (train_data, valid_data), training, folder, settings, fingerprint, stored)


def _train(
    config: Config,
    model: nn.Module,
    splits: dict[str, Any],
    loaders: tuple[Any, Any],
    training: str,
    folder: Path,
    settings: dict[str, Any],
    fingerprint: str,
    stored_files: list[str],
) -> StockRun:
    """Train ``model`` and write its folder, which must be held."""
    name = config["model"]
    train_data, valid_data = loaders
    if hasattr(model, "make_ids"):  # a first stage of its own
        model.make_ids()
    identity = checkpoint.as_json({"model": name, "settings": settings, "fingerprint": fingerprint})
    state = _state_to_go_on_from(config, folder, identity)
    started, begun = time.perf_counter(), state["of_run"]["started"] if state else now()
    bases = (CandidateEvaluation, get_trainer(config["MODEL_TYPE"], name))
    if training != "prefix":
        bases = (CausalTraining if training == "causal" else BinaryTraining, *bases)
    trainer_class = type(f"{name}BaselineTrainer", (ResumedTraining, RecordedTraining, *bases), {})
    trainer = trainer_class(config, model)
    if config["adam_betas"]:  # a key of models of this library alone
        for group in trainer.optimizer.param_groups:
            if "betas" in group:
                group["betas"] = tuple(config["adam_betas"])
    curve: list[dict[str, Any]] = []
    seconds = 0.0
    if is_pretraining(model):
        # S3Rec: RecBole leaves the fine-tuning to a second run with other settings, and writes copies for it on the way.
        if state is None or state["phase"] == "pretrain":
            trainer.save_step = trainer.pretrain_epochs + 1
            trainer.phase = "pretrain"
            trainer.keep_states(folder, identity, {"started": begun, "curve": [], "seconds": 0.0})
            if state is not None:
                trainer.go_on(state)
            try:
                with reporting_full_disk(folder):
                    trainer.pretrain(train_data, verbose=True, show_progress=config["show_progress"])
            finally:
                trainer.close()
            curve, state = trainer.curve, None
            seconds = trainer.earlier_seconds + time.perf_counter() - started
        else:
            trainer.close()
            curve, seconds = state["of_run"]["curve"], state["of_run"]["seconds"]
        begin_finetuning(model)
        started = time.perf_counter()
        trainer = trainer_class(config, model)
    trainer.keep_states(folder, identity, {"started": begun, "curve": curve, "seconds": seconds})
    if state is not None:
        trainer.go_on(state)
    try:
        with reporting_full_disk(folder):
            _, valid_result = trainer.fit(
                train_data, valid_data, verbose=True, saved=True, show_progress=config["show_progress"]
            )
        if trainer.best_weights is not None:
            model.load_state_dict(trainer.best_weights)
    finally:
        trainer.close()
    curve = curve + trainer.curve
    seconds += trainer.earlier_seconds + time.perf_counter() - started
    record = {
        "kind": "stock",
        "model": name,
        "dataset": config["dataset"],
        "given": config.external_config_dict,
        "fingerprint": fingerprint,
        "seed": config["seed"],
        "settings": settings,
        "stored_files": stored_files,
        "started": begun,
        "train_seconds": seconds,
        "valid_result": dict(valid_result or {}),
    }
    forget(folder)  # the result of other weights
    write_curve(folder, curve)
    checkpoint.write(folder, record, model.state_dict())
    checkpoint.remove_resume_state(folder)
    return StockRun(model.eval(), config, splits, folder, seconds, record["valid_result"], curve=curve, started=begun)


def data_identity(config: Config, splits: dict[str, Any]) -> str:
    """The fingerprint of what a stock model learns from: with the items' texts where it reads them."""
    train = splits["train"]
    if not getattr(get_model(config["model"]), "reads_texts", False):
        return train.column_fingerprint
    return hashlib.sha256(f"{train.column_fingerprint} {train.text_fingerprint}".encode()).hexdigest()


def _state_to_go_on_from(config: Config, folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The state of a training that was stopped, where the settings ask to go on with it."""
    if config["resume"] and not config["fresh"]:
        state = read_state(folder, identity)
        if state is not None:
            stage = f" of {state['phase']}" if state["phase"] else ""
            getLogger().info(f"{config['model']}: going on after epoch {state['epoch']}{stage}")
        return state
    if checkpoint.has_resume_state(folder):
        if not config["fresh"]:
            getLogger().warning(
                f"{folder} holds an unfinished training of these settings, which starts again; --resume=True goes on with it."
            )
        checkpoint.remove_resume_state(folder)
    return None


def training_data(config: Config, splits: dict[str, Any]) -> Any:
    """What a stock model is trained on: prefixes with their targets, or single interactions where it knows no sequences."""
    return splits["train"] if config["MODEL_TYPE"] == ModelType.SEQUENTIAL else single_interactions(splits["train"])


def _dataloaders(config: Config, splits: dict[str, Any], train: Any) -> tuple[Any, Any]:
    """RecBole's dataloaders. To be made before the model: BERT4Rec's masking writes into ``config`` what the model reads."""
    train_sampler, valid_sampler, _ = create_samplers(config, train, [train, splits["valid"], splits["test"]])
    return (
        get_dataloader(config, "train")(config, train, train_sampler, shuffle=config["shuffle"]),
        get_dataloader(config, "valid")(config, splits["valid"], valid_sampler, shuffle=False),
    )


def _read_record(folder: Path) -> dict[str, Any]:
    """The record of a stock model's checkpoint. Nothing in it is evaluated, and its settings are not used.

    Raises:
        UserError: the folder holds something else, or its record is damaged.
    """
    record = checkpoint.read_record(folder)
    if record.get("kind") != "stock":
        raise UserError(f"{folder} holds {record['model']!r}, which is no stock model of RecBole: give the folder of one.")
    numbers = record.get("valid_result")
    if not isinstance(record.get("train_seconds"), (int, float)) or not isinstance(numbers, dict):
        raise UserError(f"{folder / checkpoint.RECORD} is damaged: it lacks train_seconds or valid_result.")
    if not all(isinstance(value, (int, float)) for value in numbers.values()):
        raise UserError(f"{folder / checkpoint.RECORD} is damaged: its valid_result holds something else than numbers.")
    return record


def load(folder: str | Path, config: Config, splits: dict[str, Any]) -> StockRun:
    """Load a stock model from ``folder`` for ``config`` and ``splits``; a model of other data is refused.

    Raises:
        UserError: no readable checkpoint, or one of another model, dataset or split.
    """
    folder = Path(folder)
    record = _read_record(folder)
    checkpoint.check(record, folder, model=config["model"], fingerprint=data_identity(config, splits))
    train = splits["train"]
    if not isinstance(train, ItemCatalog):
        train = training_data(config, splits)
        _dataloaders(config, splits, train)
    model = get_model(config["model"])(config, train)
    weights = checkpoint.read_weights(folder, config["device"])
    try:
        make_room(model, config, weights)
        model = model.to(config["device"])
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"The weights in {folder} do not fit {config['model']} as it is configured here: give the sizes that it was "
            f"trained with in teacher_settings."
        ) from error
    return _read(model.eval(), config, splits, folder, record)


def _read(model: nn.Module, config: Config, splits: dict[str, Any], folder: Path, record: dict[str, Any]) -> StockRun:
    if is_pretraining(model):
        begin_finetuning(model)
    seconds, valid = record["train_seconds"], record["valid_result"]
    return StockRun(model, config, splits, folder, seconds, valid, True, read_curve(folder), record.get("started"))
