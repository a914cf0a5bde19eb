from __future__ import annotations

from pathlib import Path

from vmsandbox.cli import containerlog
from vmsandbox.cli.containerlog import LogWriter


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


def test_a_log_that_cannot_be_written_does_not_stop_the_container(tmp_path: Path) -> None:
    log = LogWriter(str(tmp_path / "missing" / "log"), max_bytes=1000, files=1)
    log.write("stdout", b"x")
    assert log.broken
