"""Cross-fitted teachers: each user's training targets are scored by a teacher that was not trained on that user.

What a teacher says of targets that it was trained on is too good to be true. Users are dealt into folds, and for each fold a
teacher is trained on the users of the others.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from recbole.config import Config

from recbole_llm.teacher import stock
from recbole_llm.teacher.teacher import Teacher, teacher_config

FOLD_STREAM = 1001  # of a run's randomness: who is in which fold


def fold_of_users(users: int, folds: int, seed: int) -> np.ndarray:
    """The fold of each user by internal id, int64 ``[users]``; folds differ by one user at most."""
    return np.random.default_rng([seed, FOLD_STREAM]).permutation(users) % folds


def without_fold(splits: dict[str, Any], fold_of: np.ndarray, fold: int) -> dict[str, Any]:
    """The splits with the training rows of the users of other folds alone; validation and test are as they were."""
    train = splits["train"]
    users = train.inter_feat[train.uid_field].numpy()
    part = train.copy(train.inter_feat[np.flatnonzero(fold_of[users] != fold)])
    rest = hashlib.sha256(fold_of.astype(np.int64).tobytes()).hexdigest()
    part.column_fingerprint = hashlib.sha256(f"{train.column_fingerprint} {rest} {fold}".encode()).hexdigest()
    part.splits = {**splits, "train": part}
    return part.splits


def obtain_fold_teachers(config: Config, splits: dict[str, Any], folds: int) -> tuple[list[Teacher], np.ndarray]:
    """Load or train a teacher for each fold, and who is in which.

    Args:
        config: of the model that has a teacher; all teachers have the settings of its own.
        splits: as they were given to the model's teacher.
        folds: how many, at least 2.
    """
    settings = teacher_config(config)
    fold_of = fold_of_users(splits["train"].user_num, folds, config["seed"])
    runs = (
        stock.train_or_load(settings, without_fold(splits, fold_of, fold), settings["teacher_training"])
        for fold in range(folds)
    )
    return [Teacher(run) for run in runs], fold_of
