from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

from vmsandbox.cli import containerlog
from vmsandbox.cli.containerlog import LogWriter

if TYPE_CHECKING:
    import pytest

NOWHERE = os.strerror(errno.ENOENT).encode()


def written(path: Path, *chunks: tuple[str, bytes], max_bytes: int = 1 << 20, files: int = 3) -> str:
    log = LogWriter(str(path), max_bytes=max_bytes, files=files)
    for stream, data in chunks:
        log.write(stream, data)
    log.close()
    return str(path)


def test_output_is_read_back_byte_for_byte_whatever_its_lines(tmp_path: Path) -> None:
    chunks = [b"one\ntwo\n", b"par", b"tial\n", b"\n\n", b"\x00\xff no end"]
    path = written(tmp_path / "log", *[("stdout", chunk) for chunk in chunks])
    assert b"".join(record.data() for record in containerlog.records(path)) == b"".join(chunks)


def test_every_line_has_its_stream_and_time(tmp_path: Path) -> None:
    path = written(tmp_path / "log", ("stdout", b"out\n"), ("stderr", b"err\n"))
    found = list(containerlog.records(path))
    assert [(record.stream, record.text) for record in found] == [("stdout", b"out"), ("stderr", b"err")]
    assert all(record.stamp.endswith("Z") and "T" in record.stamp for record in found)


def test_a_log_keeps_its_bound_and_its_newest_lines(tmp_path: Path) -> None:
    lines = [b"%06d\n" % number for number in range(2000)]
    path = written(tmp_path / "log", *[("stdout", line) for line in lines], max_bytes=10_000, files=3)
    assert len(containerlog.files(path)) == 3
    assert sum(Path(name).stat().st_size for name in containerlog.files(path)) < 3 * 11_000
    kept = [record.data() for record in containerlog.records(path)]
    assert kept == lines[-len(kept) :]


def test_a_log_of_one_file_starts_over(tmp_path: Path) -> None:
    path = written(tmp_path / "log", *[("stdout", b"x" * 100 + b"\n")] * 300, max_bytes=5_000, files=1)
    assert containerlog.files(path) == [path]
    assert Path(path).stat().st_size < 6_000


def test_what_is_no_record_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"garbage\n2026-01-01T00:00:00Z stdout F good\n2026 stdout X bad\n")
    assert [record.text for record in containerlog.records(str(path))] == [b"good"]


def texts(path: Path) -> list[bytes]:
    return [record.text for record in containerlog.records(str(path))]


def test_a_log_that_cannot_be_opened_is_written_as_soon_as_it_can(tmp_path: Path) -> None:
    log = LogWriter(str(tmp_path / "missing" / "log"), max_bytes=1000, files=1)
    log.write("stdout", b"gone\n")
    (tmp_path / "missing").mkdir()
    log.write("stdout", b"here\n")
    log.close()
    gap, here = texts(tmp_path / "missing" / "log")
    assert gap.endswith(b"vmsandbox: 5 bytes of output are missing here: the log could not be written: " + NOWHERE)
    assert here == b"here"


class FullDisk:
    """Has room for so many bytes more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room = 1 << 20
        self._write = os.write
        monkeypatch.setattr(containerlog.os, "write", self.write)

    def write(self, fd: int, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = self._write(fd, data[: self.room])
        self.room -= count
        return count


def test_a_full_disk_loses_only_what_came_meanwhile_and_the_log_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(monkeypatch)
    log = LogWriter(str(tmp_path / "log"), max_bytes=1 << 20, files=3)
    log.write("stdout", b"before\n")
    disk.room = 50
    log.write("stdout", b"cut in the middle\n")
    log.write("stdout", b"lost\n")
    log.write("stderr", b"as well\n")
    disk.room = 1 << 20
    log.write("stdout", b"after\n")
    log.close()
    missing = b"vmsandbox: 13 bytes of output are missing here: the log could not be written: No space left on device"
    assert texts(tmp_path / "log") == [b"before", b"cut in the middle", missing, b"after"]


def test_what_had_no_room_is_written_at_the_end_if_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FullDisk(monkeypatch)
    log = LogWriter(str(tmp_path / "log"), max_bytes=1 << 20, files=3)
    disk.room = 10
    log.write("stdout", b"one\n")
    log.write("stdout", b"two\n")
    disk.room = 1 << 20
    log.close()
    one, gap = texts(tmp_path / "log")
    assert (one, b"4 bytes of output are missing here" in gap) == (b"one", True)


def test_a_record_that_a_life_left_cut_is_ended_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FullDisk(monkeypatch)
    log = LogWriter(str(tmp_path / "log"), max_bytes=1 << 20, files=3)
    disk.room = 45
    log.write("stdout", b"the end is missing\n")
    log.close()
    disk.room = 1 << 20
    written(tmp_path / "log", ("stdout", b"another life\n"))
    assert texts(tmp_path / "log") == [b"the e", b"another life"]
