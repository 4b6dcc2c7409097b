"""Logs on a disk that is full."""

from __future__ import annotations

import errno
import threading
from logging import getLogger
from pathlib import Path

import pytest

from recbole_llm.results import log


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_log_file_that_finds_no_room_ends_and_the_run_goes_on(tmp_path, capsys):
    log.start_console("info")
    Path("log/SASRec").mkdir(parents=True)
    Path("log/SASRec/run.log").symlink_to("/dev/full")
    getLogger().info("before")
    with log.run_log("SASRec", "run"):
        getLogger().info("within")
        log.log_to_files("for the file alone")
    getLogger().info("after")
    told = capsys.readouterr().err
    assert "Traceback" not in told and told.count("ends here, for there is no room left") == 1
    assert "within" in told and "after" in told


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
