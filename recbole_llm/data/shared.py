"""Datasets of a run, each built once and shared by its models."""

from __future__ import annotations

import json
from logging import getLogger

from recbole.config import Config

from recbole_llm.config.identity import data_settings
from recbole_llm.data.dataset import TextSequentialDataset


class SharedData:
    """Builds each dataset once and returns it to every model that needs it."""

    def __init__(self) -> None:
        self._built: dict[str, list[TextSequentialDataset]] = {}

    def splits(self, config: Config) -> dict[str, TextSequentialDataset]:
        """The splits for ``config``: ``train`` (every prefix a row), ``valid``, ``test``."""
        return self._build(config)[0].splits

    def train(self, config: Config) -> TextSequentialDataset:
        """The training split with the targets that ``config["train_targets"]`` asks for."""
        last = self._build(config)[0]
        return last.all_rows if config["train_targets"] == "all" else last

    def _build(self, config: Config) -> list[TextSequentialDataset]:
        seed = config["seed"] if config["shuffle_training"] else None  # it draws the order
        key = json.dumps([data_settings(config), seed], sort_keys=True)
        if key not in self._built:
            wanted, config["train_targets"] = config["train_targets"], "last"
            dataset = TextSequentialDataset(config)
            getLogger().info(dataset)
            self._built[key] = dataset.build()
            config["train_targets"] = wanted
        return self._built[key]
