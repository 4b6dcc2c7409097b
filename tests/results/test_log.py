"""Logs on a disk that is full."""

from __future__ import annotations

import errno
import os
import threading
from logging import getLogger
from pathlib import Path

import pytest

from recbole_llm.errors import UserError
from recbole_llm.results import log


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_log_file_that_finds_no_room_ends_and_the_run_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(log._LogFile, "_open", lambda self: open("/dev/full", "w"))
    log.start_console("info")
    getLogger().info("before")
    with log.run_log("SASRec", "run"):
        getLogger().info("within")
        log.log_to_files("for the file alone")
    getLogger().info("after")
    told = capsys.readouterr().err
    assert "Traceback" not in told and told.count("ends here, for there is no room left") == 1
    assert "within" in told and "after" in told


@pytest.mark.parametrize("kind", ["pipe", "link to a device", "folder", "circle"])
def test_a_log_is_written_to_regular_files_alone(kind):
    log.start_console("info")
    place = Path("log/SASRec/run.log")
    place.parent.mkdir(parents=True)
    if kind == "pipe":
        os.mkfifo(place)  # opened, it would wait for a reader
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to("/dev/null" if kind == "link to a device" else place.name)
    with pytest.raises(UserError, match="run.log is no regular file, and is not replaced"):
        with log.run_log("SASRec", "run"):
            pytest.fail("it was opened")


@pytest.mark.parametrize("name", ["log", "log_tensorboard"])
def test_a_file_in_the_place_of_the_logs_is_told_at_the_start(name):
    Path(name).touch()
    with pytest.raises(OSError, match=name):
        log.start_console("info")


def test_a_full_disk_is_not_told_by_a_trackers_thread(monkeypatch):
    told = []
    monkeypatch.setattr(threading, "excepthook", told.append)

    def fail(error):
        raise error

    with log.run_log("SASRec", "run"):
        for error in (OSError(errno.ENOSPC, "No space left on device"), ZeroDivisionError()):
            thread = threading.Thread(target=fail, args=(error,))
            thread.start()
            thread.join()
    assert [arguments.exc_type for arguments in told] == [ZeroDivisionError] and threading.excepthook == told.append
