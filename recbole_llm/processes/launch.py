"""Start several processes of a command, as torchrun does, from RecBole's keys ``nproc``, ``world_size``, ``ip``, ``port`` and
``group_offset``."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from recbole_llm.errors import UserError
from recbole_llm.processes import environment

KEYS = ("nproc", "world_size", "ip", "port", "group_offset")


def is_asked(settings: Mapping[str, Any]) -> bool:
    """Whether ``settings`` ask for several processes, and nobody has started them yet.

    Raises:
        UserError: a number that makes no sense.
    """
    if environment.size() > 1:
        return False
    return max(_number(settings, "nproc"), _number(settings, "world_size")) > 1


def launch(command: Sequence[str], settings: Mapping[str, Any]) -> int:
    """Run ``python -m recbole_llm`` with the words ``command`` in several processes; the exit code of the first that failed.

    Args:
        command: the words of the command, the keys of processes among them or not.
        settings: ``nproc`` processes on this machine of ``world_size`` on all machines, ``group_offset`` of which run on
            machines before this one; ``ip`` and ``port`` of the first machine.

    Raises:
        UserError: numbers that do not fit together, or machines that did not come.
    """
    nproc, total = _number(settings, "nproc"), max(_number(settings, "nproc"), _number(settings, "world_size"))
    offset = _number(settings, "group_offset", least=0)
    if total % nproc or offset % nproc or offset >= total:
        raise UserError(
            f"world_size {total}, nproc {nproc} and group_offset {offset} do not fit together: each machine runs nproc "
            f"processes, and group_offset is how many run on the machines before it."
        )
    machines = total // nproc
    if machines > 1 and not (settings.get("ip") and settings.get("port")):
        raise UserError("world_size: several machines meet at the first one: give its ip and a free port to all of them.")
    address = str(settings.get("ip") or "127.0.0.1") if machines > 1 else "127.0.0.1"
    port = int(settings.get("port") or 0) or _free_port()

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # heavy
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes have said what was wrong
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    config = LaunchConfig(
        min_nodes=machines,
        max_nodes=machines,
        nproc_per_node=nproc,
        run_id="recbole-llm",
        rdzv_backend="static",
        rdzv_endpoint=f"{address}:{port}",
        rdzv_configs={"rank": offset // nproc, "timeout": 900},
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "recbole_llm", *_without_keys(command))
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        return next((code for code in codes if code > 0), 1)
    return 0


def _without_keys(words: Sequence[str]) -> list[str]:
    """The words without the keys of processes and their values."""
    kept, skips = [], False
    for word in words:
        if skips and not word.startswith("--"):
            skips = False
            continue
        name, has_value, _ = word.removeprefix("--").partition("=")
        skips = word.startswith("--") and name in KEYS and not has_value
        if not (word.startswith("--") and name in KEYS):
            kept.append(word)
    return kept


def _number(settings: Mapping[str, Any], key: str, least: int = 1) -> int:
    value = settings.get(key)
    if value is None:
        return least
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{key}: {value!r} is no whole number from {least}.")
    return value


def _free_port() -> int:
    with socket.socket() as here:
        here.bind(("127.0.0.1", 0))
        return here.getsockname()[1]
