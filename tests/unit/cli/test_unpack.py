"""A guest may send any bytes: nothing of it gets outside the destination."""

from __future__ import annotations

import io
import os
import tarfile
from typing import TYPE_CHECKING

import pytest

from vmsandbox.cli.verbs._unpack import Unpacker, opened
from vmsandbox.errors import ExhaustedError, InvalidArgumentError, NotFoundError

if TYPE_CHECKING:
    from pathlib import Path


def entry(
    name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", link: str = "", mode: int = 0o644, **pax: str
) -> bytes:
    made = tarfile.TarInfo(name)
    made.type, made.size, made.linkname, made.mode, made.mtime = kind, len(data), link, mode, 1000
    made.pax_headers = pax
    return made.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % 512)


def unpacked(directory: Path, *entries: bytes, most_bytes: int = 1 << 20) -> Unpacker:
    made = Unpacker(str(directory), "top", "here", owners=False, most_bytes=most_bytes)
    made.unpack(io.BytesIO(b"".join(entries) + bytes(1024)))
    return made


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    made = tmp_path / "inside"
    made.mkdir()
    return made


def test_a_tree_arrives_under_its_new_name_with_modes_times_and_links(destination: Path) -> None:
    unpacked(
        destination,
        entry("top", tarfile.DIRTYPE, mode=0o500),
        entry("top/file", data=b"content", mode=0o4751),
        entry("top/again", tarfile.LNKTYPE, link="top/file"),
        entry("top/link", tarfile.SYMTYPE, link="file"),
        entry("top/sub", tarfile.DIRTYPE, mode=0o755),
    )
    here = destination / "here"
    assert (here / "file").read_bytes() == b"content"
    assert (here / "file").stat().st_mode & 0o7777 == 0o751
    assert (here / "file").stat().st_ino == (here / "again").stat().st_ino
    assert os.readlink(here / "link") == "file"
    assert here.stat().st_mode & 0o777 == 0o500
    assert (here / "sub").stat().st_mtime == here.stat().st_mtime == 1000


@pytest.mark.parametrize(
    "entries",
    [
        [entry("../escaped", data=b"x")],
        [entry("/escaped", data=b"x")],
        [entry("top/../../escaped", data=b"x")],
        [entry("other", data=b"x")],
        [entry("top", tarfile.DIRTYPE), entry("top/x", tarfile.LNKTYPE, link="../escaped")],
        [entry("top", tarfile.DIRTYPE), entry("top/x", tarfile.LNKTYPE, link="/etc/passwd")],
        [entry("top", tarfile.DIRTYPE), entry("top/file"), entry("top/file/x", data=b"x")],
        [b"garbage" * 1000],
        [entry("top", data=b"x" * 2000)[:1024]],
        [entry("top/" + "d/" * 300 + "x")],
        [entry("top", data=b"x", mtime="inf")],
        [entry("top", data=b"x", mtime="1e300")],
        [entry("top", tarfile.DIRTYPE, mtime="nan")],
    ],
)
def test_what_leads_outside_or_is_no_archive_is_refused(destination: Path, entries: list[bytes]) -> None:
    with pytest.raises(InvalidArgumentError):
        unpacked(destination, *entries)
    assert [path.name for path in destination.parent.iterdir()] == ["inside"]


@pytest.mark.parametrize("sent", [b"", b"garbage" * 1000, entry("top", data=b"x", size="-1")[:512]])
def test_a_broken_archive_of_which_only_the_first_entry_is_wanted_is_refused(sent: bytes) -> None:
    with pytest.raises(InvalidArgumentError, match="broken archive"), opened(io.BytesIO(sent)) as archive:
        archive.next()


def test_an_owner_that_is_no_number_of_a_user_is_refused(destination: Path) -> None:
    made = Unpacker(str(destination), "top", "here", owners=True, most_bytes=1 << 20)
    with pytest.raises(InvalidArgumentError, match="broken archive"):
        made.unpack(io.BytesIO(entry("top", data=b"x", uid=str(1 << 70)) + bytes(1024)))


def test_links_that_lead_outside_and_special_files_are_left_out_and_named(destination: Path) -> None:
    made = unpacked(
        destination,
        entry("top", tarfile.DIRTYPE),
        entry("top/absolute", tarfile.SYMTYPE, link="/etc"),
        entry("top/relative", tarfile.SYMTYPE, link="../../.."),
        entry("top/null", tarfile.CHRTYPE),
        entry("top/pipe", tarfile.FIFOTYPE),
        entry("top/kept", data=b"x"),
    )
    assert os.listdir(destination / "here") == ["kept"]
    assert len(made.left_out) == 4


@pytest.mark.parametrize(
    ("links", "kept"),
    [
        ({"x": "file"}, True),
        ({"x": "sub/../file"}, True),
        ({"x": "missing/y"}, True),
        ({"a": "sub", "x": "a/../file"}, True),
        ({"x": ".."}, True),
        ({"x": "../.."}, False),
        ({"a": ".", "x": "a/../.."}, False),  # as text it is inside
        ({"a": "sub", "x": "a/../../.."}, False),
        ({"x": "x"}, True),
        ({"x": "sub/" * 1200 + "../" * 1202}, False),
    ],
)
def test_a_link_is_judged_by_where_it_leads(destination: Path, links: dict[str, str], *, kept: bool) -> None:
    made = unpacked(
        destination,
        entry("top", tarfile.DIRTYPE),
        entry("top/sub", tarfile.DIRTYPE),
        entry("top/file", data=b"x"),
        *(entry(f"top/{name}", tarfile.SYMTYPE, link=link) for name, link in links.items()),
    )
    assert os.path.lexists(destination / "here/x") == kept
    assert kept == (not made.left_out), made.left_out


def test_a_way_that_is_too_long_to_be_told_leads_outside(destination: Path) -> None:
    deep = "/".join(["d" * 250] * 15)
    made = unpacked(
        destination,
        entry("top", tarfile.DIRTYPE),
        *(entry("/".join(["top", *deep.split("/")[:depth]]), tarfile.DIRTYPE) for depth in range(1, 16)),
        entry("top/short", tarfile.SYMTYPE, link=deep),
        # Beyond what one call can name; the kernel goes there step by step.
        entry("top/x", tarfile.SYMTYPE, link=f"short/{'e' * 250}/{'f' * 250}/" + "../" * 10),
    )
    assert not os.path.lexists(destination / "here/x")
    assert len(made.left_out) == 1


def test_nothing_is_written_through_a_link_that_is_there_already(destination: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (destination / "here").symlink_to(outside)
    with pytest.raises(InvalidArgumentError):
        unpacked(destination, entry("top", tarfile.DIRTYPE), entry("top/x", data=b"x"))
    with pytest.raises(InvalidArgumentError):
        unpacked(destination, entry("top/x", data=b"x"))
    assert os.listdir(outside) == []


def test_a_file_replaces_a_link_instead_of_following_it(destination: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("old")
    (destination / "here").symlink_to("../precious")
    with pytest.raises(InvalidArgumentError):
        unpacked(destination, entry("top", data=b"new"))
    assert (tmp_path / "precious").read_text() == "old"


def test_bytes_are_bounded_before_they_are_written(destination: Path) -> None:
    with pytest.raises(ExhaustedError, match="--max-size"):
        unpacked(destination, entry("top", data=b"x" * 5000), most_bytes=4096)
    assert os.listdir(destination) == []


def test_headers_are_bounded_before_they_are_read(destination: Path) -> None:
    huge = tarfile.TarInfo("pax")
    huge.type, huge.size = tarfile.XHDTYPE, 4 << 30
    with pytest.raises(InvalidArgumentError, match="header of"):
        unpacked(destination, huge.tobuf(tarfile.USTAR_FORMAT))


def test_a_directory_that_has_to_take_the_place_of_a_file_is_an_error_that_names_it(destination: Path) -> None:
    (destination / "here").write_text("a file")
    with pytest.raises(InvalidArgumentError, match=f"^'{destination}/here' is a file: a directory cannot be copied"):
        unpacked(destination, entry("top", tarfile.DIRTYPE))
    assert (destination / "here").read_text() == "a file"


def test_a_file_that_has_to_take_the_place_of_a_directory_is_an_error_that_names_it(destination: Path) -> None:
    (destination / "here" / "sub").mkdir(parents=True)
    with pytest.raises(InvalidArgumentError, match=f"cannot copy to '{destination}/here/sub': Is a directory"):
        unpacked(destination, entry("top", tarfile.DIRTYPE), entry("top/sub", data=b"x"))


def test_only_a_directory_is_made_where_one_was_asked_for(destination: Path) -> None:
    made = Unpacker(str(destination), "top", "here", owners=False, most_bytes=1 << 20)
    made.only_directory = True
    with pytest.raises(NotFoundError, match=f"directory '{destination}/here' does not exist"):
        made.unpack(io.BytesIO(entry("top", data=b"x") + bytes(1024)))
    assert list(destination.iterdir()) == []
    made.unpack(io.BytesIO(entry("top", tarfile.DIRTYPE) + entry("top/file") + bytes(1024)))
    assert (destination / "here/file").exists()
