"""Training of a linear head over an LLM, tuned or not: the next item's ID is read from a hidden state.

Reference:
    Jianyang Zhai et al., "Learning Transition Patterns by Large Language Models for Sequential Recommendation", 2025.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from recbole.config import Config

from recbole_llm.config.settings import select
from recbole_llm.recommender.base import Recommender
from recbole_llm.trainer.trainer import LLMTrainer

HEAD_ALONE, HEAD_ON_PRETRAINED, WITH_LLM = 3e-4, 1e-4, 5e-5  # the paper's learning rates, appendix A.3


@runtime_checkable
class HeadRecommender(Recommender, Protocol):
    """What this trainer needs of a model beside the rest.

    Attributes:
        foundation: what the LLM was pre-trained to on other datasets (``folder``, ``sha256``); None where it was not.
        epoch_steps: training steps in an epoch, set by the trainer.
        id_alignment: whether an item's text alone is trained to mean its ID.
    """

    foundation: Any
    epoch_steps: int
    id_alignment: bool

    def id_accuracy(self) -> dict[str, float]:
        """Share of the items whose text means their own ID, by the metric's name."""

    def save_head(self, folder: Path, foundation: str | None = None) -> None:
        """Write the head to ``folder``. ``foundation``: identity of the LLM's weights where these are kept elsewhere."""


@dataclass(frozen=True)
class HeadTrainingSettings:
    """What this trainer reads beside the rest; each field is the key of the same name."""

    learning_rate: float | None


class LinearHeadTrainer(LLMTrainer):
    """Adds the paper's learning rates where none is given, the order of the items of the ID alignment, and the accuracy of
    that alignment after training."""

    predicts_probabilities = False

    @classmethod
    def complete_settings(cls, config: Config, model: HeadRecommender) -> None:
        """The paper's learning rate where none is given."""
        if select(HeadTrainingSettings, config).learning_rate is None:
            alone = HEAD_ALONE if model.foundation is None else HEAD_ON_PRETRAINED
            config["learning_rate"] = alone if model.backbone.frozen else WITH_LLM

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
            self.model.save_head(folder / "heads" / self.settings.dataset)

    def record(self) -> dict[str, Any]:
        """What a checkpoint says of itself."""
        foundation = self.model.foundation
        named = None if foundation is None else {"folder": str(foundation.folder), "sha256": foundation.sha256}
        return {**super().record(), "foundation": named}
