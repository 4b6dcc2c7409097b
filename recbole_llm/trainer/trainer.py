"""Training and evaluation of LLM recommenders behind RecBole's trainer interface.

The loop counts optimizer batches, not epochs: validation, learning rate, checkpoints and resuming all happen at a step,
and everything random in a step follows from the seed and the step's number. A run that is killed and resumed
therefore ends with the same numbers as one that was not.
"""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.config import Config
from recbole.trainer import Trainer
from recbole.utils import calculate_valid_score, get_local_time, set_color
from torch import nn
from torch.autograd.graph import increment_version
from tqdm import tqdm

from recbole_llm import checkpoint
from recbole_llm.backbone.lora import merged_adapter
from recbole_llm.config.settings import select
from recbole_llm.data.windows import TrainingWindows
from recbole_llm.errors import UserError
from recbole_llm.evaluation.candidate_evaluation import CandidateEvaluation
from recbole_llm.evaluation.protocols import EvaluationSettings
from recbole_llm.processes import group as processes
from recbole_llm.processes.tensors import mean_gradients, same_weights
from recbole_llm.recommender.base import Recommender
from recbole_llm.results.describe import now
from recbole_llm.results.log import decimals, main_writes
from recbole_llm.results.mlflow_tracker import Trackers
from recbole_llm.results.run import forget, write_curve
from recbole_llm.trainer.checkpoint import (
    backbone_identities,
    has_training_state,
    load_trained_weights,
    load_training_state,
    save_merged_backbones,
    save_training_state,
    save_weights,
)

WINDOW_STREAM = 1000  # of an epoch's randomness: the starts of windows, beside the order of rows; above the number of any stage


@dataclass(frozen=True)
class TrainingSettings:
    """What the trainer reads beside what RecBole's does; each field is the key of the same name."""

    model: str
    dataset: str
    seed: int
    eval_step: float
    train_targets: str
    history_length: int
    train_batch_size: int
    accumulation_steps: int
    adam_betas: list[float]
    adam_eps: float | None
    warmup_steps: float
    learning_rate_schedule: str
    learning_rate_min: float
    learning_rate_decay: float
    learning_rate_decay_every: float
    merge_adapter: bool


class LLMTrainer(CandidateEvaluation, Trainer):
    """Trains a :class:`~recbole_llm.recommender.base.Recommender`.

    Args:
        config: RecBole configuration; the keys are described in ``properties/model/<Model>.yaml``.
        model: the recommender.

    Attributes:
        step: how many batches have been trained on.
        log: step, epoch and metrics of each validation.
        curve: losses and validations of the training, as a run's folder keeps them (``docs/runs.md``).
        started: when the training began.
    """

    predicts_probabilities = True

    def __init__(self, config: Config, model: Recommender) -> None:
        self.complete_settings(config, model)
        self.settings = settings = select(TrainingSettings, config)
        with main_writes():
            super().__init__(config, model)
        self.wandblogger = Trackers(self.wandblogger, config["log_mlflow"] and processes.is_main())
        # RecBole has made this int where both are whole; a fraction of an epoch is allowed here.
        self.eval_step = settings.eval_step
        self.saved_model_file = str(Path(self.checkpoint_dir) / f"{settings.model}-{settings.dataset}-{get_local_time()}")
        self.step = 0
        self.best_step = -1
        self.train_seconds = 0.0
        self.log: list[dict[str, Any]] = []
        self.curve: list[dict[str, Any]] = []
        self.started: str | None = None

    @classmethod
    def complete_settings(cls, config: Config, model: Recommender) -> None:
        """Fill in the settings whose defaults depend on the model; they are part of a run's identity."""

    # Optimizer

    def _build_optimizer(self, **kwargs):
        parameters = list(self.model.trained_parameters().values())
        if not parameters:  # nothing to train: the LLM as it is
            return None
        options: dict[str, Any] = {"lr": self.learning_rate, "weight_decay": self.weight_decay}
        kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        kind = kinds.get(self.learner.lower())
        if kind is None:
            return torch.optim.SGD(self._parameter_groups(), **options)
        if self.settings.adam_eps is not None:
            options["eps"] = self.settings.adam_eps
        # Fused: one pass over the weights (8 times as fast on a CPU core) and no temporaries of their size.
        return kind(self._parameter_groups(), betas=tuple(self.settings.adam_betas), fused=True, **options)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained, in order, those of one learning rate that follow each other as a group.

        A model may have ``learning_rate_factor(name)``, by which the learning rate of the parameter ``name`` is multiplied.
        """
        factor_of = getattr(self.model, "learning_rate_factor", lambda name: 1.0)
        groups: list[dict[str, Any]] = []
        for name, parameter in self.model.trained_parameters().items():
            factor = factor_of(name)
            if not groups or groups[-1]["factor"] != factor:
                groups.append({"params": [], "factor": factor})
            groups[-1]["params"].append(parameter)
        return groups

    def _learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """Linear warm-up, then a factor every so often, half a cosine or a line; a function of the step alone.

        Cosine and line are at their top in the first step after the warm-up and at ``learning_rate_min`` in the last step.
        """
        settings, total = self.settings, self.epochs * steps_per_epoch
        warmup = settings.warmup_steps
        if warmup < 1:
            warmup = round(warmup * total)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        if settings.learning_rate_schedule in ("cosine", "linear"):
            lowest = min(settings.learning_rate_min, self.learning_rate)
            done = (step - warmup) / max(1, total - 1 - warmup)
            left = 1 - done if settings.learning_rate_schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
            return lowest + (self.learning_rate - lowest) * left
        period = settings.learning_rate_decay_every * steps_per_epoch
        return self.learning_rate * settings.learning_rate_decay ** int(step / period)

    # Training

    @property
    def is_last_stage(self) -> bool:
        """Whether what is trained now is the result, and not where another stage begins."""
        return True

    def fit(
        self, train_data, valid_data=None, verbose=True, saved=True, show_progress=False, callback_fn=None
    ) -> tuple[float, dict[str, float] | None]:
        """Train; arguments and result as RecBole's ``Trainer.fit``, ``callback_fn(epoch, score)`` at each validation."""
        rows = train_data._dataset.inter_feat
        batch_size, accumulation = self.settings.train_batch_size, self.settings.accumulation_steps
        steps_per_epoch = -(-len(rows) // batch_size)
        total = self.epochs * steps_per_epoch
        validate_every = max(1, round(self.eval_step * steps_per_epoch)) if valid_data and self.eval_step > 0 else 0
        folder = Path(self.saved_model_file)
        self.started = self.started or now()
        saved = saved and processes.is_main()
        same_weights(self.model.trained_parameters().values())
        if saved:
            forget(folder)  # the result of other weights
        if verbose:
            self.logger.info(
                f"{self.settings.model}: {len(rows)} training rows, {steps_per_epoch} steps per epoch, "
                f"{sum(p.numel() for p in self.model.trained_parameters().values()):,} trained parameters"
                + (f", continuing after step {self.step}" if self.step else "")
            )

        if verbose and validate_every:
            self._tell_sample(valid_data)
        if not self.model.trained_parameters():
            if processes.is_main():
                self._save_best(folder)
                self._finish(folder)
            return self.best_valid_score, self.best_valid_result
        windows = None
        if self.settings.train_targets == "window":
            dataset = train_data._dataset
            windows = TrainingWindows(dataset, min(self.settings.history_length, dataset.max_item_list_len))
        order, stop = None, False
        sums, counted = np.zeros(0), 0
        tokens_before, mark = self.model.tokens_read, time.perf_counter()
        bar = tqdm(total=total, initial=self.step, disable=not show_progress, ncols=120, desc=f"Train {self.settings.model}")
        while self.step < total and not stop:
            epoch, position = divmod(self.step, steps_per_epoch)
            if order is None or position == 0:
                order = np.random.default_rng([self.settings.seed, epoch]).permutation(len(rows))
                if windows is not None:
                    windows.draw(np.random.default_rng([self.settings.seed, epoch, WINDOW_STREAM]))
            batch = order[position * batch_size : (position + 1) * batch_size]
            self.model.progress = self.step / total
            inputs = rows[torch.from_numpy(batch)] if windows is None else windows.rows(batch)
            parts = self._train_step(train_data, inputs, steps_per_epoch, accumulation)
            self.step += 1
            sums = parts if counted == 0 else sums + parts
            counted += 1
            speed = (self.model.tokens_read - tokens_before) / (time.perf_counter() - mark)
            bar.set_postfix_str(self._describe(sums / counted) + f", {speed:,.0f} tokens/s", refresh=False)
            bar.update()

            last = self.step == total
            if not (validate_every and self.step % validate_every == 0) and not (last or position + 1 == steps_per_epoch):
                continue
            self.train_seconds += time.perf_counter() - mark
            means = sums / counted
            if verbose:
                self.logger.info(
                    set_color(f"epoch {self.step / steps_per_epoch:.2f} training", "green")
                    + f" [time: {time.perf_counter() - mark:.2f}s, {self._describe(means)}, {speed:,.0f} tokens/s]"
                )
            self.train_loss_dict[self.step] = float(means.sum())
            self._log_losses(means, speed)
            self._note_losses(means, self.step / steps_per_epoch)
            if validate_every and (self.step % validate_every == 0 or last):
                stop = self._validate(valid_data, self.step / steps_per_epoch, verbose, saved, callback_fn)
                stop = processes.decide(stop)
            elif saved and not validate_every:
                self._save_best(folder)
            mean_gradients(self.model.trained_parameters().values())  # those that wait for the optimizer's step
            if saved:
                self._save_resume_state(folder, finished=last or stop)
            sums, counted = np.zeros(0), 0
            tokens_before, mark = self.model.tokens_read, time.perf_counter()
        bar.close()
        if saved:
            self._finish(folder)
        if self.best_valid_result is not None:
            self._add_hparam_to_tensorboard(self.best_valid_score)
        return self.best_valid_score, self.best_valid_result

    def _tell_sample(self, valid_data) -> None:
        """How well the validations know what they choose by: of n users a share has a standard error up to .5 / sqrt(n)."""
        split = valid_data._dataset
        if not hasattr(split, "uid_field"):  # of several datasets, in a pre-training, that takes everyone
            return
        users = len(split.inter_feat[split.uid_field].unique())
        taken = min(users, EvaluationSettings.of_config(self.config).valid_users or users)
        self.logger.info(
            f"Validations take {taken} of {users} users: the standard error of a hit rate there is up to "
            f"{0.5 / math.sqrt(taken):.3f}" + ("; valid_users takes more" if taken < users else "")
        )

    def _train_step(self, train_data, interaction, steps_per_epoch: int, accumulation: int) -> np.ndarray:
        """One batch forward and backward, and the optimizer's step where enough batches have come together."""
        self.model.train()
        self.model.seed_step(self.step)
        # Dropout of a trained LLM: each process has its own.
        torch.manual_seed(int(self.model.rng.integers(2**31)) + processes.rank())
        interaction = train_data.transform(train_data._dataset, interaction).to(self.device)
        losses = self.model.calculate_loss(interaction)
        loss = sum(losses)
        if not torch.isfinite(loss):
            raise UserError(
                f"The training loss became {loss.item()} at step {self.step}: lower learning_rate, or set clip_grad_norm to "
                f"{{max_norm: 1.0}}."
            )
        (loss / accumulation).backward()
        last_of_epoch = (self.step + 1) % steps_per_epoch == 0
        if (self.step + 1) % accumulation == 0 or last_of_epoch:
            mean_gradients(self.model.trained_parameters().values())
            if self.clip_grad_norm:
                nn.utils.clip_grad_norm_(self.model.trained_parameters().values(), **self.clip_grad_norm)
            for group in self.optimizer.param_groups:
                group["lr"] = group["factor"] * self._learning_rate(self.step, steps_per_epoch)
            self.optimizer.step()
            # Fused optimizers do not say that they moved the weights; the item table is told by their versions.
            increment_version(self.model.trained_parameters().values())
            self.optimizer.zero_grad(set_to_none=True)
        return np.array([part.item() for part in losses])

    def _describe(self, parts: np.ndarray) -> str:
        return ", ".join(f"{name}: {part:.4f}" for name, part in zip(self.model.loss_names, parts, strict=False))

    def _note_losses(self, parts: np.ndarray, epoch: float) -> None:
        losses = {name: float(part) for name, part in zip(self.model.loss_names, parts, strict=False)}
        self.curve.append(
            {"step": self.step, "epoch": epoch, "seconds": self.train_seconds, "losses": losses, "valid": None}
        )

    def _log_losses(self, parts: np.ndarray, speed: float) -> None:
        values = {f"Loss/{name}": float(part) for name, part in zip(self.model.loss_names, parts, strict=False)}
        values |= {"Loss/Train": float(parts.sum()), "tokens_per_second": speed}
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, self.step)
        self.wandblogger.log_metrics({**values, "train_step": self.step}, head="train")

    def _validate(self, valid_data, epoch: float, verbose: bool, saved: bool, callback_fn) -> bool:
        """Validate, keep the best weights, and return whether patience has run out.

        Only a strictly better score replaces the best: of equal ones the earlier stays.
        """
        started = time.perf_counter()
        result = self._result_on(valid_data)
        score = calculate_valid_score(result, self.valid_metric)
        better = self._is_better(score, self.best_valid_score)
        if better:
            self.best_valid_score, self.best_valid_result, self.cur_step = score, dict(result), 0
            self.best_step = self.step
            if saved:
                self._save_best(Path(self.saved_model_file))
        else:
            self.cur_step += 1
        self.log.append({"step": self.step, "epoch": epoch, **result})
        self.curve[-1]["valid"] = {name: float(value) for name, value in result.items()}
        if verbose:
            self.logger.info(
                set_color(f"epoch {epoch:.2f} validation", "green")
                + f" [time: {time.perf_counter() - started:.2f}s, {decimals(result)}]"
            )
        self.tensorboard.add_scalar("Valid_score", score, self.step)
        for name, value in result.items():
            self.tensorboard.add_scalar(f"Valid/{name}", value, self.step)
        self.wandblogger.log_metrics({**result, "valid_step": self.step}, head="valid")
        if callback_fn:
            callback_fn(epoch, score)
        return self.cur_step >= self.stopping_step

    def _is_better(self, score: float, other: float) -> bool:
        return score > other if self.valid_metric_bigger else score < other

    def _result_on(self, valid_data) -> dict[str, Any]:
        """Metrics on the validation data; under ``residual_to_teacher`` with the gate that it chooses."""
        residual = getattr(self.model, "residual", None)
        if residual is None:
            return self.evaluate(valid_data, load_best_model=False)

        def is_better(result: dict[str, Any], other: dict[str, Any]) -> bool:
            return self._is_better(*(calculate_valid_score(found, self.valid_metric) for found in (result, other)))

        with self.model.form.remembering():
            return residual.choose_gate(lambda: self.evaluate(valid_data, load_best_model=False), is_better)

    # Evaluation

    def _load_best(self, file: str) -> None:
        self.load_weights(file)

    def evaluate(self, eval_data, load_best_model=True, model_file=None, show_progress=False):
        """Evaluate on ``eval_data``; arguments and result as RecBole's ``Trainer.evaluate``.

        The best model is evaluated with its LoRA matrices merged where ``merge_adapter`` asks for it.
        """
        self.model.reset_metrics()
        if eval_data and load_best_model:
            processes.decide()  # the main process has written them
            self._load_best(model_file or self.saved_model_file)
        with ExitStack() as merged:
            if load_best_model and self.settings.merge_adapter:
                for backbone in self.model.backbones.values():
                    merged.enter_context(merged_adapter(backbone))
            result = super().evaluate(eval_data, False, model_file, show_progress)
        if result is not None:
            result.update(self.model.answer_metrics())
        return result

    def _scores(self):
        return self.model.score, self.model.predict

    # Checkpoints

    def _identity(self) -> dict[str, Any]:
        """What a run must have in common with a checkpoint to go on from it; ready for JSON."""
        settings = self.settings
        return checkpoint.as_json(
            {
                "model": settings.model,
                "dataset": settings.dataset,
                "fingerprint": self.model.fingerprint,
                "seed": settings.seed,
                **backbone_identities(self.model),
            }
        )

    def _progress(self) -> dict[str, Any]:
        """The best so far; ready for JSON."""
        return {
            "best_valid_score": float(self.best_valid_score),
            "best_valid_result": self.best_valid_result,
            "best_step": self.best_step,
            "train_seconds": self.train_seconds,
            "started": self.started,
        }

    def record(self) -> dict[str, Any]:
        """What a checkpoint says of itself."""
        teacher = self.model.teacher
        if teacher is not None:
            folder = str(self.model.teacher_run.folder)
            teacher = {"model": teacher.name, "folder": folder, "vectors": teacher.identity}
        return {
            "kind": "llm",
            **self._identity(),
            "teacher": teacher,
            "settings": self.config.external_config_dict,
            "stored_files": [str(file) for file in getattr(self.model, "stored_files", ())],
            **self._progress(),
            "validations": self.log,
        }

    def _save_best(self, folder: Path) -> None:
        save_weights(folder, self.record(), self.model)

    def load_weights(self, folder: str | Path) -> None:
        """Load a checkpoint's trained weights.

        Raises:
            UserError: the checkpoint is foreign, truncated, or of another model, dataset, backbone or teacher.
        """
        load_trained_weights(self.model, folder, self.settings.model)

    def _save_resume_state(self, folder: Path, finished: bool) -> None:
        if finished:
            return
        state = {"step": self.step, **self._progress(), "cur_step": self.cur_step, "log": self.log, "curve": self.curve}
        state |= self._identity()
        save_training_state(folder, self.model, self.optimizer, state)

    def _finish(self, folder: Path) -> None:
        """Write the final record beside the best weights and drop the state that resuming needed.

        Under ``merge_adapter`` the best weights are loaded and the merged LLM is written too.
        """
        record = {**self.record(), "finished": True}
        if not (folder / checkpoint.WEIGHTS).exists():  # no validation took place: the last weights are the result
            self._save_best(folder)
        write_curve(folder, self.curve)
        checkpoint.write_json(folder / checkpoint.RECORD, {"format": checkpoint.FORMAT, **record})
        if self.settings.merge_adapter and self.is_last_stage:
            self.load_weights(folder)
            save_merged_backbones(folder, record, self.model)
        checkpoint.remove_resume_state(folder)

    def can_resume(self, folder: str | Path) -> bool:
        """Whether ``folder`` holds the state of an unfinished training."""
        return has_training_state(folder)

    def resume_checkpoint(self, resume_file) -> None:
        """Continue an unfinished training from its folder.

        Raises:
            UserError: no such state, or one of another model, dataset, backbone, teacher or settings.
        """
        folder = checkpoint.folder_of(resume_file)
        state = load_training_state(folder, self.model, self.optimizer, self.device, self._identity())
        self.saved_model_file = str(folder)
        self.step, self.best_step, self.cur_step = state["step"], state["best_step"], state["cur_step"]
        self.best_valid_score, self.best_valid_result = state["best_valid_score"], state["best_valid_result"]
        self.train_seconds, self.log = state["train_seconds"], state["log"]
        self.curve, self.started = state.get("curve", []), state.get("started")
        self.logger.info(f"Checkpoint loaded: resuming the training in {folder} after step {self.step}")
