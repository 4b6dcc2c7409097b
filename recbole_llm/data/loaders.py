"""RecBole's dataloaders over the splits of a text dataset."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from recbole.config import Config
from recbole.data.dataloader import TrainDataLoader

from recbole_llm.data.dataset import TextSequentialDataset

_NO_SAMPLES = {"distribution": "none", "sample_num": "none", "dynamic": False}


def dataloaders(config: Config, train: TextSequentialDataset, splits: Mapping[str, TextSequentialDataset]) -> tuple:
    """RecBole's dataloaders over our splits, without a sampler: the trainers here draw candidates themselves."""
    config = copy.copy(config)  # the caller's own stays what decides the run's folder
    config.final_config_dict = {**config.final_config_dict, "train_neg_sample_args": dict(_NO_SAMPLES)}
    return (
        TrainDataLoader(config, train, None, shuffle=config["shuffle"]),
        *(EvaluationRows(config, splits[phase]) for phase in ("valid", "test")),
    )


class EvaluationRows:
    """In the place of RecBole's evaluation dataloaders; the rows are read from ``_dataset``.

    RecBole's ``case_study`` reads ``dataset`` and ``is_sequential``, as of its own.
    """

    is_sequential = True

    def __init__(self, config: Config, split: TextSequentialDataset) -> None:
        self.config, self._dataset, self.dataset = config, split, split

    def __len__(self) -> int:
        return len(self._dataset)
