"""The initramfs is a cpio that others can read too, and loads modules in the order given."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, NamedTuple

from vmsandbox.guestbuild import initramfs
from vmsandbox.guestbuild.cpio import Archive
from vmsandbox.guestbuild.floor import floor_initrd

if TYPE_CHECKING:
    from pathlib import Path


class Entry(NamedTuple):
    mode: int
    device: tuple[int, int]
    content: bytes


def unpacked(archive: bytes) -> dict[str, Entry]:
    """A reader of "newc" that shares nothing with the writer but the format's definition."""
    found = {}
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * index : at + 14 + 8 * index], 16) for index in range(13)]
        mode, size, device, name_size = fields[1], fields[6], (fields[9], fields[10]), fields[11]
        name = archive[at + 110 : at + 110 + name_size].rstrip(b"\0").decode()
        start = at + 110 + name_size
        start += -start % 4
        if name == "TRAILER!!!":
            return found
        assert name not in found
        found[name] = Entry(mode, device, archive[start : start + size])
        at = start + size
        at += -at % 4


def test_an_archive_holds_what_was_added() -> None:
    archive = Archive()
    archive.directory("dev")
    archive.character_device("dev/null", major=1, minor=3, mode=0o666)
    archive.file("/init", b"12345", mode=0o755)
    assert unpacked(archive.done()) == {
        "dev": Entry(stat.S_IFDIR | 0o755, (0, 0), b""),
        "dev/null": Entry(stat.S_IFCHR | 0o666, (1, 3), b""),
        "init": Entry(stat.S_IFREG | 0o755, (0, 0), b"12345"),
    }


def test_modules_are_loaded_in_their_order_before_the_root_is_mounted() -> None:
    entries = unpacked(initramfs.initramfs({"virtio": b"first", "erofs": b"second"}))
    assert entries["modules/virtio.ko"].content == b"first"
    assert entries["modules/erofs.ko"].content == b"second"
    init = entries["init"].content
    places = [
        init.index(text) for text in (b"/modules/virtio.ko\0", b"/modules/erofs.ko\0", b"/dev/vda\0", b"/sbin/init\0")
    ]
    assert places == sorted(places)
    assert entries["init"].mode == stat.S_IFREG | 0o755
    assert entries["dev/console"].device == (5, 1)


def test_the_same_modules_give_the_same_bytes() -> None:
    modules = {"virtio": b"first", "erofs": b"second"}
    assert initramfs.initramfs(modules) == initramfs.initramfs(dict(modules))
    assert initramfs.initramfs(modules) != initramfs.initramfs(dict(reversed(modules.items())))


def test_the_floor_has_a_first_program_and_nothing_else(tmp_path: Path) -> None:
    path = floor_initrd(tmp_path / "floor.cpio")
    assert set(unpacked(path.read_bytes())) == {"dev", "dev/console", "init"}
