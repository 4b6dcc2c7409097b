"""Data sets built once, however many models of a run ask for them."""

from __future__ import annotations

import json
from logging import getLogger

from recbole.config import Config
from recbole.utils.argument_list import dataset_arguments

from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.registry import TEXT_ARGUMENTS

# Settings beside RecBole's ``dataset_arguments`` that decide what a split dataset is.
SPLIT_ARGUMENTS = ("data_path", "eval_args", "dataset", *TEXT_ARGUMENTS)


class SharedData:
    """Builds each dataset once, however many models ask for it."""

    def __init__(self) -> None:
        self._built: dict[str, list[TextSequentialDataset]] = {}

    def splits(self, config: Config) -> dict[str, TextSequentialDataset]:
        """The splits for ``config``: ``train`` (every prefix a row), ``valid``, ``test``."""
        return self._build(config)[0].splits

    def train(self, config: Config) -> TextSequentialDataset:
        """The training split with the targets that ``config["train_targets"]`` asks for."""
        last = self._build(config)[0]
        return last if config["train_targets"] == "last" else last.all_rows

    def _build(self, config: Config) -> list[TextSequentialDataset]:
        seed = ("seed",) if config["shuffle_training"] else ()  # it draws the order
        names = (*dataset_arguments, *SPLIT_ARGUMENTS, *seed)
        key = json.dumps({name: config[name] for name in names}, default=str, sort_keys=True)
        if key not in self._built:
            wanted, config["train_targets"] = config["train_targets"], "last"
            dataset = TextSequentialDataset(config)
            getLogger().info(dataset)
            self._built[key] = dataset.build()
            config["train_targets"] = wanted
        return self._built[key]
