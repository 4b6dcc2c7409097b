"""Command lines run in forks of one process that has imported the library, with limits and signals."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_LOGS: dict[int, list[subprocess.Popen]] = {}  # by process id: what writes its logs


class Ended(NamedTuple):
    """How a command ended: its exit code (negative: the signal; None: it was stopped for its time), output, seconds, and
    seconds of the processor, its own and those of the processes that it waited for."""

    code: int | None
    output: str
    errors: str
    seconds: float
    processor: float = 0.0

    @property
    def is_clean(self) -> bool:
        """Whether it ran, or was refused in one sentence."""
        if "Traceback (most recent call last)" in self.output + self.errors:
            return False
        return self.code == 0 or (self.code == 2 and ("Error:" in self.errors or "FAILED" in self.output))


def import_library() -> None:
    """Import once what every fork needs."""
    import transformers.models.llama.modeling_llama  # noqa: F401, of the tiny LLM

    import recbole_llm.cli
    import recbole_llm.config.help
    import recbole_llm.quick_start
    import recbole_llm.results.files
    import recbole_llm.results.table  # noqa: F401


def start(
    words: Sequence[str],
    folder: Path,
    logs: Path,
    memory: int | None = None,
    file_size: int | None = None,
    processor: int | None = None,
) -> int:
    """Begin ``recbole-llm words`` in ``folder``; its output goes to ``logs/out`` and ``logs/err``. Returns the process id.

    Args:
        memory: most bytes of address space.
        file_size: most bytes of a file that it writes: a full disk that needs no disk.
        processor: most seconds of the processor, which other programs' work does not use up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    logs.mkdir(parents=True, exist_ok=True)
    writers = [_log_writer(logs / name) for name in ("out", "err")]
    child = os.fork()
    if child:
        for writer in writers:
            writer.stdin.close()
        _LOGS[child] = writers
        return child
    code = 70
    try:
        os.setsid()
        for writer, number in zip(writers, (1, 2), strict=True):
            os.dup2(writer.stdin.fileno(), number)
            writer.stdin.close()
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # pytest has its own
        os.chdir(folder)
        if memory is not None:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        if processor is not None:
            resource.setrlimit(resource.RLIMIT_CPU, (processor, processor + 5))
        if file_size is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
        from recbole_llm.cli import main

        code = main(list(words))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                pass
        os._exit(code & 255)


def _log_writer(file: Path) -> subprocess.Popen:
    """A process that writes what it is sent to a log: its file must not count among those that a limit is set for."""
    with open(file, "wb") as output:
        return subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=output)


def kill(child: int) -> None:
    """End a process of :func:`start` by SIGKILL, with all that it began."""
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    _finish_logs(child)


def _finish_logs(child: int) -> None:
    for writer in _LOGS.pop(child, ()):
        writer.wait()


def wait(child: int, logs: Path, seconds: float) -> Ended:
    """Wait for a process of :func:`start`; it is killed after ``seconds``."""
    started, code, processor = time.monotonic(), None, seconds
    while time.monotonic() - started < seconds:
        pid, status, used = os.wait4(child, os.WNOHANG)
        if pid:
            code, processor = os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
            break
        time.sleep(0.005)
    else:
        kill(child)
    if code == -signal.SIGXCPU:
        code = None
    _finish_logs(child)
    texts = [(logs / name).read_text(errors="replace") if (logs / name).exists() else "" for name in ("out", "err")]
    return Ended(code, *texts, time.monotonic() - started, processor)


def run(words: Sequence[str], folder: Path, logs: Path, seconds: float = 600, **limits: int | None) -> Ended:
    """:func:`start` and :func:`wait`."""
    return wait(start(words, folder, logs, **limits), logs, seconds)
