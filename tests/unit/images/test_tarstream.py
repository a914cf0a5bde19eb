"""The tar reader: what honest programs write comes out right, what others write comes out as an error."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
import tracemalloc
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.images.making import (
    BLOCK,
    CHARACTER,
    FIFO,
    Member,
    directory,
    hard_link,
    header,
    link,
    padded,
    pax,
    tar,
)
from vmsandbox.resources.images.tarstream import EXTENSION_MAX, Entry, TarError, TarReader

if TYPE_CHECKING:
    from pathlib import Path

END = bytes(1024)


class Dribble:
    """Gives less than it is asked for."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def read(self, size: int, /) -> bytes:
        return self._data.read(max(1, size // 3))


def contents(data: bytes) -> list[tuple[Entry, bytes]]:
    """Every entry with its content, holes as zeros."""
    found = []
    reader = TarReader(Dribble(data))
    for entry in reader:
        content = bytearray(entry.size)
        for offset, chunk in reader.data(entry):
            content[offset : offset + len(chunk)] = chunk
        found.append((entry, bytes(content)))
    return found


def entries(data: bytes) -> list[Entry]:
    return list(TarReader(io.BytesIO(data)))


def read_over(data: bytes) -> None:
    reader = TarReader(io.BytesIO(data))
    for entry in reader:
        for _, chunk in reader.data(entry):
            assert chunk


FORMATS = [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]


@pytest.mark.parametrize("form", FORMATS)
def test_every_kind_of_entry_is_read_in_every_format(form: int) -> None:
    members = [
        directory("d"),
        Member("d/file", data=b"x" * 700, mode=0o4755, uid=1000, gid=50, mtime=123456),
        hard_link("d/hard", "d/file"),
        link("d/soft", "../elsewhere"),
        Member("d/char", CHARACTER, device=(1, 3)),
        Member("d/block", BLOCK, device=(8, 1)),
        Member("d/fifo", FIFO),
        Member("last", data=b"y"),
    ]
    for member, (entry, content) in zip(members, contents(tar(*members, form=form)), strict=True):
        assert (entry.name.rstrip("/"), entry.kind, content) == (member.name, member.kind, member.data)
        assert (entry.mode, entry.uid, entry.gid) == (member.mode, member.uid, member.gid)
        assert entry.mtime_ns == member.mtime * 10**9
        assert (entry.link, entry.device) == (member.link, member.device)


@pytest.mark.parametrize("form", FORMATS[:2])
def test_long_names_and_links_and_large_numbers_are_read(form: int) -> None:
    name, target = "d/" + "n" * 250, "t" * 3000
    members = [link(name, target, uid=4_000_000_000, gid=3_000_000), Member("plain")]
    first, second = entries(tar(*members, form=form))
    assert (first.name, first.link, first.uid, first.gid) == (name, target, 4_000_000_000, 3_000_000)
    assert (second.name, second.link, second.uid) == ("plain", "", 0)


def test_names_that_are_not_utf8_keep_their_bytes() -> None:
    name = os.fsdecode(b"caf\xe9")
    for form in FORMATS[:2]:
        assert os.fsencode(entries(tar(Member(name), form=form))[0].name) == b"caf\xe9"
    assert os.fsencode(entries(pax((b"path", b"\xff\xfe")) + header(b"x", b"0") + END)[0].name) == b"\xff\xfe"


def test_times_keep_nanoseconds_and_may_be_before_1970() -> None:
    data = pax((b"mtime", b"1.123456789987")) + header(b"a", b"0")
    data += pax((b"mtime", b"-2.5")) + header(b"b", b"0") + pax((b"mtime", b"7.")) + header(b"c", b"0")
    assert [entry.mtime_ns for entry in entries(data + END)] == [1_123_456_789, -2_500_000_000, 7_000_000_000]


def test_attributes_are_bytes_of_any_value() -> None:
    value = bytes(range(256)) + b"\n5 a=b\n"
    data = pax((b"SCHILY.xattr.security.capability", value), (b"SCHILY.xattr.user.empty", b"")) + header(b"a", b"0")
    assert entries(data + END)[0].xattrs == {"security.capability": value, "user.empty": b""}


def test_global_headers_and_labels_are_passed_over() -> None:
    data = pax((b"path", b"evil"), kind=b"g") + header(b"label", b"V") + header(b"good", b"0") + END
    assert [entry.name for entry in entries(data)] == ["good"]


def test_a_pax_size_replaces_that_of_the_header() -> None:
    data = pax((b"size", b"600")) + header(b"a", b"0", 0) + padded(b"z" * 600) + header(b"b", b"0") + END
    assert [(entry.name, len(content)) for entry, content in contents(data)] == [("a", 600), ("b", 0)]


def test_a_link_has_no_data_whatever_its_size_says() -> None:
    data = header(b"l", b"1", 1024, link=b"t") + header(b"after", b"0") + END
    assert [(entry.name, entry.size) for entry in entries(data)] == [("l", 0), ("after", 0)]


def test_an_old_header_with_a_slash_is_a_directory() -> None:
    data = header(b"old/", b"\0") + pax((b"path", b"long/")) + header(b"x", b"\0") + header(b"file", b"\0") + END
    assert [entry.kind for entry in entries(data)] == [b"5", b"5", b"0"]


@pytest.mark.parametrize("cut", [1024, 512, 0])
def test_the_end_mark_may_be_short_or_missing(cut: int) -> None:
    data = header(b"a", b"0", 512) + b"x" * 512 + bytes(cut)
    assert len(entries(data)) == 1


def test_the_padding_of_the_last_entry_may_be_missing() -> None:
    assert contents(header(b"a", b"0", 3) + b"abc")[0][1] == b"abc"


@pytest.mark.parametrize("version", ["old", "0.0", "0.1", "1.0"])
@pytest.mark.parametrize("pieces", [1, 3, 200])
def test_sparse_files_of_gnu_tar_are_read(tmp_path: Path, version: str, pieces: int) -> None:
    size = (pieces + 1) * 100_000
    with open(tmp_path / "sparse", "wb") as file:
        for piece in range(pieces):
            file.seek(piece * 100_000 + 8192)
            file.write(b"data %d" % piece * 300)
        file.truncate(size)
    (tmp_path / "after").write_bytes(b"after")
    form = ["--format=gnu"] if version == "old" else ["--format=pax", f"--sparse-version={version}"]
    command = ["tar", "--sparse", *form, "-cf", "-", "sparse", "after"]
    data = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout
    assert len(data) < size
    (sparse, content), (after, _) = contents(data)
    assert sparse.segments is not None
    assert (sparse.name, sparse.size) == ("sparse", size)
    assert content == (tmp_path / "sparse").read_bytes()
    assert after.name == "after"


MALFORMED = {
    "no archive at all": b"x" * 2048,
    "a cut header": tar(Member("a"))[:300],
    "a wrong checksum": bytes([1]) + tar(Member("a"))[1:],
    "cut data": header(b"a", b"0", 5000) + bytes(1000),
    "a negative size": header(b"a", b"0", -1024) + END,
    "a negative pax size": pax((b"size", b"-1024")) + header(b"a", b"0") + END,
    "data after an end mark": header(b"a", b"0") + bytes(512) + header(b"b", b"0"),
    "a pax header without an entry": pax((b"path", b"a")) + END,
    "a cut pax header": pax((b"path", b"a" * 600))[:700],
    "a huge pax header": header(b"a", b"x", 1 << 40) + bytes(1 << 20),
    "a huge long name": header(b"a", b"L", 1 << 40) + bytes(1 << 20),
    "endless pax headers": pax((b"path", b"a")) * 5000 + header(b"a", b"0") + END,
    "a pax record without length": header(b"a", b"x", 10) + padded(b"path=value") + header(b"a", b"0"),
    "a pax record of length zero": header(b"a", b"x", 9) + padded(b"0 path=a\n") + header(b"a", b"0"),
    "a pax record that is too long": header(b"a", b"x", 9) + padded(b"99 path=a") + header(b"a", b"0"),
    "a zero byte in a path": pax((b"path", b"a\0b")) + header(b"a", b"0") + END,
    "a time that is none": pax((b"mtime", b"soon")) + header(b"a", b"0") + END,
    "an owner that is none": pax((b"uid", b"root")) + header(b"a", b"0") + END,
    "a sparse map of an odd count": pax((b"GNU.sparse.size", b"9"), (b"GNU.sparse.map", b"1")) + header(b"a", b"0"),
    "a sparse map that goes back": pax((b"GNU.sparse.size", b"9000"), (b"GNU.sparse.map", b"600,1,0,1"))
    + header(b"a", b"0", 2)
    + END,
    "a sparse map beyond the end": pax((b"GNU.sparse.size", b"9"), (b"GNU.sparse.map", b"8,2"))
    + header(b"a", b"0", 2)
    + END,
    "a sparse map of other data": pax((b"GNU.sparse.size", b"9"), (b"GNU.sparse.map", b"0,9")) + header(b"a", b"0", 2),
    "an endless sparse map": pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.realsize", b"9"))
    + header(b"a", b"0", 1 << 30)
    + b"999999999999999999\n"
    + b"123456789012345678\n" * (1 << 17),
    "a sparse map of a later version": pax((b"GNU.sparse.major", b"2"), (b"GNU.sparse.realsize", b"9"))
    + header(b"a", b"0")
    + END,
    "a numbytes without offset": pax((b"GNU.sparse.numbytes", b"1")) + header(b"a", b"0"),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_archive_is_an_error_at_bounded_memory(data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(TarError):
            read_over(data)
        assert tracemalloc.get_traced_memory()[1] < 40 * EXTENSION_MAX
    finally:
        tracemalloc.stop()


HONEST = tar(directory("d"), Member("d/f", data=b"x" * 600, xattrs={"user.a": b"1"}), link("l" * 120, "t")) + END


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(HONEST) - 1), st.binary(min_size=1, max_size=12)), max_size=6))
def test_any_damage_is_an_error_or_harmless(damages: list[tuple[int, bytes]]) -> None:
    data = bytearray(HONEST)
    for position, junk in damages:
        data[position : position + len(junk)] = junk
        # so that damage is not only ever found by the checksum
        for start in range(0, len(data) - 511, 512):
            block = data[start : start + 512]
            if block[257:262] == b"ustar":
                block[148:156] = b" " * 8
                data[start + 148 : start + 156] = b"%06o\0 " % sum(block)
    with suppress(TarError):
        read_over(bytes(data))
