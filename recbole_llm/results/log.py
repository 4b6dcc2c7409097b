"""Where a run's messages go: a console that stays readable, one log file and one run of the trackers for each run.

Messages from before a run's name is known (checks, data, the LLM, the teacher) wait, and stand at the beginning of its log.
"""

from __future__ import annotations

import logging
import re
import shutil
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from logging import getLogger
from pathlib import Path
from typing import Any

import colorlog
import yaml
from recbole.utils.logger import log_colors_config
from torch.utils.tensorboard import SummaryWriter

from recbole_llm.errors import UserError, first_line, is_full_disk, printable, printable_lines
from recbole_llm.files import regular_file
from recbole_llm.processes import group as processes
from recbole_llm.results.mlflow_tracker import log_metrics, mlflow_run

LOGS, TENSORBOARD = Path("log"), Path("log_tensorboard")
FILE_ONLY = {"file_only": True}  # ``extra`` of a message that is for the log file alone

_LONG_NUMBER = re.compile(r"(?<![\w.])-?\d+\.\d{5,}(?:e[-+]?\d+)?")
_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_COLORED = re.compile(r"(\x1b\[[01];3\dm)([^\x1b]*)(\x1b\[0m)")  # as RecBole colors a word
_OF_RECBOLE = (
    (re.compile(r"(epoch \d+) evaluating"), r"\1 validation"),
    (re.compile(r"valid_score"), "score"),
    (re.compile(r"valid result"), "validation result"),
)


def decimals(values: Mapping[str, float]) -> str:
    """Metrics for a message: names and four decimals."""
    return ", ".join(f"{name}: {value:.4f}" for name, value in values.items())


def readable(message: str) -> str:
    """A message in printable lines, with the words that RecBole colors."""
    parts = _COLORED.split(message)  # text, color, word, end of the color, text, ...
    return "".join(part if place % 4 in (1, 3) else printable_lines(part) for place, part in enumerate(parts))


class Readable(logging.Filter):
    """Nothing in a message steers the terminal: a word that is colored, and not more, stays so. Metrics in the messages of
    RecBole's trainers get four decimals, and those of validations say that they are."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record; it passes."""
        folders = Path(record.pathname).parts[-3:-1]
        if folders in (("recbole", "trainer"), ("recbole", "quick_start")) and isinstance(record.msg, str):
            text = record.msg
            for pattern, replacement in _OF_RECBOLE:
                text = pattern.sub(replacement, text)
            record.msg = _LONG_NUMBER.sub(lambda match: f"{float(match[0]):.4f}", text)
        record.msg, record.args = readable(record.getMessage()), ()
        if record.exc_info:
            record.exc_text = printable_lines(logging.Formatter().formatException(record.exc_info))
        return True


class _Console(Readable):
    """Leaves out what is for the log file alone."""

    def filter(self, record: logging.LogRecord) -> bool:
        return super().filter(record) and not getattr(record, "file_only", False)


class _Uncolored(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _COLOR.sub("", super().format(record))


class _LogFile(logging.FileHandler):
    """A log file that ends where the disk is full: the console is told once, and the run goes on."""

    is_ended = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self.is_ended:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        error = sys.exc_info()[1]
        if error is None or not is_full_disk(error):
            super().handleError(record)
            return
        self.is_ended = True
        stream, self.stream = self.stream, None
        if stream is not None:
            with suppress(OSError):  # what it could not write
                stream.close()
        getLogger().warning(f"{self.baseFilename} ends here, for there is no room left on its disk ({first_line(error)})")


class _Waiting(logging.Handler):
    """Keeps messages for the log files that are opened later."""

    def __init__(self) -> None:
        super().__init__()
        self.records: deque[logging.LogRecord] = deque(maxlen=10_000)
        self.kept = 0
        self.given: set[Path] = set()  # files that have them

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        copy = logging.LogRecord(record.name, record.levelno, record.pathname, record.lineno, text, None, None)
        copy.created = record.created
        self.records.append(copy)


def start_console(level: str | None) -> None:
    """Send messages to the console, and keep them for log files of runs to come; of several processes, the main one's."""
    root = getLogger()
    for handler in root.handlers[:]:
        root.removeHandler(handler)
    if not processes.is_main():
        root.addHandler(logging.NullHandler())
        return
    for folder in (LOGS, TENSORBOARD):
        folder.mkdir(parents=True, exist_ok=True)  # or say so before anything is trained
    number = getattr(logging, str(level or "info").upper(), logging.INFO)
    console = logging.StreamHandler()
    form = "%(log_color)s%(asctime)-15s %(levelname)s  %(message)s"
    console.setFormatter(colorlog.ColoredFormatter(form, "%d %b %H:%M", log_colors=log_colors_config))
    console.addFilter(_Console())
    for handler in (console, _Waiting()):
        root.addHandler(handler)
    root.setLevel(number)
    getLogger("transformers").setLevel(logging.ERROR)


def mark() -> None:
    """From here on, messages are of one run: :func:`rewind` forgets them, those before are of all runs."""
    for waiting in _all_waiting():
        waiting.kept = len(waiting.records)


def rewind() -> None:
    """Forget the messages of the last run."""
    for waiting in _all_waiting():
        while len(waiting.records) > waiting.kept:
            waiting.records.pop()


def _all_waiting() -> list[_Waiting]:
    return [handler for handler in getLogger().handlers if isinstance(handler, _Waiting)]


@contextmanager
def run_log(model: str, name: str, fresh: bool = False) -> Iterator[Path]:
    """Within the context, messages go to ``log/<model>/<name>.log`` as well, after those that waited.

    RecBole's trainers that are made within it write to ``log_tensorboard/<name>``. A run that goes on appends to both; a
    ``fresh`` one begins both anew, where it is first opened in a comparison.
    """
    root = getLogger()
    file = LOGS / model / f"{_plain_name(name)}.log"
    if not processes.is_main():
        yield file
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    regular_file(file)  # a device or a pipe would take the messages, or wait for a reader
    if fresh and not any(file in waiting.given for waiting in _all_waiting()):
        file.unlink(missing_ok=True)
        shutil.rmtree(TENSORBOARD / _plain_name(name), ignore_errors=True)
    handler = _LogFile(file, encoding="utf-8")
    handler.setFormatter(_Uncolored("%(asctime)-15s %(levelname)s  %(message)s", "%a %d %b %Y %H:%M:%S"))
    handler.addFilter(Readable())
    for waiting in _all_waiting():
        for record in list(waiting.records) if file not in waiting.given else ():
            handler.handle(record)
        waiting.given.add(file)
    root.handlers.insert(0, handler)  # RecBole names its TensorBoard folder after the first
    try:
        with _full_disks_of_threads_untold():
            yield file
    finally:
        root.removeHandler(handler)
        handler.close()


@contextmanager
def _full_disks_of_threads_untold() -> Iterator[None]:
    """TensorBoard's thread prints its traceback where the disk is full; the next message to it raises the same error here."""
    told = threading.excepthook

    def hook(arguments: Any) -> None:
        if arguments.exc_value is None or not is_full_disk(arguments.exc_value):
            told(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = told


def log_to_files(lines: str, level: int = logging.ERROR) -> None:
    """Write a message to the log files alone."""
    record = logging.LogRecord("recbole_llm", level, __file__, 0, lines, None, None)
    for handler in getLogger().handlers:
        if isinstance(handler, (logging.FileHandler, _Waiting)):
            handler.handle(record)


# --- trackers --------------------------------------------------------------------------------------------------------


_TRACKERS = {"log_wandb": "wandb", "log_mlflow": "mlflow"}
_WANDB_IDS: dict[str, str] = {}  # of the runs that this process opened, by their names


def check_trackers(settings: Any) -> None:
    """Refuse to log to a tracker without its package.

    Args:
        settings: with ``log_wandb`` and ``log_mlflow``.

    Raises:
        UserError: it is not installed.
    """
    for key, package in _TRACKERS.items():
        if settings[key] and package not in sys.modules and find_spec(package) is None:
            extra = "tracking" if package == "wandb" else package
            raise UserError(
                f"{key}: {package} is not installed: pip install 'recbole-llm[{extra}]', or leave the key False."
            )


@contextmanager
def tracked(name: str, settings: Mapping[str, Any]) -> Iterator[None]:
    """Within the context, a run of Weights & Biases and one of MLflow are open under ``name`` where the settings ask for them.

    One that is open already, a sweep's or the caller's own, is used instead. A name that comes again goes on with its run.

    Args:
        name: of the run.
        settings: all of them, plain.
    """
    with ExitStack() as opened:
        if settings.get("log_wandb") and processes.is_main():
            opened.enter_context(_wandb_run(name, settings))
        if settings.get("log_mlflow") and processes.is_main():
            opened.enter_context(mlflow_run(name, settings))
        yield


@contextmanager
def _wandb_run(name: str, settings: Mapping[str, Any]) -> Iterator[None]:
    import wandb  # heavy, and of an extra

    if wandb.run is not None:
        yield
        return
    known: dict[str, Any] = {}
    if name in _WANDB_IDS and not settings.get("fresh"):
        known = {"id": _WANDB_IDS[name], "resume": "allow"}
    run = wandb.init(project=settings.get("wandb_project"), name=printable(name, None), config=dict(settings), **known)
    _WANDB_IDS[name] = run.id
    try:
        yield
    except BaseException:
        wandb.finish(exit_code=1)
        raise
    wandb.finish()


@contextmanager
def main_writes() -> Iterator[None]:
    """Within the context, RecBole's trainers of the main process alone open a TensorBoard file."""
    if processes.is_main():
        yield
        return
    from recbole.trainer import trainer  # where its trainers look for it

    opened = trainer.get_tensorboard
    trainer.get_tensorboard = lambda _logger: _NoWriter()
    try:
        yield
    finally:
        trainer.get_tensorboard = opened


class _NoWriter:
    """In the place of a TensorBoard writer: writes nothing."""

    def add_scalar(self, *_: Any) -> None:
        """Write nothing."""

    add_hparams = add_scalar

    def close(self) -> None:
        """There is nothing to close."""


def note_settings(name: str, settings: Mapping[str, Any], backbone: Mapping[str, Any] | None = None) -> None:
    """Write all settings to the log file and to TensorBoard, and what the LLM is to the log file."""
    if not processes.is_main():
        return
    text = yaml.safe_dump(dict(settings), allow_unicode=True)
    log_to_files(f"Settings of {name}:\n{text}", logging.INFO)
    if backbone is not None:
        log_to_files(f"LLM: {dict(backbone)}", logging.INFO)
    with SummaryWriter(str(TENSORBOARD / _plain_name(name))) as writer:
        writer.add_text("settings", "".join(f"    {line}\n" for line in text.splitlines()), 0)


def note_result(name: str, settings: Mapping[str, Any], metrics: Mapping[str, float], step: int) -> None:
    """Write the metrics of the test to TensorBoard, and to the open runs of the other trackers."""
    if not processes.is_main():
        return
    with SummaryWriter(str(TENSORBOARD / _plain_name(name))) as writer:
        for metric, value in metrics.items():
            writer.add_scalar(f"Test/{metric}", value, step)
    wandb = sys.modules.get("wandb")
    if settings.get("log_wandb") and wandb is not None and wandb.run is not None:
        for metric, value in metrics.items():
            wandb.run.summary[f"test/{metric}"] = value
    if settings.get("log_mlflow"):
        log_metrics(metrics, "test")


def _plain_name(name: str) -> str:
    """A name for a file: RecBole takes what stands before the first point."""
    return re.sub(r"[^\w+-]", "_", name)
