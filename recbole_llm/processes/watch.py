"""Signs of life: how the processes of a run notice that one was killed, hangs or failed.

A thread of each process writes every second into the launcher's store where the process is, and reads of the others. A process
that waits for the others asks what is known of them, so that it ends with a sentence instead of waiting for ever.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil

from recbole_llm.errors import UserError

_LAST_WORDS = 10.0  # seconds that a process stays at the end, so that the others learn of it
GO_ON = "what was trained is kept, and the same command with --resume=True goes on"


class PeerError(UserError):
    """Another process failed or was lost, so that this one cannot go on.

    Attributes:
        code: exit code: 2 where the other one's user made a mistake, else 1.
    """

    def __init__(self, sentence: str, code: int = 1) -> None:
        super().__init__(sentence)
        self.code = code


@dataclass
class Peer:
    """What is known of another process.

    Attributes:
        rank: its number.
        name: the number with process id and machine, for a sentence.
        place: its machine and name space of process ids; ids of another place say nothing here.
        pid: its process id.
        beat: counts its signs of life.
        arrived: how many meetings of all processes it has come to.
        failed: what it failed with; None: it has not.
        code: exit code that belongs to ``failed``.
        failures: how often it has failed.
        ended: whether it has ended in order.
        seen: when ``beat`` changed last, on this process's clock.
    """

    rank: int
    name: str
    seen: float
    place: str = ""
    pid: int = 0
    beat: int = 0
    arrived: int = 0
    failed: str | None = None
    code: int = 1
    failures: int = 0
    ended: bool = False


class Watch:
    """Tells of this process, and knows of the others.

    Args:
        store: a store of ``torch.distributed``, which all processes reach.
        rank: of this process.
        size: number of processes.
        timeout: seconds after which silence means that a process is lost.
        kept_by_main: whether process 0 keeps the store, and not the launcher.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: float, kept_by_main: bool = False) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        self._own: dict[str, Any] = {"arrived": 0, "failed": None, "code": 1, "failures": 0, "ended": False, "beat": 0}
        self._own |= {"pid": os.getpid(), "place": _place(), "machine": socket.gethostname()}
        self._kept_by_main, self._store = kept_by_main, store.clone()
        self._wanted: str | None = None
        self._found: str | None = None
        begun = time.monotonic()
        self.peers = {other: Peer(other, f"process {other}", begun) for other in range(size) if other != rank}
        self._answered, self._stopped, self._woken = begun, threading.Event(), threading.Event()
        self._rounds = 0
        self._look()
        self._thread = threading.Thread(target=self._run, name="signs of life", daemon=True)
        self._thread.start()

    # This process

    @property
    def failures(self) -> int:
        """How often this process has failed."""
        return self._own["failures"]

    def arrive(self) -> int:
        """Note that this process comes to the next meeting of all, and return the meeting's number."""
        self._own["arrived"] += 1
        return self._own["arrived"]

    def fail(self, sentence: str, code: int) -> None:
        """Tell the others that this process failed."""
        self._own |= {"failed": sentence, "code": code, "failures": self._own["failures"] + 1}
        self.look()

    def recover(self) -> None:
        """Tell the others that this process goes on after it failed."""
        self._own["failed"] = None

    def end(self) -> None:
        """Tell the others that this process ends, and wait for a moment until they have read it."""
        self._own["ended"] = True
        if self._store_is_silent():
            self._stopped.set()
            return
        until = time.monotonic() + _LAST_WORDS
        while self.look() and time.monotonic() < until:
            if all(peer.ended or self._reason(peer) for peer in self.peers.values()):
                break
            time.sleep(0.05)
        self._stopped.set()
        if self.rank == 0:  # which may keep the store that the others are still asking
            time.sleep(0.3)

    # The others

    def lost(self) -> dict[int, str]:
        """The processes that were lost: why, by their numbers."""
        if self._store_is_silent():
            keeper = self.peers[0].name if self._kept_by_main and 0 in self.peers else "the launcher"
            return {0: f"{keeper} has given no sign of life for {self.timeout:g} s"}
        reasons = {rank: self._reason(peer) for rank, peer in self.peers.items()}
        return {rank: f"{self.peers[rank].name} {reason}" for rank, reason in reasons.items() if reason}

    def speaks(self) -> bool:
        """Whether it is up to this process to say what went wrong: the first one that is not lost."""
        lost = self.lost()
        return all(rank in lost for rank in range(self.rank))

    def check(self, meeting: int, begun: float, patient: bool = False) -> None:
        """Look whether the others can still come to a meeting at which this process waits.

        Args:
            meeting: its number, from :meth:`arrive`.
            begun: when the waiting began, ``time.monotonic()``.
            patient: whether the others may take as long as they like while they give signs of life.

        Raises:
            PeerError: one will not come.
        """
        lost = self.lost()
        if lost:
            raise PeerError(f"{'; '.join(lost.values())}: {GO_ON}.")
        for peer in self.peers.values():
            if peer.failed is not None and peer.arrived < meeting:
                raise PeerError(f"process {peer.rank}: {peer.failed}", peer.code)
        now = time.monotonic()
        if not patient and now - begun > self.timeout:
            # One that is silent as well was frozen, or its machine is gone: soon its silence is long enough to say so.
            silent = self.timeout / 2
            late = [peer.name for peer in self.peers.values() if peer.arrived < meeting and now - peer.seen <= silent]
            if late:
                raise PeerError(f"{' and '.join(late)} did not come for {self.timeout:g} s to where the others wait: {GO_ON}.")

    def all_failed(self, failures: int) -> bool | None:
        """Whether all have failed so many times; None while that is open, False where one cannot."""
        if self.lost() or any(peer.ended for peer in self.peers.values()):
            return False
        return True if all(peer.failures >= failures for peer in self.peers.values()) else None

    def _store_is_silent(self) -> bool:
        return time.monotonic() - self._answered > self.timeout

    def _reason(self, peer: Peer) -> str | None:
        if peer.ended:
            return None
        if peer.place and peer.place == self._own["place"] and not _is_running(peer.pid):
            return "ended without a word"
        silence = time.monotonic() - peer.seen
        return f"has given no sign of life for {self.timeout:g} s" if silence > self.timeout else None

    def ask(self, key: str) -> str | None:
        """What the store has under ``key``; None where it is not known so far: ask again."""
        if self._wanted != key:
            self._wanted, self._found = key, None
        self._woken.set()
        return self._found

    def look(self) -> bool:
        """Tell and look now, in the thread: the store of a frozen process never answers. Whether it did."""
        rounds, until = self._rounds, time.monotonic() + min(2.0, self.timeout)
        while self._rounds < rounds + 2 and self._thread.is_alive() and time.monotonic() < until:  # one may be under way
            self._woken.set()
            time.sleep(0.01)
        return self._rounds >= rounds + 2

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._woken.wait(min(1.0, self.timeout / 5))
            self._woken.clear()
            with suppress(Exception):  # whatever a store that is gone raises; its silence is noticed by the time
                self._look()
                if self._wanted is not None and self._found is None and self._store.check([self._wanted]):
                    self._found = self._store.get(self._wanted).decode()
                self._rounds += 1

    def _look(self) -> None:
        self._own["beat"] += 1
        self._store.set(f"life/{self.rank}", json.dumps(self._own))
        ranks = [rank for rank in self.peers if self.peers[rank].beat or self._store.check([f"life/{rank}"])]
        found = self._store.multi_get([f"life/{rank}" for rank in ranks]) if ranks else []
        self._answered = time.monotonic()
        for rank, text in zip(ranks, found, strict=True):
            peer, told = self.peers[rank], json.loads(text)
            if told["beat"] != peer.beat:
                peer.seen, peer.beat = self._answered, told["beat"]
            peer.place, peer.pid, peer.arrived = told["place"], told["pid"], told["arrived"]
            peer.failed, peer.code, peer.failures = told["failed"], told["code"], told["failures"]
            peer.ended = told["ended"]
            peer.name = f"process {rank} (pid {peer.pid} on {told['machine']})"


@lru_cache
def _place() -> str:
    """Names the machine and the name space of process ids; empty where that cannot be told."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    return ""


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
