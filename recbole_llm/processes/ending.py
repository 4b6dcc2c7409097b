"""How a command ends that several processes ran: one of them says why, none is left waiting."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

from recbole_llm.processes import environment


def is_told_elsewhere() -> bool:
    """Whether another process says what went wrong."""
    if environment.size() == 1:
        return False
    group = _group()
    return not environment.is_first_of_machine() if group is None else group.told_elsewhere()


def lost_processes() -> str | None:
    """What is known of processes that were lost or failed; None: nothing."""
    group = _group()
    return None if group is None else group.lost_processes()


def leave(sentence: str | None, code: int, defect: BaseException | None = None) -> None:
    """Tell the other processes that this one ends, and with what it failed.

    Where it failed this does not return: what waits for a process that does not come keeps the interpreter from ending.

    Args:
        sentence: what it failed with; None: it did not.
        code: its exit code.
        defect: an error whose traceback is needed.
    """
    group = _group()
    if group is None or not group.leave(sentence, code) or sentence is None:
        return
    if defect is not None:
        traceback.print_exception(defect)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _group() -> Any:
    """The module of the processes that have met; None where they have not: it imports PyTorch, which takes seconds."""
    return sys.modules.get("recbole_llm.processes.group")
