"""The processes of a run: who they are, what the first one decides, and what happens where one fails.

All processes run the same program on the same data with the same seed: they draw the same batches, negatives and candidates.
The work of the LLM is shared (:mod:`recbole_llm.processes.tensors`); files, log and console belong to the first process, the
main one. With one process every function here does nothing, or what its name says.
"""

from __future__ import annotations

import atexit
import json
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from recbole_llm.errors import UserError, first_line, sentence_for
from recbole_llm.processes import environment
from recbole_llm.processes.watch import GO_ON, PeerError, Watch

_POLL = 0.1  # seconds between two looks at what the main process decided
_SAME_MISTAKE = 30.0  # seconds in which all processes find the same mistake, or one has failed by itself


@dataclass
class Group:
    """The processes that were launched together."""

    rank: int
    size: int
    timeout: float
    store: Any
    watch: Watch


_group: Group | None = None
_alone = False


def start(cpu: bool, timeout: float) -> None:
    """Meet the other processes that were launched with this one; nothing where there are none, or they have met before.

    Args:
        cpu: whether to compute on CPU (gloo); else each process takes the GPU of its number on its machine (nccl).
        timeout: seconds after which a process that is silent counts as lost.

    Raises:
        UserError: not all processes came.
    """
    global _group
    if environment.size() == 1 or _group is not None:
        return
    from accelerate import PartialState  # heavy, and of use to several processes alone

    rank, size = environment.rank(), environment.size()
    gpu = not cpu and torch.cuda.is_available()
    if gpu and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
        raise UserError(f"nproc: this machine has {torch.cuda.device_count()} GPUs; start as many processes, or fewer, on it.")
    store = _meet(rank, size, timeout)
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    watch = Watch(distributed.PrefixStore("run", store), rank, size, timeout, kept_by_main=not agent)
    distributed.init_process_group(
        "nccl" if gpu else "gloo",
        store=distributed.PrefixStore("group", store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=2 * timeout + 60),  # the watch is to speak first
    )
    with warnings.catch_warnings():  # that it sets the number of threads
        warnings.simplefilter("ignore")
        PartialState(cpu=not gpu)  # the device and the threads of this process
    _group = Group(rank, size, timeout, distributed.PrefixStore("run", store), watch)
    atexit.register(leave)


def _meet(rank: int, size: int, timeout: float) -> Any:
    """The store of the launcher, or of rank 0, once all processes have said that they are there."""
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29500"))
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    begun = time.monotonic()
    try:
        store = distributed.TCPStore(
            address,
            port,
            is_master=rank == 0 and not agent,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,
        )
        store.set(f"here/{rank}", "")
        while missing := [other for other in range(size) if not store.check([f"here/{other}"])]:
            if time.monotonic() - begun > timeout:
                names = ", ".join(map(str, missing))
                raise UserError(f"process {names} of {size} did not come within {timeout:g} s (process_timeout): start it too.")
            time.sleep(_POLL)
    except (distributed.DistError, RuntimeError) as error:
        raise UserError(
            f"process {rank} does not reach the first process at {address}:{port} ({first_line(error)}): check the address and "
            f"the port."
        ) from None
    return store


def check_started() -> None:
    """Refuse to work apart where several processes were launched together and have not met.

    Raises:
        UserError: they have not.
    """
    if environment.size() > 1 and _group is None:
        raise UserError(
            f"{environment.size()} processes were launched together, and this way of running a model is for one: start "
            f"run_recbole_llm.py by torchrun, or call recbole_llm.compare."
        )


def size() -> int:
    """How many processes share the work here: 1 where there is one, and within :func:`main_first`."""
    return 1 if _group is None or _alone else _group.size


def rank() -> int:
    """Number of this process, from 0."""
    return 0 if _group is None else _group.rank


def is_main() -> bool:
    """Whether this process writes files, logs and prints."""
    return rank() == 0


def told_elsewhere() -> bool:
    """Whether another process says what went wrong."""
    return not environment.is_first_of_machine() if _group is None else not _group.watch.speaks()


def joined() -> Group:
    """The processes that have met."""
    assert _group is not None
    return _group


# What the main process decides


def decide(value: Any = None) -> Any:
    """The main process's ``value``, ready for JSON, in all processes: what it found in files, say. The others wait for it."""
    if size() == 1:
        return value
    group = joined()
    meeting = group.watch.arrive()
    key = f"decided/{meeting}"
    if group.rank == 0:
        group.store.set(key, json.dumps(value))
        return value
    return json.loads(_wait_for(key, meeting))


def agree(what: str, value: str) -> None:
    """Check that a value is that of the main process.

    Raises:
        UserError: it is not.
    """
    expected = decide(value)
    if value != expected:
        raise UserError(f"{what} of process {rank()} is {value}, and {expected} of process 0: give all processes the same.")


@contextmanager
def main_first() -> Iterator[None]:
    """Let the main process run the body first while the others wait, as long as it takes; then these find what it made.

    Within the body each process is alone: nothing is shared.
    """
    global _alone
    if size() == 1:
        yield
        return
    group = joined()
    meeting = group.watch.arrive()
    key = f"made/{meeting}"
    if group.rank != 0:
        _raise_if_failed(_wait_for(key, meeting))
    _alone = True
    try:
        yield
    except UserError as error:
        if group.rank == 0:  # the others make the same mistake
            group.store.set(key, json.dumps(str(error)))
        raise
    finally:
        _alone = False
    if group.rank == 0:
        group.store.set(key, json.dumps(None))


@contextmanager
def main_only(context: AbstractContextManager) -> Iterator[None]:
    """Have the main process enter ``context`` while the others wait until it has."""
    if size() == 1:
        with context:
            yield
        return
    group = joined()
    meeting = group.watch.arrive()
    key = f"entered/{meeting}"
    if group.rank != 0:
        _raise_if_failed(_wait_for(key, meeting))
        yield
        return
    entered = False
    try:
        with context:
            entered = True
            group.store.set(key, json.dumps(None))
            yield
    except UserError as error:
        if not entered:
            group.store.set(key, json.dumps(str(error)))
        raise


def _raise_if_failed(text: str) -> None:
    sentence = json.loads(text)
    if sentence is not None:
        raise UserError(sentence)


def _wait_for(key: str, meeting: int) -> str:
    group, begun = joined(), time.monotonic()
    while True:
        found = group.watch.ask(key)
        if found is not None:
            return found
        group.watch.check(meeting, begun, patient=True)
        time.sleep(_POLL)


# Where something fails


def wait(work: distributed.Work, meeting: int) -> None:
    """Wait for a collective operation, or until it is known that it cannot end.

    Raises:
        PeerError: another process failed or was lost.
    """
    watch, begun, pause, turns = joined().watch, time.monotonic(), 0.0, 0
    while not work.is_completed():
        turns += 1
        if turns % 64 == 0:
            watch.check(meeting, begun)
            pause = min(1e-3, pause + 1e-4)
        time.sleep(pause)
    try:
        work.wait()
    except RuntimeError as error:
        explain(error, meeting)


def explain(error: RuntimeError, meeting: int) -> None:
    """Say which process is behind a broken connection.

    Raises:
        PeerError: always.
    """
    watch, begun = joined().watch, time.monotonic()
    while time.monotonic() - begun < 5:
        watch.check(meeting, begun, patient=True)
        time.sleep(_POLL)
    raise PeerError(f"the connection to another process broke ({first_line(error)}): {GO_ON}.") from error


def fail_together(error: Exception) -> None:
    """Tell the others of an error; return where all of them made the same mistake, so that all go on with the next model.

    Raises:
        Exception: ``error``, where this process alone made it: the run ends.
    """
    if size() == 1:
        return
    watch = joined().watch
    if isinstance(error, PeerError):
        raise error
    sentence = sentence_for(error)
    watch.fail(sentence or f"{type(error).__name__}: {first_line(error)}", 1 if sentence is None else 2)
    begun = time.monotonic()
    while watch.all_failed(watch.failures) is None and time.monotonic() - begun < min(_SAME_MISTAKE, joined().timeout):
        time.sleep(_POLL)
    if not watch.all_failed(watch.failures):
        raise error
    watch.recover()


def lost_processes() -> str | None:
    """What is known of lost processes, or of one that failed; None: nothing."""
    if _group is None:
        return None
    _group.watch.look()
    try:
        _group.watch.check(2**62, time.monotonic(), patient=True)
    except PeerError as error:
        return str(error)
    return None


def leave(sentence: str | None = None, code: int = 0) -> bool:
    """Tell the others that this process ends, with what it failed with, and wait for a moment until they know.

    Returns:
        whether there were others.
    """
    global _group
    if _group is None:
        return False
    group, _group = _group, None
    atexit.unregister(leave)
    if sentence is not None:
        group.watch.fail(sentence, code)
    group.watch.end()
    if sentence is None:
        distributed.destroy_process_group()
    return True
