from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
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
        ("2030-01-31T12:00:00.123456789Z", "2030-01-31T12:00:00.123456"),
        ("2030-01-31", "2030-01-30T23:00:00.000000000Z"),
        ("2030-07-31T12:00:00", "2030-07-31T10:00:00.000000000Z"),
        ("0", "1970-01-01T00:00:00.000000000Z"),
    ],
)
def test_a_time_is_understood_as_logs_write_it(text: str, stamp: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    try:
        assert logs.stamp_of(text).startswith(stamp)
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_duration_is_before_now() -> None:
    texts = ("1h31m", "1.5h", "10s", "1500ms", "2200-01-01")
    stamps = [logs.stamp_of(text) for text in texts]
    assert stamps == sorted(set(stamps))


@pytest.mark.parametrize("text", ["yesterday", "1x", "h", "1h 5m", "-5m", "99999999999999999", "0001-01-01"])
def test_what_is_no_time_is_refused_with_examples(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"invalid time '{text}': write for example '10m'"):
        logs.stamp_of(text)


def written(tmp_path: Path, *pieces: tuple[str, bytes]) -> list[containerlog.Record]:
    log = LogWriter(str(tmp_path / "log"), max_bytes=1 << 20, files=3)
    for stream, data in pieces:
        log.write(stream, data)
    log.close()
    return list(containerlog.records(str(tmp_path / "log")))


PIECES = (
    ("stdout", b"first\nin "),
    ("stdout", b"pie"),
    ("stderr", b"between\n"),
    ("stdout", b"ces\nlast"),
)


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (None, b"first\nin piebetween\nces\nlast"),
        (9, b"first\nin piebetween\nces\nlast"),
        (3, b"in piebetween\nces\nlast"),
        (2, b"between\nlast"),
        (1, b"last"),
        (0, b""),
    ],
)
def test_the_last_lines_are_whole_whatever_pieces_they_were_written_in(
    tmp_path: Path, count: int | None, shown: bytes
) -> None:
    found = logs.last(written(tmp_path, *PIECES), count)
    assert b"".join(record.data() for record in found) == shown


def test_a_line_has_one_time_and_streams_keep_their_order(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    found = written(tmp_path, *PIECES)
    printer = logs.Printer(timestamps=True)
    printer.show(found[:2])
    printer.show(found[2:])
    out, err = capfdbinary.readouterr()
    stamps = [record.stamp.encode() for record in found]
    assert out == b"%s first\n%s in pieces\n%s last" % (stamps[0], stamps[1], stamps[5])
    assert err == b"%s between\n" % stamps[3]


def test_what_went_to_both_streams_is_in_order_where_both_go_to_one_place(tmp_path: Path) -> None:
    written(tmp_path, ("stdout", b"1\n"), ("stderr", b"2\n"), ("stdout", b"3\n"), ("stderr", b"4\n"))
    program = (
        "import sys; from vmsandbox.cli import containerlog; from vmsandbox.cli.verbs.logs import Printer;"
        "Printer(timestamps=False).show(containerlog.records(sys.argv[1]))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "log")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True)
    assert done.stdout == b"1\n2\n3\n4\n"


@pytest.mark.parametrize(("text", "count"), [("all", None), ("-1", None), ("0", 0), ("12", 12)])
def test_a_number_of_lines_is_understood_as_docker_does(text: str, count: int | None) -> None:
    assert logs.parser().parse_args(["--tail", text, "web"]).tail == count


@pytest.mark.parametrize("text", ["x", "1.5", "", "1k"])
def test_what_is_no_number_of_lines_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"'{text}' is neither a number of lines nor 'all'"):
        logs.parser().parse_args([f"--tail={text}", "web"])
