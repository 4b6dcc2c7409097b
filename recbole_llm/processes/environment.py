"""What a launcher (torchrun, accelerate launch) says of this process, without PyTorch."""

from __future__ import annotations

import os


def size() -> int:
    """How many processes were launched together; 1 where none was launched so."""
    return max(1, _number("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def rank() -> int:
    """Number of this process among them, from 0."""
    return _number("RANK", 0) if size() > 1 else 0


def is_first_of_machine() -> bool:
    """Whether this is the process of its machine that may speak before the processes know each other."""
    return size() == 1 or _number("LOCAL_RANK", 0) == 0


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default
