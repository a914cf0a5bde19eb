"""Memory files of templates: what is given back of them, and what stays."""

from __future__ import annotations

import fcntl
import mmap
import os
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from vmsandbox_hypervisor import sparse
from vmsandbox_hypervisor.qemu.template import SEALS, empty_memory, release_replaced

if TYPE_CHECKING:
    from collections.abc import Iterator

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
