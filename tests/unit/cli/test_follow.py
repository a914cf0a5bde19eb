from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from vmsandbox.cli import containerlog
from vmsandbox.cli.containerlog import LogWriter
from vmsandbox.cli.verbs import logs
from vmsandbox.cli.verbs._follow import Tail, Watch
from vmsandbox.errors import InvalidArgumentError, UnavailableError
from vmsandbox.records import start_time

if TYPE_CHECKING:
    from pathlib import Path


def texts(tail: Tail) -> list[bytes]:
    return [record.data() for record in tail.records()]


def test_each_look_shows_what_came_since_the_last(tmp_path: Path) -> None:
    tail = Tail(str(tmp_path / "log"))
    assert texts(tail) == []
    log = LogWriter(str(tmp_path / "log"), max_bytes=1 << 20, files=3)
    log.write("stdout", b"one\n")
    assert texts(tail) == [b"one\n"]
    assert texts(tail) == []
    log.write("stderr", b"two\nthr")
    assert texts(tail) == [b"two\n", b"thr"]
    log.close()
    tail.close()


@pytest.mark.parametrize("every", [1, 7, 60])
def test_rotation_neither_loses_nor_repeats_a_line(tmp_path: Path, every: int) -> None:
    tail = Tail(str(tmp_path / "log"))
    log = LogWriter(str(tmp_path / "log"), max_bytes=2000, files=4)
    seen: list[bytes] = []
    for number in range(600):
        log.write("stdout", b"%06d\n" % number)
        if number % every == 0:
            seen += texts(tail)
    seen += texts(tail)
    assert seen == [b"%06d\n" % number for number in range(600)]
    log.close()
    tail.close()


def test_a_reader_that_fell_behind_goes_on_with_the_oldest_there_is(tmp_path: Path) -> None:
    tail = Tail(str(tmp_path / "log"))
    log = LogWriter(str(tmp_path / "log"), max_bytes=1000, files=3)
    log.write("stdout", b"first\n")
    assert texts(tail) == [b"first\n"]
    lines = [b"%06d\n" % number for number in range(500)]
    for line in lines:
        log.write("stdout", line)
    seen = texts(tail)
    assert 0 < len(seen) < 500
    assert seen == sorted(set(seen))
    kept = [record.data() for record in containerlog.records(str(tmp_path / "log"))]
    assert seen[-len(kept) :] == kept == lines[-len(kept) :]
    log.close()
    tail.close()


def test_a_log_of_one_file_is_followed_through_its_new_start(tmp_path: Path) -> None:
    tail = Tail(str(tmp_path / "log"))
    log = LogWriter(str(tmp_path / "log"), max_bytes=1000, files=1)
    seen = []
    for number in range(100):
        log.write("stdout", b"%06d\n" % number)
        seen += texts(tail)
    assert seen == [b"%06d\n" % number for number in range(100)]
    log.close()
    tail.close()


def test_waiting_ends_with_every_change_and_with_the_process(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    watch = Watch(str(tmp_path), process.pid, start_time(process.pid))
    tail = Tail(str(tmp_path / "log"), opened=watch.file)
    try:
        log = LogWriter(str(tmp_path / "log"), max_bytes=1 << 20, files=2)
        assert watch.wait() is True
        assert texts(tail) == []
        log.write("stdout", b"x\n")
        assert watch.wait() is True
        assert texts(tail) == [b"x\n"]
        log.close()
        os.kill(process.pid, signal.SIGKILL)
        assert watch.wait() is False
    finally:
        process.kill()
        process.wait()
        tail.close()
        watch.close()


def test_what_has_ended_is_not_waited_for(tmp_path: Path) -> None:
    watch = Watch(str(tmp_path), None, None)
    assert watch.wait() is False
    watch.close()
    with pytest.raises(UnavailableError, match="cannot watch"):
        Watch(str(tmp_path / "missing"), None, None)


@pytest.mark.parametrize(
    ("text", "stamp"),
    [
        ("2030-01-31T12:00:00Z", "2030-01-31T12:00:00.000000000Z"),
        ("2030-01-31T12:00:00+02:00", "2030-01-31T10:00:00.000000000Z"),
        ("2030-01-31", "2030-01-31T00:00:00.000000000Z"),
        ("0", "1970-01-01T00:00:00.000000000Z"),
    ],
)
def test_a_time_is_understood_as_logs_write_it(text: str, stamp: str) -> None:
    assert logs.stamp_of(text) == stamp


def test_a_duration_is_before_now() -> None:
    assert logs.stamp_of("1h30m") < logs.stamp_of("10s") < logs.stamp_of("2200-01-01")
    with pytest.raises(InvalidArgumentError, match="invalid time 'yesterday'"):
        logs.stamp_of("yesterday")
