"""Settings handed to a room as a dataclass."""

from __future__ import annotations

from dataclasses import dataclass, field

from recbole_llm.config.settings import select


@dataclass(frozen=True)
class Loss:
    beta: float
    spread: float = field(metadata={"key": "temperature"})
    missing: int | None = None


def test_fields_are_keys():
    assert select(Loss, {"beta": 0.4, "temperature": 2.0, "other": 1}) == Loss(beta=0.4, spread=2.0, missing=None)
