"""Processes that a machine needs, and their end."""

from __future__ import annotations

import errno
import subprocess

import psutil
import pytest

from vmsandbox_hypervisor import children


def test_a_child_that_cannot_be_watched_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(_pid: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(children, "read_start_time", no_room)
    with subprocess.Popen(["sleep", "1000"]) as process:
        with pytest.raises(OSError, match="Too many open files"):
            children.watched("sleeper", process.pid)
        assert not psutil.pid_exists(process.pid)
        process.returncode = -9  # it was reaped
