"""What a run was made of and made on: settings, command, versions, source, data, machine, memory."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import torch

from recbole_llm._version import __version__
from recbole_llm.evaluation.evaluate import LabelResult, RankingResult
from recbole_llm.processes import group as processes
from recbole_llm.results.run import add_test, plain, record_under, row_of, write_run

PACKAGES = ("recbole", "torch", "transformers", "peft", "numpy")


def now() -> str:
    """This moment, ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def keep_run(
    folder: Path,
    config: Any,
    split: Any,
    ranking: RankingResult | LabelResult,
    curve: list[dict[str, Any]],
    *,
    fingerprint: str,
    started: str | None,
    train_seconds: float,
    valid: Mapping[str, float] | None,
    trained_parameters: int,
    memory: PeakMemory,
    backbone: Mapping[str, Any] | None = None,
    teacher: Mapping[str, Any] | None = None,
    write: bool = True,
) -> dict[str, Any]:
    """Put the record of a run together, with the result of its test, and write it to its folder.

    Args:
        folder: of the run.
        config: its configuration.
        split: a split of its data.
        ranking: of the test.
        curve: of its training.
        fingerprint: of the data as the model reads them.
        started: when its training began; None where that is not known.
        train_seconds: what it took.
        valid: metrics at the chosen step.
        trained_parameters: how many numbers were trained.
        memory: measured since the run began.
        backbone: identity of its LLM.
        teacher: ``model`` and ``folder``.
        write: False where the folder belongs to others.

    Returns:
        the row of :mod:`recbole_llm.results.table`.
    """
    settings, changed = settings_of(config)
    record = {
        "model": config["model"],
        "dataset": config["dataset"],
        "protocol": config["protocol"],
        "seed": config["seed"],
        "settings": settings,
        "changed": changed,
        "command": command(),
        "versions": versions(),
        "git": git_state(),
        "data": {
            "fingerprint": fingerprint,
            "users": split.user_num - 1,
            "items": split.item_num - 1,
            "interactions": split.interactions,
        },
        "backbone": backbone,
        "teacher": teacher,
        "machine": machine(torch.device(config["device"])),
        "started": started,
        "finished": now(),
        "seconds": {"train": train_seconds, "evaluate": ranking.seconds},
        "peak_memory_bytes": memory.peak(),
        "trained_parameters": trained_parameters,
        "users": len(ranking.rows),
        "test_set": ranking.test_set,
        "valid_metric": config["valid_metric"],
        "metrics": {"valid": dict(valid or {}), "test": dict(ranking.metrics)},
        "tests": {},
    }
    columns: dict[str, Any]
    if isinstance(ranking, RankingResult):
        columns = {"ranks": ranking.ranks}
    else:
        columns = {"labels": ranking.labels, "values": ranking.values}
    if write:
        record = write_run(folder, record, curve, ranking.user_ids, **columns).record
    row = {**row_of(record), "metrics": dict(ranking.metrics), "checkpoint": str(folder)}
    return {**row, "user_ids": ranking.user_ids, **columns}


def keep_test(row: Mapping[str, Any], config: Any, ranking: RankingResult, write: bool = True) -> dict[str, Any]:
    """Add the test of a trained model under a further protocol to its run.

    Args:
        row: of the run, as :func:`keep_run` returned it.
        config: of the test, see :func:`recbole_llm.config.protocols.under_protocols`.
        ranking: its result.
        write: False where the folder belongs to others.

    Returns:
        the row of :mod:`recbole_llm.results.table` under that protocol.
    """
    protocol, settings = config["protocol"], plain(config.final_config_dict)
    test = {
        "settings": {name: value for name, value in settings.items() if row["record"]["settings"].get(name) != value},
        "finished": now(),
        "seconds": ranking.seconds,
        "users": len(ranking.rows),
        "test_set": ranking.test_set,
        "valid_metric": config["valid_metric"],
        "metrics": plain(dict(ranking.metrics)),
    }
    if write:
        record = add_test(row["checkpoint"], protocol, test, ranking.user_ids, ranks=ranking.ranks).record
    else:
        record = record_under({**row["record"], "tests": {protocol: test}}, protocol)
    found = {**row_of(record), "metrics": dict(ranking.metrics), "checkpoint": row["checkpoint"]}
    return {**found, "user_ids": ranking.user_ids, "ranks": ranking.ranks}


def settings_of(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """All resolved settings of a configuration as plain values, and those that were set to something else than the default."""
    settings = plain(dict(sorted(config.final_config_dict.items())))
    defaults = plain(config.internal_config_dict)
    given = config.external_config_dict
    changed = {
        name: value for name, value in settings.items() if name in given and (name not in defaults or defaults[name] != value)
    }
    return settings, {name: value for name, value in changed.items() if name not in ("model", "dataset")}


def command() -> str:
    """The command line of this process, as the shell takes it."""
    program, *words = sys.argv or ["python"]
    name = Path(program).name
    shown = ["python", "-m", Path(program).parent.name] if name == "__main__.py" else [name]
    return shlex.join([*(["python", *shown] if name.endswith(".py") and name != "__main__.py" else shown), *words])


@lru_cache(maxsize=1)
def versions() -> dict[str, str | None]:
    """The versions of this library, of those that results depend on, and of Python."""
    found: dict[str, str | None] = {"recbole_llm": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return {**found, "python": platform.python_version()}


@lru_cache(maxsize=1)
def git_state() -> dict[str, Any] | None:
    """Commit and state of the working folder where it is a git repository; looked up once in a process."""
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return None
    return {"commit": commit.strip(), "dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}


def _git(*words: str) -> str | None:
    try:
        # No program that the repository's own settings name is run.
        ended = subprocess.run(
            ["git", "-c", "core.fsmonitor=false", *words], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return ended.stdout


def machine(device: torch.device) -> dict[str, Any]:
    """The machine, and the GPU where ``device`` is one."""
    return {
        "platform": platform.platform(),
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "processes": processes.size(),
    }


@lru_cache(maxsize=1)
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.processor() or platform.machine()


class PeakMemory:
    """The most memory that this process holds from now on.

    On Linux the kernel's mark is set back, so that an earlier run in the same process does not count. Elsewhere, and where
    that is not allowed, the mark is that of the process.
    """

    def __init__(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> dict[str, int | None]:
        """Bytes: ``cpu``, the resident memory, and ``gpu``, what PyTorch held there, or None."""
        used_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
        return {"cpu": _resident_peak(), "gpu": torch.cuda.max_memory_allocated() if used_gpu else None}


def _resident_peak() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration, ValueError, IndexError):
        pass
    try:
        import resource  # not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    except ImportError:
        return None
