"""A QEMU that is forked from one that stands still, with everything of its own that the two must not share.

The fork finds its sockets, taps and disks under the numbers that its parent has them under: QEMU keeps numbers, and
asks for nothing else.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import socket
import struct
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from vmsandbox_hypervisor.api import PrivateMemory, SecurityLabels
from vmsandbox_hypervisor.children import read_start_time
from vmsandbox_hypervisor.errors import ForkError
from vmsandbox_hypervisor.forking.descriptors import descriptor_of
from vmsandbox_hypervisor.forking.fork import fork
from vmsandbox_hypervisor.qemu.argv import descriptors, guest_option

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from vmsandbox_hypervisor.api import Parent, VmConfig

_TUNSETOFFLOAD, _TUNGETVNETHDRSZ, _TUNSETVNETHDRSZ = 0x400454D0, 0x800454D7, 0x400454D8
#: checksums, both TCPs and what QEMU asks for on behalf of every driver that Linux has; UFO, which kernels may lack
_OFFLOADS, _UFO = 0x01 | 0x02 | 0x04 | 0x08, 0x10
_OFD_SETLK = 37
#: seconds that others may take
PATIENCE = 5.0
#: seconds that the parent may take to notice who has gone
_NOTICE = 1.0
#: seconds between two attempts
_INTERVAL = 0.005
#: a lock in /proc/PID/fdinfo
_LOCK = re.compile(r"lock:\s+\d+: OFDLCK\s+ADVISORY\s+(READ|WRITE) -1 \S+ (\d+) (\d+|EOF)")


def check(config: VmConfig, parent: Parent) -> None:
    """Refuse, with `ForkError`, what no fork of `parent` can be."""
    if config.vsock_cid is not None or any(nic.vhost_fd is not None for nic in config.nics):
        raise ForkError(f"'{parent.name}' cannot be forked with what the host's kernel does for its devices")
    if config.labels != SecurityLabels():
        raise ForkError(f"'{parent.name}' cannot be forked under labels, which processes get when they are executed")
    if len(guest_option(config.name)) != len(guest_option(parent.name)):
        raise ForkError(f"'{parent.name}' cannot be renamed to '{config.name}', which is not as long")
    if other := sorted({disk.id for disk in config.disks} ^ set(parent.disks)):
        raise ForkError(f"'{parent.name}' cannot be forked with other disks than it has: '{other[0]}'")


def forked(
    config: VmConfig, parent: Parent, opened: Mapping[str, int], *, stderr: int, settle: Callable[[int], None]
) -> int:
    """The pid of a fork of `parent` that stands still as well.

    `opened` are our descriptors by role, `config` is as `check` wants it.  Raises `ForkError` or `OSError`.
    """
    if not _is_there(parent):
        raise ForkError(f"'{parent.name}' has ended")
    numbers = descriptors(config)
    replaced = {1: stderr, 2: stderr}
    for role, fd in opened.items():
        kind, _, name = role.partition("-")
        if kind == "disk":
            replaced.update(_behind(parent, name, fd))
        elif role != "memory" or not isinstance(config.memory.backing, PrivateMemory):
            replaced[numbers[role]] = fd
        if kind == "nic":
            _equip(fd, parent.pid, numbers[role])
    backing = config.memory.backing
    pieces = () if isinstance(backing, PrivateMemory) else backing.common
    names = {guest_option(parent.name).encode(): guest_option(config.name).encode()}
    return fork(
        parent.pid,
        start_time=parent.start_time,
        replaced=replaced,
        identity=config.confinement,
        words=names,
        settle=settle,
        common={numbers["memory"]: pieces} if pieces else {},
    )


def _is_there(parent: Parent) -> bool:
    try:
        return read_start_time(parent.pid) == parent.start_time
    except ProcessLookupError:
        return False


async def left(parent: Parent) -> None:
    """Wait a moment for `parent` to notice who has hung up, which it does in its own time."""
    with suppress(OSError, TimeoutError):  # the fork says what is wrong
        async with asyncio.timeout(_NOTICE):
            while True:
                if not _is_connected(parent.pid):
                    return
                await asyncio.sleep(_INTERVAL)


def _is_connected(pid: int) -> bool:
    """Whether a process has a socket that does not just listen."""
    for name in os.listdir(f"/proc/{pid}/fd"):
        if os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
            with socket.socket(fileno=descriptor_of(pid, int(name))) as found:
                if not found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    return True
    return False


@asynccontextmanager
async def alone(parent: Parent) -> AsyncIterator[None]:
    """One at a time can hold a process still; `ForkError` if others do that for too long."""
    try:
        lock = os.open(parent.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ForkError(f"'{parent.name}' is gone: {error.strerror}") from error
    try:
        await _locked(lock, parent)
        yield
    finally:
        os.close(lock)


async def _locked(lock: int, parent: Parent) -> None:
    """Wait for the others without a thread, which would go on waiting when we do not."""
    try:
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    await asyncio.sleep(_INTERVAL)
    except TimeoutError as error:
        raise ForkError(f"'{parent.name}' is being forked for more than {PATIENCE:g} s") from error


def _behind(parent: Parent, disk: str, fd: int) -> dict[int, int]:
    """What the parent has open of a disk, to be replaced by our descriptor, which gets the same locks."""
    wanted = parent.disks[disk].stat()
    found = {}
    for name in os.listdir(f"/proc/{parent.pid}/fd"):
        status = os.stat(f"/proc/{parent.pid}/fd/{name}")
        if (status.st_dev, status.st_ino) == (wanted.st_dev, wanted.st_ino):
            found[int(name)] = fd
            _lock_alike(fd, f"/proc/{parent.pid}/fdinfo/{name}")
    if not found:
        raise ForkError(f"'{parent.name}' does not use '{parent.disks[disk]}' as disk '{disk}'")
    return found


def _lock_alike(fd: int, path: str) -> None:
    with open(path) as file:
        locks = _LOCK.findall(file.read())
    for kind, start, end in locks:
        length = 0 if end == "EOF" else int(end) - int(start) + 1
        number = fcntl.F_RDLCK if kind == "READ" else fcntl.F_WRLCK
        fcntl.fcntl(fd, _OFD_SETLK, struct.pack("hhqqi4x", number, os.SEEK_SET, int(start), length, 0))


def _equip(tap: int, pid: int, number: int) -> None:
    """Prepare a tap as QEMU has prepared the parent's."""
    theirs = descriptor_of(pid, number)
    try:
        size = fcntl.ioctl(theirs, _TUNGETVNETHDRSZ, bytes(4))
    finally:
        os.close(theirs)
    fcntl.ioctl(tap, _TUNSETVNETHDRSZ, size)
    try:
        fcntl.ioctl(tap, _TUNSETOFFLOAD, _OFFLOADS | _UFO)
    except OSError:
        fcntl.ioctl(tap, _TUNSETOFFLOAD, _OFFLOADS)
