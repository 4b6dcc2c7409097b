"""Training in stages of a model that keeps a matrix of its items, computed anew in each epoch or not at all."""

from __future__ import annotations

import numpy as np

from recbole_llm.trainer.staged import StagedTrainer


class ItemMatrixTrainer(StagedTrainer):
    """Tells the model, as ``epoch_steps``, how many steps an epoch has."""

    def _train_step(self, train_data, interaction, steps_per_epoch: int, accumulation: int) -> np.ndarray:
        self.model.epoch_steps = steps_per_epoch
        return super()._train_step(train_data, interaction, steps_per_epoch, accumulation)
