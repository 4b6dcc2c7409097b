"""Training in stages (:mod:`recbole_llm.trainer.stages`).

Each stage is a whole training (validation, early stopping, best weights) that begins with the best weights of the stage
before. A stage that is finished is kept in ``stages/<number>-<name>`` of the run's folder until the last one ends, so that
an interrupted run goes on inside the stage in which it was stopped.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from recbole.config import Config

from recbole_llm import checkpoint
from recbole_llm.config.settings import select
from recbole_llm.processes import group as processes
from recbole_llm.recommender.base import Recommender
from recbole_llm.results.run import read_curve, write_curve
from recbole_llm.trainer.checkpoint import has_training_state
from recbole_llm.trainer.stages import StageSettings, stages_to_run
from recbole_llm.trainer.trainer import LLMTrainer


@runtime_checkable
class StagedRecommender(Recommender, Protocol):
    """What training in stages needs of a model beside the rest.

    Attributes:
        stage: number of the present stage, from 0.
        parts: what a stage may train: patterns of parameters' names (``*`` for any text) by the part's name.
    """

    stage: int
    parts: Mapping[str, tuple[str, ...]]

    def enter_stage(self, number: int, vectors: bool) -> None:
        """Get ready for stage ``number``, on prompts with or without the teacher's vectors."""


class StagedTrainer(LLMTrainer):
    """Trains a model stage by stage.

    Args:
        config: RecBole configuration; ``stages`` is described above.
        model: the recommender.
    """

    def __init__(self, config: Config, model: StagedRecommender) -> None:
        self.stages = stages_to_run(select(StageSettings, config), model.parts)
        super().__init__(config, model)

    @property
    def is_last_stage(self) -> bool:
        return self.model.stage == len(self.stages) - 1

    def fit(self, train_data, valid_data=None, verbose=True, saved=True, show_progress=False, callback_fn=None):
        """Train all stages; arguments and result as RecBole's ``Trainer.fit``, the result being the last stage's."""
        folder, resumed, seconds = Path(self.saved_model_file), self.step > 0, 0.0
        curve: list[dict[str, Any]] = []
        started = result = None
        for number, stage in enumerate(self.stages):
            last = number == len(self.stages) - 1
            own = folder if last else folder / "stages" / f"{number + 1}-{stage['name']}"
            self._enter(number, stage)
            self.saved_model_file = str(own)
            if resumed and processes.decide(not last and _is_finished(own)):
                self.load_weights(own)
                record = checkpoint.read_record(own)
                seconds, started = seconds + record["train_seconds"], started or record.get("started")
                curve += _named(read_curve(own), stage["name"])
                continue
            if resumed and processes.decide(has_training_state(own)):
                super().resume_checkpoint(own)
            if verbose:
                self.logger.info(f"Stage {number + 1} of {len(self.stages)}, {stage['name']}: trains {stage['trains']}")
            result = super().fit(train_data, valid_data, verbose, saved, show_progress, callback_fn)
            seconds, started = seconds + self.train_seconds, started or self.started
            curve += _named(self.curve, stage["name"])
            if not last and saved:
                processes.decide()  # the main process has written them
                self.load_weights(own)
        self.train_seconds, self.curve, self.started = seconds, curve, started
        if saved and processes.is_main():
            record = checkpoint.read_record(folder)
            write_curve(folder, curve)
            checkpoint.write_json(folder / checkpoint.RECORD, {**record, "train_seconds": seconds, "started": started})
            shutil.rmtree(folder / "stages", ignore_errors=True)
        return result

    def _enter(self, number: int, stage: Mapping[str, Any]) -> None:
        """Make the model and this trainer ready for a stage, as if nothing had been trained but the weights."""
        self.model.enter_stage(number, stage["vectors"])
        patterns = [pattern for part in stage["trains"] for pattern in self.model.parts[part]]
        for name, parameter in self.model.trained_parameters().items():
            parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in patterns))
        self.epochs, self.learning_rate = stage["epochs"], stage["learning_rate"]
        self.optimizer = self._build_optimizer()
        self.step, self.best_step, self.cur_step = 0, -1, 0
        self.best_valid_score, self.best_valid_result = float("-inf") if self.valid_metric_bigger else float("inf"), None
        self.train_seconds, self.log, self.curve, self.started = 0.0, [], [], None

    def can_resume(self, folder) -> bool:
        """Whether ``folder`` holds the state of an unfinished training, in whichever stage."""
        return super().can_resume(folder) or (Path(folder) / "stages").is_dir()

    def resume_checkpoint(self, resume_file) -> None:
        """Have :meth:`fit` go on in the stage in which the training in ``resume_file`` was stopped."""
        self.step = 1  # any number above 0; each stage brings its own
        self.saved_model_file = str(checkpoint.folder_of(resume_file))


def _is_finished(folder: Path) -> bool:
    return checkpoint.exists(folder) and bool(checkpoint.read_record(folder).get("finished"))


def _named(curve: list[dict[str, Any]], stage: str) -> list[dict[str, Any]]:
    return [{**point, "stage": stage} for point in curve]
