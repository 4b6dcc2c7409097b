"""What a server takes, and how long it waits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from recbole_llm.errors import UserError


@dataclass(frozen=True)
class Limits:
    """Limits of a server; each field is the command's key of the same name.

    Attributes:
        max_history: the most items of a history in a question. (The model reads the latest that its settings say.)
        max_topk: the most items of an answer.
        max_body: the most bytes of a question.
        max_queue: questions that wait; a further one is refused.
        max_seconds: what a question may take, from its first byte to its answer.
        max_batch: questions that are answered together.
        batch_milliseconds: how long the first of a batch waits for others.
    """

    max_history: int = 500
    max_topk: int = 100
    max_body: int = 65_536
    max_queue: int = 256
    max_seconds: float = 30.0
    max_batch: int = 32
    batch_milliseconds: float = 3.0

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Limits:
        """Read them from a command's settings.

        Raises:
            UserError: a value that is no number, or too small.
        """
        values = {}
        for field in fields(cls):
            value = settings.get(field.name, field.default)
            kinds: tuple[type, ...] = (int,) if isinstance(field.default, int) else (int, float)
            least = 0 if field.name == "batch_milliseconds" else 1
            if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value < 1e9:
                what = "a whole number" if kinds == (int,) else "a number"
                raise UserError(f"{field.name} is {value!r}: give {what} from {least} on.")
            values[field.name] = value
        return cls(**values)
