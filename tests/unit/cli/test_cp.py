from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from vmsandbox.cli.main import Options
from vmsandbox.cli.verbs import cp
from vmsandbox.errors import InvalidArgumentError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("web:/etc/passwd", ("web", "/etc/passwd")),
        ("web:tmp", ("web", "/tmp")),
        ("web:/a:b", ("web", "/a:b")),
        ("./a:b", ("", "./a:b")),
        ("/x", ("", "/x")),
        ("-", ("", "-")),
        (":x", ("", ":x")),
    ],
)
def test_a_place_is_in_a_container_or_on_the_host(text: str, expected: tuple[str, str]) -> None:
    assert cp.place(text) == expected


@pytest.mark.parametrize("words", [["a:/x", "b:/x"], ["x", "y"], ["", "a:/x"]])
def test_exactly_one_end_is_in_a_container(words: list[str]) -> None:
    with pytest.raises(InvalidArgumentError):
        cp.main(Options(), words)


def test_a_copy_goes_into_a_directory_or_gets_a_new_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert cp.target_on_host(str(tmp_path), "etc") == (str(tmp_path), "etc")
    assert cp.target_on_host(f"{tmp_path}/new", "etc") == (str(tmp_path), "new")
    assert cp.target_on_host(f"{tmp_path}/file", "etc") == (str(tmp_path), "file")
    with pytest.raises(InvalidArgumentError):
        cp.target_on_host(f"{tmp_path}/file", "")
    with pytest.raises(NotFoundError):
        cp.target_on_host(f"{tmp_path}/missing/new", "etc")


def test_a_link_as_destination_is_followed_also_to_what_is_not_there_yet(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    for name, target in (("one", "file"), ("two", "directory"), ("three", "directory/new")):
        (tmp_path / name).symlink_to(target)
    assert cp.target_on_host(f"{tmp_path}/one", "etc") == (str(tmp_path), "file")
    assert cp.target_on_host(f"{tmp_path}/two", "etc") == (f"{tmp_path}/two", "etc")
    assert cp.target_on_host(f"{tmp_path}/three", "etc") == (f"{tmp_path}/directory", "new")


class Sent:
    """What is sent to a container."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes) -> int:
        self.data += data
        return len(data)


def passed_on(data: bytes, monkeypatch: pytest.MonkeyPatch) -> bytes:
    sent = Sent()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BufferedReader(cast("Any", io.BytesIO(data)))))
    cp.pass_on(cast("Any", sent))
    return sent.data


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_an_archive_on_stdin_may_be_compressed(pack: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    archive = os.urandom(600_000)
    assert passed_on(pack(archive), monkeypatch) == archive
    assert passed_on(pack(b""), monkeypatch) == b""


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_compressed_archive_that_was_cut_off_is_an_error(
    pack: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidArgumentError, match="the archive on stdin is damaged"):
        passed_on(pack(os.urandom(9000))[:-20], monkeypatch)
    with pytest.raises(InvalidArgumentError, match="the archive on stdin is damaged"):
        passed_on(pack(b"x")[:7] + b"nonsense" * 9, monkeypatch)
