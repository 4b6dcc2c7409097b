"""Training in stages that the settings describe: what is trained, on which prompts, for how long.

::

    stages:
      - {name: text, trains: [lora, heads], vectors: False}
      - {name: mapping, trains: [mapping, heads], vectors: True, epochs: 5, learning_rate: 1.0e-4}

``epochs`` and ``learning_rate`` are those of the run where a stage does not name its own. ``run_stages`` names the stages
that take place, all of them where it is not set.

Each stage is a whole training (validation, early stopping, best weights) that begins with the best weights of the stage
before. A stage that is finished is kept in ``stages/<number>-<name>`` of the run's folder until the last one ends, so that
an interrupted run goes on inside the stage in which it was stopped.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recbole.config import Config

from recbole_llm import checkpoint
from recbole_llm.errors import UserError, closest
from recbole_llm.trainer import LLMTrainer

STAGE_KEYS = {"name": str, "trains": list, "vectors": bool, "epochs": int, "learning_rate": float}

PARTS = {
    "lora": lambda name: "lora_" in name,
    "tokens": lambda name: name.startswith(("id_embedding.", "marker")),
    "mapping": lambda name: name.startswith(("item_embedding.", "item_projection.", "user_projection.")),
    "heads": lambda name: name.startswith(("item_head.", "user_head.", "user_out", "item_out")),
}


def read_stages(stages: Any, epochs: int, learning_rate: float) -> list[dict[str, Any]]:
    """Check the key ``stages``, and fill in the run's epochs and learning rate where a stage has none of its own.

    Raises:
        UserError: naming the stage and what is wrong with it.
    """
    if not isinstance(stages, list) or not stages:
        raise UserError("stages: give a list of stages, each with name, trains and vectors.")
    checked = []
    for number, stage in enumerate(stages, start=1):
        if not isinstance(stage, Mapping):
            raise UserError(f"stages: stage {number} is {stage!r}, not a mapping such as {{name: text, trains: [lora]}}.")
        for key in stage:
            if key not in STAGE_KEYS:
                near = closest(key, STAGE_KEYS)
                hint = f"; did you mean {near}?" if near else f"; it may have {', '.join(STAGE_KEYS)}."
                raise UserError(f"stages: stage {number} has an unknown key {key!r}{hint}")
        values = {"epochs": epochs, "learning_rate": learning_rate, **stage}
        missing = [key for key in STAGE_KEYS if key not in values]
        if missing:
            raise UserError(f"stages: stage {number} lacks {missing[0]}.")
        try:
            values["learning_rate"] = float(values["learning_rate"])
        except (TypeError, ValueError):
            raise UserError(f"stages: stage {number} has learning_rate {values['learning_rate']!r}, no number.") from None
        for key, kind in STAGE_KEYS.items():
            if not isinstance(values[key], kind) or (kind is int and isinstance(values[key], bool)):
                raise UserError(f"stages: stage {number} has {key} {values[key]!r}, not of type {kind.__name__}.")
        if values["epochs"] < 1 or values["learning_rate"] <= 0:
            raise UserError(f"stages: stage {number} needs epochs and learning_rate above 0.")
        unknown = [part for part in values["trains"] if part not in PARTS]
        if unknown or not values["trains"]:
            raise UserError(f"stages: stage {number} trains {unknown or 'nothing'}; it may train {', '.join(PARTS)}.")
        checked.append(values)
    if len({stage["name"] for stage in checked}) < len(checked):
        raise UserError("stages: two stages have one name.")
    return checked


def stages_to_run(config: Config) -> list[dict[str, Any]]:
    """The stages of a run: those of the key ``stages`` that ``run_stages`` names, in the order of ``stages``.

    Raises:
        UserError: see :func:`read_stages`; or a stage that does not exist.
    """
    stages = read_stages(config["stages"], config["epochs"], config["learning_rate"])
    wanted = config["run_stages"]
    if wanted is None:
        return stages
    names = [stage["name"] for stage in stages]
    unknown = [name for name in wanted if name not in names]
    if unknown or not wanted:
        raise UserError(f"run_stages: {unknown[0] if unknown else 'it'} names no stage; there are {', '.join(names)}.")
    return [stage for stage in stages if stage["name"] in wanted]


class StagedTrainer(LLMTrainer):
    """Trains a model stage by stage.

    Args:
        config: RecBole configuration; ``stages`` is described above.
        model: the recommender.
    """

    def __init__(self, config, model) -> None:
        self.stages = stages_to_run(config)
        super().__init__(config, model)

    @property
    def is_last_stage(self) -> bool:
        return self.model.stage == len(self.stages) - 1

    def fit(self, train_data, valid_data=None, verbose=True, saved=True, show_progress=False, callback_fn=None):
        """Train all stages; arguments and result as RecBole's ``Trainer.fit``, the result being the last stage's."""
        folder, resumed, seconds = Path(self.saved_model_file), self.step > 0, 0.0
        result = None
        for number, stage in enumerate(self.stages):
            last = number == len(self.stages) - 1
            own = folder if last else folder / "stages" / f"{number + 1}-{stage['name']}"
            self._enter(number, stage)
            self.saved_model_file = str(own)
            if resumed and not last and checkpoint.exists(own) and checkpoint.read_record(own).get("finished"):
                self.load_weights(own)
                seconds += checkpoint.read_record(own)["train_seconds"]
                continue
            if resumed and super().can_resume(own):
                super().resume_checkpoint(own)
            if verbose:
                self.logger.info(f"Stage {number + 1} of {len(self.stages)}, {stage['name']}: trains {stage['trains']}")
            result = super().fit(train_data, valid_data, verbose, saved, show_progress, callback_fn)
            seconds += self.train_seconds
            if not last and saved:
                self.load_weights(own)
        self.train_seconds = seconds
        if saved:
            record = checkpoint.read_record(folder)
            checkpoint.write_json(folder / checkpoint.RECORD, {**record, "train_seconds": seconds})
            shutil.rmtree(folder / "stages", ignore_errors=True)
        return result

    def _enter(self, number: int, stage: Mapping[str, Any]) -> None:
        """Make the model and this trainer ready for a stage, as if nothing had been trained but the weights."""
        self.model.enter_stage(number, stage["vectors"])
        for name, parameter in self.model.trained_parameters().items():
            parameter.requires_grad_(any(PARTS[part](name) for part in stage["trains"]))
        self.epochs, self.learning_rate = stage["epochs"], stage["learning_rate"]
        self.optimizer = self._build_optimizer()
        self.step, self.best_step, self.cur_step = 0, -1, 0
        self.best_valid_score, self.best_valid_result = float("-inf") if self.valid_metric_bigger else float("inf"), None
        self.train_seconds, self.log = 0.0, []

    def can_resume(self, folder) -> bool:
        """Whether ``folder`` holds the state of an unfinished training, in whichever stage."""
        return super().can_resume(folder) or (Path(folder) / "stages").is_dir()

    def resume_checkpoint(self, resume_file) -> None:
        """Have :meth:`fit` go on in the stage in which the training in ``resume_file`` was stopped."""
        self.step = 1  # any number above 0; each stage brings its own
        self.saved_model_file = str(checkpoint.folder_of(resume_file))
