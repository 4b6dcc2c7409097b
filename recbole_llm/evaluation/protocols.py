"""The evaluation protocol of a run, as its settings describe it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from recbole_llm.config.settings import select
from recbole_llm.errors import UserError


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation, by the keys of the same names.

    Attributes:
        eval_args: split, order and mode; of these the mode is read.
        candidate_sampling: ``non_interacted`` or ``recbole``; None: ``non_interacted``.
        candidates_file: of the test, see :mod:`recbole_llm.evaluation.candidates_file`; None: candidates are drawn.
        metrics: names of RecBole's metrics.
        topk: cut-offs.
        seed: of the candidates, of ties and of the rows that are validated.
        like_threshold: ratings above it are likes.
        rating_field: the field of the ratings.
        valid_users, valid_items: how many users, and items for their candidates, a validation takes; None: all.
        eval_batch_rows: rows per call of the model; None: the caller's choice.
    """

    eval_args: Mapping[str, Any]
    candidate_sampling: str | None
    candidates_file: str | None
    metrics: Sequence[str]
    topk: Sequence[int]
    seed: int
    like_threshold: float | None
    rating_field: str | None = field(metadata={"key": "RATING_FIELD"})
    valid_users: int | None
    valid_items: int | None
    eval_batch_rows: int | None

    @classmethod
    def of_config(cls, config: Any) -> EvaluationSettings:
        """Read them from a RecBole Config or a mapping."""
        return select(cls, config)

    @property
    def sampling(self) -> str:
        """How candidates are sampled."""
        return self.candidate_sampling or "non_interacted"

    def mode(self, phase: str) -> str:
        """``uniN``, ``popN``, ``full`` or ``labeled``, for ``valid`` or ``test``."""
        mode = self.eval_args["mode"]
        return str(mode[phase] if isinstance(mode, Mapping) else mode)


def evaluation_mode(settings: EvaluationSettings, phase: str) -> tuple[str, int] | None:
    """Return how candidates are drawn and how many (``("uniform", 99)`` for ``uni99``), or None for ``full``.

    Raises:
        UserError: RecBole's other modes.
    """
    mode = settings.mode(phase)
    if mode == "full":
        return None
    match = re.fullmatch(r"(uni|pop)([1-9][0-9]*)", mode)
    if match is None:
        raise UserError(f"eval_args: mode '{mode}' ({phase}) is not supported; use uniN, for example uni99, or full.")
    return {"uni": "uniform", "pop": "popularity"}[match[1]], int(match[2])
