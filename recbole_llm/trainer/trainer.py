"""Training and evaluation of LLM recommenders behind RecBole's trainer interface.

The loop counts optimizer batches, not epochs: validation, learning rate, checkpoints and resuming all happen at a step,
and everything random in a step follows from the seed and the step's number. A run that is killed and resumed
therefore ends with the same numbers as one that was not.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.config import Config
from recbole.trainer import Trainer
from recbole.utils import calculate_valid_score, dict2str, get_local_time, set_color
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from tqdm import tqdm

from recbole_llm import checkpoint
from recbole_llm.backbone.lora import adapter_config, adapter_tensors, merged_adapter, save_merged
from recbole_llm.errors import UserError
from recbole_llm.evaluation.candidate_evaluation import CandidateEvaluation


class LLMTrainer(CandidateEvaluation, Trainer):
    """Trains an :class:`~recbole_llm.recommender.llm_recommender.LLMRecommender`.

    Args:
        config: RecBole configuration; the keys are described in ``properties/model/<Model>.yaml``.
        model: the recommender.
    """

    predicts_probabilities = True

    def __init__(self, config: Config, model: nn.Module) -> None:
        super().__init__(config, model)
        # RecBole has made this int where both are whole; a fraction of an epoch is allowed here.
        self.eval_step = config["eval_step"]
        self.saved_model_file = str(Path(self.checkpoint_dir) / f"{config['model']}-{config['dataset']}-{get_local_time()}")
        self.step = 0
        self.best_step = -1
        self.train_seconds = 0.0
        self.log: list[dict[str, Any]] = []

    # Optimizer

    def _build_optimizer(self, **kwargs):
        parameters = list(self.model.trained_parameters().values())
        if not parameters:  # nothing to train: the LLM as it is
            return None
        options = {"lr": self.learning_rate, "weight_decay": self.weight_decay}
        kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        kind = kinds.get(self.learner.lower())
        if kind is None:
            return torch.optim.SGD(parameters, **options)
        # Fused: one pass over the weights (8 times as fast on a CPU core) and no temporaries of their size.
        return kind(parameters, betas=tuple(self.config["adam_betas"]), fused=True, **options)

    def _learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """Linear warm-up, then a factor every so often or half a cosine; a function of the step alone.

        The cosine is at its top in the first step after the warm-up and at ``learning_rate_min`` in the last step.
        """
        total = self.epochs * steps_per_epoch
        warmup = self.config["warmup_steps"]
        if warmup < 1:
            warmup = round(warmup * total)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        if self.config["learning_rate_schedule"] == "cosine":
            lowest = min(self.config["learning_rate_min"], self.learning_rate)
            done = (step - warmup) / max(1, total - 1 - warmup)
            return lowest + (self.learning_rate - lowest) * (1 + math.cos(math.pi * done)) / 2
        period = self.config["learning_rate_decay_every"] * steps_per_epoch
        return self.learning_rate * self.config["learning_rate_decay"] ** int(step / period)

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
        batch_size, accumulation = self.config["train_batch_size"], self.config["accumulation_steps"]
        steps_per_epoch = -(-len(rows) // batch_size)
        total = self.epochs * steps_per_epoch
        validate_every = max(1, round(self.eval_step * steps_per_epoch)) if valid_data and self.eval_step > 0 else 0
        folder = Path(self.saved_model_file)
        if verbose:
            self.logger.info(
                f"{self.config['model']}: {len(rows)} training rows, {steps_per_epoch} steps per epoch, "
                f"{sum(p.numel() for p in self.model.trained_parameters().values()):,} trained parameters"
                + (f", continuing after step {self.step}" if self.step else "")
            )

        if not self.model.trained_parameters():
            self._save_best(folder)
            self._finish(folder)
            return self.best_valid_score, self.best_valid_result
        order, stop = None, False
        sums, counted = np.zeros(0), 0
        tokens_before, mark = self.model.encoder.counts.tokens, time.perf_counter()
        bar = tqdm(
            total=total, initial=self.step, disable=not show_progress, ncols=120, desc=f"Train {self.config['model']}"
        )
        while self.step < total and not stop:
            epoch, position = divmod(self.step, steps_per_epoch)
            if order is None or position == 0:
                order = np.random.default_rng([self.config["seed"], epoch]).permutation(len(rows))
            batch = torch.from_numpy(order[position * batch_size : (position + 1) * batch_size])
            self.model.progress = self.step / total
            parts = self._train_step(train_data, rows[batch], steps_per_epoch, accumulation)
            self.step += 1
            sums = parts if counted == 0 else sums + parts
            counted += 1
            speed = (self.model.encoder.counts.tokens - tokens_before) / (time.perf_counter() - mark)
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
            if validate_every and (self.step % validate_every == 0 or last):
                stop = self._validate(valid_data, self.step / steps_per_epoch, verbose, saved, callback_fn)
            elif saved and not validate_every:
                self._save_best(folder)
            if saved:
                self._save_resume_state(folder, finished=last or stop)
            sums, counted = np.zeros(0), 0
            tokens_before, mark = self.model.encoder.counts.tokens, time.perf_counter()
        bar.close()
        if saved:
            self._finish(folder)
        if self.best_valid_result is not None:
            self._add_hparam_to_tensorboard(self.best_valid_score)
        return self.best_valid_score, self.best_valid_result

    def _train_step(self, train_data, interaction, steps_per_epoch: int, accumulation: int) -> np.ndarray:
        """One batch forward and backward, and the optimizer's step where enough batches have come together."""
        self.model.train()
        self.model.seed_step(self.step)
        torch.manual_seed(int(self.model.rng.integers(2**31)))  # dropout of a trained LLM
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
            if self.clip_grad_norm:
                nn.utils.clip_grad_norm_(self.model.trained_parameters().values(), **self.clip_grad_norm)
            for group in self.optimizer.param_groups:
                group["lr"] = self._learning_rate(self.step, steps_per_epoch)
            self.optimizer.step()
            # Fused optimizers do not say that they moved the weights; the item table is told by their versions.
            increment_version(self.model.trained_parameters().values())
            self.optimizer.zero_grad(set_to_none=True)
        return np.array([part.item() for part in losses])

    def _describe(self, parts: np.ndarray) -> str:
        return ", ".join(f"{name}: {part:.4f}" for name, part in zip(self.model.loss_names, parts, strict=False))

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
        result = self.evaluate(valid_data, load_best_model=False)
        score = calculate_valid_score(result, self.valid_metric)
        better = score > self.best_valid_score if self.valid_metric_bigger else score < self.best_valid_score
        if better:
            self.best_valid_score, self.best_valid_result, self.cur_step = score, dict(result), 0
            self.best_step = self.step
            if saved:
                self._save_best(Path(self.saved_model_file))
        else:
            self.cur_step += 1
        self.log.append({"step": self.step, "epoch": epoch, **result})
        if verbose:
            self.logger.info(
                set_color(f"epoch {epoch:.2f} evaluating", "green")
                + f" [time: {time.perf_counter() - started:.2f}s, valid_score: {score:f}] {dict2str(result)}"
            )
        self.tensorboard.add_scalar("Valid_score", score, self.step)
        self.wandblogger.log_metrics({**result, "valid_step": self.step}, head="valid")
        if callback_fn:
            callback_fn(epoch, score)
        return self.cur_step >= self.stopping_step

    # Evaluation

    def _load_best(self, file: str) -> None:
        self.load_weights(file)

    def evaluate(self, eval_data, load_best_model=True, model_file=None, show_progress=False):
        """Evaluate on ``eval_data``; arguments and result as RecBole's ``Trainer.evaluate``.

        The best model is evaluated with its LoRA matrices merged where ``merge_adapter`` asks for it.
        """
        if self.model.recommend_by == "generation":
            self.model.titles.reset()
        if eval_data and load_best_model:
            self._load_best(model_file or self.saved_model_file)
        merges = load_best_model and self.config["merge_adapter"]
        with merged_adapter(self.model.backbone) if merges else nullcontext():
            result = super().evaluate(eval_data, False, model_file, show_progress)
        if self.model.recommend_by == "generation" and result is not None:
            result.update(self.model.titles.metrics())
        return result

    def _scores(self):
        return self.model.score, self.model.predict

    # Checkpoints

    def record(self) -> dict[str, Any]:
        """What a checkpoint says of itself."""
        config = self.config
        return {
            "kind": "llm",
            "model": config["model"],
            "dataset": config["dataset"],
            "fingerprint": self.model.fingerprint,
            "seed": config["seed"],
            "backbone": self.model.backbone.identity,
            "teacher": None
            if self.model.teacher is None
            else {
                "model": self.model.teacher.name,
                "folder": str(self.model.teacher_run.folder),
                "vectors": self.model.teacher.identity,
            },
            "settings": config.external_config_dict,
            "best_valid_score": self.best_valid_score,
            "best_valid_result": self.best_valid_result,
            "best_step": self.best_step,
            "train_seconds": self.train_seconds,
            "validations": self.log,
        }

    def _save_best(self, folder: Path) -> None:
        tensors = adapter_tensors(self.model.backbone)
        if tensors:  # a second time, in PEFT's own format, for use without this library
            checkpoint.write_adapter(folder, adapter_config(self.model.backbone), tensors)
        checkpoint.write(folder, self.record(), self.model.trained_parameters())

    def load_weights(self, folder: str | Path) -> None:
        """Load a checkpoint's trained weights.

        Raises:
            UserError: the checkpoint is foreign, truncated, or of another model, dataset, backbone or teacher.
        """
        load_trained_weights(self.model, folder, self.config["model"])

    def _save_resume_state(self, folder: Path, finished: bool) -> None:
        """Save all that the rest of the training depends on, in two files that belong together by their step."""
        if finished:
            return
        names = list(self.model.trained_parameters())
        state = self.optimizer.state_dict()
        tensors = {f"weight/{name}": value for name, value in self.model.trained_parameters().items()}
        scalars: dict[str, dict[str, float]] = {}
        for index, entries in state["state"].items():
            for key, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{names[index]}/{key}"] = value
                else:
                    scalars.setdefault(names[index], {})[key] = value
        # A batch whose gradients wait for the optimizer's step is part of the state as well.
        for name, parameter in self.model.trained_parameters().items():
            if parameter.grad is not None:
                tensors[f"gradient/{name}"] = parameter.grad
        resume = folder / "resume"
        resume.mkdir(parents=True, exist_ok=True)
        checkpoint.write_tensors(resume / f"state-{self.step}.safetensors", tensors)
        checkpoint.write_json(
            resume / "state.json",
            {
                "format": checkpoint.FORMAT,
                "step": self.step,
                "best_step": self.best_step,
                "best_valid_score": float(self.best_valid_score),
                "best_valid_result": self.best_valid_result,
                "cur_step": self.cur_step,
                "train_seconds": self.train_seconds,
                "log": self.log,
                "optimizer_scalars": scalars,
                **{key: value for key, value in self.record().items() if key in RESUME_KEYS},
            },
        )
        for old in resume.glob("state-*.safetensors"):
            if old.name != f"state-{self.step}.safetensors":
                old.unlink(missing_ok=True)

    def _finish(self, folder: Path) -> None:
        """Write the final record beside the best weights and drop the state that resuming needed.

        Under ``merge_adapter`` the best weights are loaded and the merged LLM is written too.
        """
        record = {**self.record(), "finished": True}
        if not (folder / checkpoint.WEIGHTS).exists():  # no validation took place: the last weights are the result
            self._save_best(folder)
        checkpoint.write_json(folder / checkpoint.RECORD, {"format": checkpoint.FORMAT, **record})
        if self.config["merge_adapter"] and self.is_last_stage:
            self.load_weights(folder)
            save_merged(self.model.backbone, folder / checkpoint.MERGED)
        checkpoint.remove_resume_state(folder)

    def can_resume(self, folder: str | Path) -> bool:
        """Whether ``folder`` holds the state of an unfinished training."""
        return (Path(folder) / "resume" / "state.json").is_file()

    def resume_checkpoint(self, resume_file) -> None:
        """Continue an unfinished training from its folder.

        Raises:
            UserError: no such state, or one of another model, dataset, backbone, teacher or settings.
        """
        folder = checkpoint.folder_of(resume_file)
        state = checkpoint.read_json(folder / "resume" / "state.json")
        expected = {key: value for key, value in self.record().items() if key in RESUME_KEYS}
        checkpoint.check(state, folder, **checkpoint.as_json(expected))
        tensors = checkpoint.read_tensors(folder / "resume" / f"state-{state['step']}.safetensors", self.device)
        names = list(self.model.trained_parameters())
        optimizer = self.optimizer.state_dict()
        optimizer["state"] = {}
        with torch.no_grad():
            for name, parameter in self.model.trained_parameters().items():
                parameter.copy_(tensors[f"weight/{name}"])
                if f"gradient/{name}" in tensors:
                    parameter.grad = tensors[f"gradient/{name}"].clone()
        for index, name in enumerate(names):
            entries: dict[str, Any] = dict(state["optimizer_scalars"].get(name, {}))
            prefix = f"optimizer/{name}/"
            entries |= {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
            if entries:
                optimizer["state"][index] = entries
        self.optimizer.load_state_dict(optimizer)
        self.saved_model_file = str(folder)
        self.step, self.best_step, self.cur_step = state["step"], state["best_step"], state["cur_step"]
        self.best_valid_score, self.best_valid_result = state["best_valid_score"], state["best_valid_result"]
        self.train_seconds, self.log = state["train_seconds"], state["log"]
        self.logger.info(f"Checkpoint loaded: resuming the training in {folder} after step {self.step}")


RESUME_KEYS = ("model", "dataset", "fingerprint", "seed", "backbone")


def load_trained_weights(model: nn.Module, folder: str | Path, name: str) -> dict[str, Any]:
    """Load the trained weights in ``folder`` into ``model`` and return the checkpoint's record.

    Raises:
        UserError: the checkpoint is foreign, truncated, or of another model, dataset, backbone or teacher.
    """
    folder = checkpoint.folder_of(folder)
    record = checkpoint.read_record(folder)
    checkpoint.check(
        record, folder, model=name, fingerprint=model.fingerprint, backbone=checkpoint.as_json(model.backbone.identity)
    )
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
