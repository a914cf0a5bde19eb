"""Memory files of templates: what is given back of them, what is left out of copies, and what stays."""

from __future__ import annotations

import fcntl
import mmap
import os
import signal
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from vmsandbox_hypervisor import sparse
from vmsandbox_hypervisor.kernel import constant_pieces
from vmsandbox_hypervisor.qemu.template import SEALS, empty_memory, release_replaced

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PAGES = 16


def page(number: int, mark: int) -> bytes:
    return bytes([number + 1, mark]) * (mmap.PAGESIZE // 2)


@contextmanager
def writer(fd: int, written: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """A process that has the file mapped copy-on-write and has written to pages; it tells what it sees when asked."""
    asked, asking = os.pipe()
    telling, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            memory = mmap.mmap(fd, PAGES * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE)
            for number in range(PAGES):
                assert memory[number * mmap.PAGESIZE] in (number + 1, 0)  # read: what is only mapped is not its own
            for number in written:
                memory[number * mmap.PAGESIZE : (number + 1) * mmap.PAGESIZE] = page(number, 9)
            os.write(told, b"written")
            os.read(asked, 1)
            os.write(told, bytes(memory[number * mmap.PAGESIZE + 1] for number in range(PAGES)))
        finally:
            os._exit(0)
    try:
        assert os.read(telling, 64) == b"written"
        yield pid, asking, telling
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for end in (asked, asking, telling, told):
            os.close(end)


@pytest.mark.parametrize("written", [(), (0,), (3, 4, 5, 9), (PAGES - 1,), tuple(range(PAGES))])
def test_a_machine_s_own_pages_need_no_file(written: tuple[int, ...]) -> None:
    fd = empty_memory(1)
    try:
        os.pwrite(fd, b"".join(page(number, 1) for number in range(PAGES)), 0)
        with writer(fd, written) as (pid, asking, telling):
            release_replaced(fd, pid)
            os.write(asking, b"?")
            seen = os.read(telling, PAGES)
        assert seen == bytes(9 if number in written else 1 for number in range(PAGES))
        pieces = [range(begin, end, mmap.PAGESIZE) for begin, end in sparse.extents(fd, 1 << 20)]
        held = {offset // mmap.PAGESIZE for piece in pieces for offset in piece}
        assert held == set(range(PAGES)) - set(written)
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS == SEALS
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("without", "held"),
    [
        ((), {1, 2, 3, 4, 8, 9}),
        (((0, 1),), {1, 2, 3, 4, 8, 9}),
        (((2, 3), (3, 4)), {1, 4, 8, 9}),
        (((0, 2), (4, 9)), {2, 3, 9}),
        (((1, 16),), set()),
    ],
)
def test_pieces_are_left_out_of_a_copy(without: tuple[tuple[int, int], ...], held: set[int]) -> None:
    source, target = empty_memory(1), empty_memory(1)
    try:
        for number in (1, 2, 3, 4, 8, 9):
            os.pwrite(source, page(number, 1), number * mmap.PAGESIZE)
        pieces = [(begin * mmap.PAGESIZE, end * mmap.PAGESIZE) for begin, end in without]
        sparse.copy(source, target, without=pieces)
        for number in range(PAGES):
            wanted = page(number, 1) if number in held else bytes(mmap.PAGESIZE)
            assert os.pread(target, mmap.PAGESIZE, number * mmap.PAGESIZE) == wanted
    finally:
        os.close(source)
        os.close(target)


# ---------------------------------------------------------------- a kernel's constant pieces


def elf(segments: list[tuple[int, int, int, int]], sections: list[tuple[int, int, int, int]]) -> bytes:
    """A file of headers: segments are (flags, address, place, size), sections (type, flags, address, size)."""
    head = b"\x7fELF\x02\x01".ljust(16, b"\0") + struct.pack("<HHIQQQ", 2, 62, 1, 0, 64, 64 + 56 * len(segments))
    head += struct.pack("<IHHHHHH", 0, 64, 56, len(segments), 64, len(sections), 0)
    table = b"".join(
        struct.pack("<IIQQQQQQ", 1, flags, 0, address, place, size, size, 4096)
        for flags, address, place, size in segments
    )
    return (
        head
        + table
        + b"".join(
            struct.pack("<IIQQQQIIQQ", 0, kind, flags, address, 0, size, 0, 0, 1, 0)
            for kind, flags, address, size in sections
        )
    )


def test_a_kernel_s_constant_pieces_are_code_and_tables_in_whole_pages(tmp_path: Path) -> None:
    virtual, physical = 0xFFFFFFFF81000000, 0x1000000
    sections = [
        (1, 0x6, virtual, 0x3010),  # code, then a gap that the kernel frees
        (1, 0x3, virtual + 0x10000, 0x2000),  # written to at its start, for all that is said of the segment
        (1, 0x2, virtual + 0x12000, 0x1800),
        (7, 0x2, virtual + 0x13810, 0x8F0),  # in the page where the table before it ends
        (8, 0x3, virtual + 0x14100, 0x9000),  # no content
        (1, 0x2, virtual + 0x20000, 0x4000),  # in a segment that is written to
        (1, 0x2, 0, 0x4000),  # debugging information: nowhere
        (1, 0x2, virtual + 0x15000, 0x10),  # no whole page
    ]
    segments = [(5, virtual, physical, 0x16000), (7, virtual + 0x20000, physical + 0x20000, 0x4000)]
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(elf(segments, sections))
    assert constant_pieces(kernel) == ((physical, physical + 0x3000), (physical + 0x12000, physical + 0x14000))


@pytest.mark.parametrize(
    "content", [b"", b"\x7fELF", b"MZ".ljust(4096, b"\0"), elf([], []), elf([], [(1, 2, 0, 1)])[:-8]]
)
def test_what_is_no_such_kernel_has_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "kernel").write_bytes(content)
    assert constant_pieces(tmp_path / "kernel") == ()
