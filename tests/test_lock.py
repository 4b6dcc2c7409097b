"""A folder belongs to one process at a time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from recbole_llm import lock
from recbole_llm.errors import UserError


def _hold(folder: str, ready: str, release: str) -> None:
    with lock.held(folder):
        (Path(folder).parent / f"{Path(folder).name}.77.pth").write_text("half")
        Path(ready).touch()
        _wait_for(Path(release))


def _wait_for(file: Path) -> None:
    """Wait until a file is there; a process that is killed while it waits holds nobody up."""
    until = time.monotonic() + 60
    while not file.exists() and time.monotonic() < until:
        time.sleep(0.05)


@pytest.fixture
def other(tmp_path, tmp_path_factory):
    """Another process that holds ``tmp_path / "run"`` until it is told to stop."""
    signs = tmp_path_factory.mktemp("signs")
    ready, release = signs / "ready", signs / "release"
    process = multiprocessing.get_context("spawn").Process(
        target=_hold, args=(str(tmp_path / "run"), str(ready), str(release))
    )
    process.start()
    _wait_for(ready)
    yield process, release
    release.touch()
    process.join(60)


def test_a_second_process_is_told_who_holds_the_folder(tmp_path, other):
    assert lock.is_held(tmp_path / "run")
    with pytest.raises(UserError, match=f"in use by process {other[0].pid} on .* since 20"):
        with lock.held(tmp_path / "run", waits=False):
            pytest.fail("two processes in one folder")


def test_a_second_process_waits(tmp_path, other):
    process, release = other
    started = time.monotonic()
    release.touch()
    with lock.held(tmp_path / "run"):
        assert time.monotonic() - started < 30
    assert not lock.is_held(tmp_path / "run")


def test_a_killed_process_holds_nothing_and_what_it_left_goes(tmp_path, other):
    process, _ = other
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert not lock.is_held(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors.88.tmp").write_text("half")
    (tmp_path / "run2.9.pth").write_text("another run's")
    with lock.held(tmp_path / "run"):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".locks", "run", "run2.9.pth"]
        assert list((tmp_path / "run").iterdir()) == []


def test_the_same_process_may_ask_again(tmp_path):
    with lock.held(tmp_path / "run"):
        with lock.held(tmp_path / "run"):
            assert lock.is_held(tmp_path / "run")
        assert lock.is_held(tmp_path / "run")
    assert not lock.is_held(tmp_path / "run")
