"""Commands run by several processes, which are forks of one that has imported the library: ``python crew.py jobs.json``.

A job is a command, the number of its processes, and what is done to one of them (kill it, stop it) once a file is there.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Job:
    """A command.

    Attributes:
        words: of the command.
        folder: where it runs.
        processes: how many run it.
        disturbed: number of the process that gets a signal.
        by: name of the signal.
        once: pattern, in ``folder``, of a file; once one is there the signal is sent.
        words_of: further words of one process, by its number.
    """

    words: list[str]
    folder: str
    processes: int = 1
    disturbed: int | None = None
    by: str = "SIGKILL"
    once: str = ""
    words_of: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class Ended:
    """How a job ended: exit codes (negative: the signal), outputs and errors of its processes; seconds since the signal."""

    codes: list[int]
    outputs: list[str]
    errors: list[str]
    seconds: float


def run(jobs: list[Job], folder: Path, seconds: float = 300) -> list[Ended]:
    """Run jobs one after the other, in a process of their own: threads of libraries do not survive a fork."""
    file = folder / "jobs.json"
    file.write_text(json.dumps([asdict(job) for job in jobs]))
    done = subprocess.run([sys.executable, __file__, str(file)], capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr[-3000:]
    return [Ended(**entry) for entry in json.loads(done.stdout.splitlines()[-1])]


def _run(job: Job) -> dict[str, Any]:
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [_start(job, folder, rank, port) for rank in range(job.processes)]
    begun, codes, signalled = time.monotonic(), {}, job.disturbed is None
    while len(codes) < job.processes:
        if not signalled and any(folder.glob(job.once)):
            os.kill(children[job.disturbed], getattr(signal, job.by))
            begun, signalled = time.monotonic(), True
        for rank, child in enumerate(children):
            ended, status = os.waitpid(child, os.WNOHANG) if rank not in codes else (0, 0)
            if ended:
                codes[rank] = os.waitstatus_to_exitcode(status)
        if job.by == "SIGSTOP" and set(range(job.processes)) - set(codes) == {job.disturbed}:
            os.kill(children[job.disturbed], signal.SIGKILL)  # nobody waits for it any more
        time.sleep(0.02)
    seconds, ranks = time.monotonic() - begun, range(job.processes)
    outputs, errors = ([(folder / f"{name}{rank}").read_text(errors="replace") for rank in ranks] for name in ("out", "err"))
    return asdict(Ended([codes[rank] for rank in ranks], outputs, errors, seconds))


def _start(job: Job, folder: Path, rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.chdir(folder)
        for name, number in (("out", 1), ("err", 2)):
            os.dup2(os.open(f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
        if job.processes > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job.processes)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(job.processes)}
        from recbole_llm.cli import main

        code = main([*job.words, *job.words_of.get(str(rank), [])])
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as in a process that a launcher starts
    import recbole_llm.cli
    import recbole_llm.quick_start  # noqa: F401

    print(json.dumps([_run(Job(**entry)) for entry in json.loads(Path(sys.argv[1]).read_text())]))
