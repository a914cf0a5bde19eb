"""Templates: a machine that was booted once, and others that go on from there.

A template is two files: the device state and the memory, both for root only, because the memory holds what the
guest's kernel keeps secret.  Clones get the memory as a sealed memfd: QEMU maps it copy-on-write, and the seals keep
even a discard, which would otherwise punch holes into the file under every other clone, from changing it.  A clone
that is to share directories needs memory mapped shared, so it gets a copy of its own.

    memory = empty_memory(256)
    config = VmConfig(..., memory=Memory(size_mib=256, backing=SharedMemory(fd=memory)))
    async with hypervisor.running(config) as vm:
        ...                                             # warm the guest
        template = await save_template(vm, directory)   # seals `memory`: clones can use it at once
    clone = replace(config, memory=Memory(size_mib=256, backing=PrivateMemory(fd=memory)), restore=template.state)

A clone's configuration has to be that of the template but for name, directory, restore and backing: QEMU does not
notice a difference, the guest does.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import mmap
import os
import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmsandbox_hypervisor import sparse
from vmsandbox_hypervisor.api import SharedMemory
from vmsandbox_hypervisor.errors import HypervisorError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from vmsandbox_hypervisor.api import Vm

STATE, MEMORY = "state", "memory"
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
MIB = 1024 * 1024
#: bytes that are looked at together: smaller ones would find little more, and make files of many pieces
ZERO_BLOCK = 64 * 1024
_KEEP_SIZE, _PUNCH_HOLE = 0x01, 0x02
#: begin, end, offset and inode of a mapping, in /proc/PID/maps
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ (\d+) ")
#: of a page, in /proc/PID/pagemap
_ENTRY = struct.Struct("=Q")
_PRESENT, _SWAPPED, _OF_FILE = 1 << 63, 1 << 62, 1 << 61


@dataclass(frozen=True, kw_only=True)
class Template:
    """A saved machine: where its device state and its memory are."""

    state: Path
    memory: Path
    size_mib: int

    @classmethod
    def found(cls, directory: Path, *, size_mib: int) -> Template:
        """The template that `save_template` left in `directory`; `HypervisorError` if it is not whole."""
        template = cls(state=directory / STATE, memory=directory / MEMORY, size_mib=size_mib)
        try:
            state, memory = template.state.stat(), template.memory.stat()
        except OSError as error:
            raise HypervisorError(f"no template in '{directory}': {error.strerror}") from error
        if state.st_size == 0 or memory.st_size != size_mib * MIB:
            raise HypervisorError(f"the template in '{directory}' is not whole: make it again")
        return template

    def loaded(self) -> int:
        """The memory as a new sealed memfd; the caller closes it."""
        source = os.open(self.memory, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            return _sealed(_memfd_from(source))
        finally:
            os.close(source)


def empty_memory(size_mib: int) -> int:
    """A memfd for a machine that will become a template; the caller closes it."""
    fd = os.memfd_create("guest memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size_mib * MIB)
    return fd


def copied_memory(fd: int) -> int:
    """A memfd of its own with the contents of a template's, for a clone that maps it shared; the caller closes it.

    Takes 20 ms for 40 MiB in use, so call it off the event loop where that matters, or see `fill_memory`.
    """
    return _memfd_from(fd)


def fill_memory(target: int, source: int, common: Sequence[tuple[int, int]] = ()) -> None:
    """Copy a template's memory into an empty one, which QEMU may have mapped already (`SharedMemory.filled`).

    A fork's is a copy of its parent's but for what they have in `common`.
    """
    sparse.copy(source, target, without=common)


async def save_template(vm: Vm, directory: Path) -> Template:
    """Save `vm` into `directory` and end it; its memory (`SharedMemory.fd`) is sealed and serves clones from now on.

    The machine must be as its command line says: nothing hot-plugged, no share mounted.  `HypervisorError` if it is
    not or QEMU cannot save it; then no file is left, and the machine may be stopped.
    """
    backing = vm.config.memory.backing
    if not isinstance(backing, SharedMemory) or backing.fd is None:
        raise HypervisorError("cannot save a template: its memory must be a memfd of ours, see SharedMemory.fd")
    cpus, memory = await vm.cpus(), await vm.memory()
    hotplugged = set(vm.devices()) ^ {f"nic-{nic.id}" for nic in vm.config.nics}
    if hotplugged or cpus.present != vm.config.cpus.boot or memory.plugged_mib or memory.requested_mib:
        raise HypervisorError("cannot save a template: something was hot-plugged, which no clone would have")
    template = Template(state=directory / STATE, memory=directory / MEMORY, size_mib=vm.config.memory.size_mib)
    try:
        fd = _created(template.state)
        try:
            await vm.save_state(fd)
        finally:
            os.close(fd)
        # Only without a writer can it be sealed.
        await vm.kill()
        _sealed(backing.fd)
        await asyncio.to_thread(_written, template.memory, backing.fd)
    except BaseException:
        for path in (template.state, template.memory):
            path.unlink(missing_ok=True)
        raise
    return template


def _created(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _written(path: Path, source: int) -> None:
    target = _created(path)
    try:
        _copy_without_zeros(source, target, os.fstat(source).st_size)
    finally:
        os.close(target)


def _memfd_from(source: int) -> int:
    fd = os.memfd_create("guest memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        sparse.copy(source, fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _sealed(fd: int) -> int:
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except OSError as error:
        raise HypervisorError(f"cannot seal the memory of a template: {error.strerror}") from error
    return fd


def _copy_without_zeros(source: int, target: int, size: int) -> None:
    """Like `sparse.copy`, and leave a hole for each block that holds nothing but zeros, as free memory may."""
    os.ftruncate(target, size)
    nothing = bytes(ZERO_BLOCK)
    with mmap.mmap(source, size, prot=mmap.PROT_READ) as memory, memoryview(memory) as view:
        for start, end in sparse.extents(source, size):
            for block in range(start, end, ZERO_BLOCK):
                with view[block : min(block + ZERO_BLOCK, end)] as content:
                    if content != nothing[: len(content)]:
                        os.pwrite(target, content, block)


def release_zeros(fd: int) -> None:
    """Give back what a machine's memory takes for zeros, while the machine stands still."""
    for block in _zeros(fd, os.fstat(fd).st_size):
        _release(fd, block, ZERO_BLOCK)


def release_replaced(fd: int, pid: int) -> None:
    """Give back what a memory file has of pages that a machine of its own, alone to map it, has written to; seal it.

    The machine, and what is forked from it, has copies of them.
    """
    for start, end in _replaced(pid, os.fstat(fd).st_ino):
        _release(fd, start, end - start)
    _sealed(fd)


def _release(fd: int, start: int, length: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, ctypes.c_int64(start), ctypes.c_int64(length)) < 0:
        raise OSError(ctypes.get_errno(), "cannot give back memory")


def _replaced(pid: int, inode: int) -> Iterator[tuple[int, int]]:
    """Where a process has pages of its own in its mapping of a file: begin and end of each piece, in the file."""
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/pagemap", "rb") as pagemap:
        for line in maps:
            match = _MAPPING.match(line)
            if match is None or int(match[4]) != inode:
                continue
            begin, end, offset = (int(digits, 16) for digits in match.group(1, 2, 3))
            pagemap.seek(begin // mmap.PAGESIZE * _ENTRY.size)
            entries = pagemap.read((end - begin) // mmap.PAGESIZE * _ENTRY.size)
            piece = None
            for number, (entry,) in enumerate(_ENTRY.iter_unpack(entries)):
                own = bool(entry & (_PRESENT | _SWAPPED)) and not entry & _OF_FILE
                if own and piece is None:
                    piece = number
                elif not own and piece is not None:
                    yield offset + piece * mmap.PAGESIZE, offset + number * mmap.PAGESIZE
                    piece = None
            if piece is not None:
                yield offset + piece * mmap.PAGESIZE, offset + end - begin


def _zeros(source: int, size: int) -> Iterator[int]:
    nothing = bytes(ZERO_BLOCK)
    with mmap.mmap(source, size, prot=mmap.PROT_READ) as memory, memoryview(memory) as view:
        for start, end in sparse.extents(source, size):
            for block in range(start, end - ZERO_BLOCK + 1, ZERO_BLOCK):
                with view[block : block + ZERO_BLOCK] as content:
                    if content == nothing:
                        yield block
