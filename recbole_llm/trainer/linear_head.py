"""Training ST2SI on one dataset, and pre-training its LLM on several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from recbole.config import Config
from torch import nn

from recbole_llm.trainer.trainer import LLMTrainer


class ST2SITrainer(LLMTrainer):
    """Adds the paper's learning rates, the order of the items of the ID alignment, and the accuracy of W after training."""

    predicts_probabilities = False

    def __init__(self, config: Config, model: nn.Module) -> None:
        if config["learning_rate"] is None:  # appendix A.3
            head_alone = 3e-4 if model.foundation is None else 1e-4
            config["learning_rate"] = head_alone if model.backbone.frozen else 5e-5
        super().__init__(config, model)

    def _train_step(self, train_data, interaction, steps_per_epoch: int, accumulation: int) -> np.ndarray:
        self.model.epoch_steps = steps_per_epoch
        return super()._train_step(train_data, interaction, steps_per_epoch, accumulation)

    def evaluate(self, eval_data, load_best_model=True, model_file=None, show_progress=False):
        """Evaluate on ``eval_data``; arguments and result as RecBole's ``Trainer.evaluate``."""
        result = super().evaluate(eval_data, load_best_model, model_file, show_progress)
        if result is not None and self.model.id_alignment and eval_data._dataset is eval_data._dataset.splits["test"]:
            result.update(self.model.id_accuracy())
        return result

    def _save_best(self, folder: Path) -> None:
        super()._save_best(folder)
        if self.model.backbone.frozen:  # else the head belongs to the LLM that was tuned with it
            self.model.save_head(folder / "heads" / self.config["dataset"])

    def record(self) -> dict[str, Any]:
        """What a checkpoint says of itself."""
        foundation = self.model.foundation
        named = None if foundation is None else {"folder": str(foundation.folder), "sha256": foundation.sha256}
        return {**super().record(), "foundation": named}
