"""Streams: every compression comes out whole, and what is cut, damaged or endless is an error."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import resource
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.unit.images.making import compressed
from vmsandbox.errors import UnsupportedError
from vmsandbox.resources.images.streams import (
    Budget,
    Buffered,
    Measured,
    Section,
    StreamError,
    decompressed,
    is_compressed,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CONTENT = b"".join(b"%d" % number for number in range(200_000)) + os.urandom(300_000)


@contextmanager
def section(path: Path, data: bytes, *, before: bytes = b"", after: bytes = b"") -> Iterator[Section]:
    path.write_bytes(before + data + after)
    with open(path, "rb") as file:
        yield Section(file.fileno(), len(before), len(data))


def whole(blob: Section, step: int = 70_001) -> bytes:
    with decompressed(blob) as stream:
        return b"".join(iter(lambda: stream.read(step), b""))


@pytest.mark.parametrize("how", ["", "gzip", "zstd"])
@pytest.mark.parametrize("step", [1000, 1 << 20])
def test_every_compression_comes_out_whole_from_the_middle_of_a_file(tmp_path: Path, how: str, step: int) -> None:
    data = compressed(CONTENT, how)
    with section(tmp_path / "blob", data, before=b"before", after=b"after") as blob:
        assert whole(blob, step) == CONTENT
        assert blob.sha256() == f"sha256:{hashlib.sha256(data).hexdigest()}"
        assert is_compressed(blob) == bool(how)


@pytest.mark.parametrize(
    "data",
    [
        gzip.compress(b"one") + gzip.compress(b"two"),
        gzip.compress(b"one") + gzip.compress(b"two") + bytes(1000),
        gzip.compress(b"onetwo") + bytes(1),
        gzip.compress(b"") + gzip.compress(b"onetwo"),
        compressed(b"one", "zstd") + compressed(b"two", "zstd"),
        b"\x51\x2a\x4d\x18\x03\x00\x00\x00abc" + compressed(b"onetwo", "zstd"),
    ],
    # What is compressed has the time in it, and a test the same name in every process.
    ids=("gzip twice", "zeros behind", "a zero behind", "an empty one first", "zstd twice", "a frame to skip"),
)
def test_several_members_are_one_content(tmp_path: Path, data: bytes) -> None:
    with section(tmp_path / "blob", data) as blob:
        assert whole(blob) == b"onetwo"


def test_a_member_that_ends_where_a_read_ends_is_followed_by_the_next(tmp_path: Path) -> None:
    first = gzip.compress(os.urandom((1 << 18) - 100), 0)
    padding = (1 << 18) - len(first)
    data = gzip.compress(b"", mtime=0) * 0 + first + bytes(max(padding, 0)) + gzip.compress(b"end")
    with section(tmp_path / "blob", data) as blob:
        assert whole(blob)[-3:] == b"end"


@pytest.mark.parametrize("how", ["gzip", "zstd"])
def test_an_empty_content_is_empty(tmp_path: Path, how: str) -> None:
    with section(tmp_path / "blob", compressed(b"", how)) as blob:
        assert whole(blob) == b""


DAMAGED = {
    "cut gzip": gzip.compress(CONTENT)[:-20],
    "cut gzip header": gzip.compress(CONTENT)[:5],
    "wrong gzip checksum": gzip.compress(CONTENT)[:-8] + bytes(8),
    "damaged gzip": gzip.compress(CONTENT)[:5000] + os.urandom(5000),
    "rubbish after gzip": gzip.compress(CONTENT) + b"rubbish",
    "cut zstd": compressed(CONTENT, "zstd")[:-20],
    "damaged zstd": compressed(CONTENT, "zstd")[:5000] + os.urandom(5000),
    "rubbish after zstd": compressed(CONTENT, "zstd") + b"rubbish",
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_data_is_an_error(tmp_path: Path, data: bytes) -> None:
    with section(tmp_path / "blob", data) as blob, pytest.raises(StreamError):
        whole(blob)


@pytest.mark.parametrize("data", [bz2.compress(b"x"), lzma.compress(b"x")])
def test_other_compressions_are_named(tmp_path: Path, data: bytes) -> None:
    with section(tmp_path / "blob", data) as blob, pytest.raises(UnsupportedError, match=r"bzip2|xz"):
        whole(blob)


def test_a_missing_zstd_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with section(tmp_path / "blob", compressed(b"x", "zstd")) as blob:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(UnsupportedError, match="apt-get install zstd"):
            whole(blob)


def test_zstd_is_ended_when_nobody_reads_on(tmp_path: Path) -> None:
    with section(tmp_path / "blob", compressed(bytes(50_000_000), "zstd")) as blob, decompressed(blob) as stream:
        assert stream.read(10) == bytes(10)


@pytest.mark.parametrize("how", ["gzip", "zstd"])
def test_a_bomb_is_read_at_bounded_memory_up_to_its_limit(tmp_path: Path, how: str) -> None:
    data = compressed(bytes(300_000_000), how)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with section(tmp_path / "blob", data) as blob, decompressed(blob) as stream:
        measured = Measured(stream, Budget(50_000_000))
        with pytest.raises(StreamError, match="more than 50000000 bytes"):
            measured.finish()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    with section(tmp_path / "blob", b"x" * 1000) as blob:
        os.truncate(tmp_path / "blob", 500)
        with pytest.raises(StreamError, match="500 bytes early"):
            whole(blob)


def test_small_reads_are_served_from_large_ones(tmp_path: Path) -> None:
    with section(tmp_path / "blob", CONTENT) as blob:
        stream = Buffered(blob)
        assert b"".join(iter(lambda: stream.read(997), b"")) == CONTENT
