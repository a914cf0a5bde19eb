"""What a process holds that its fork must not share with it: descriptors and mapped memory.

A fork has a copy of its parent's memory, but the *same* open files.  What both may go on to use has to be harmless:
a kind of descriptor that is not known to be is a reason not to fork, and so is memory that cannot be told apart.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmsandbox_hypervisor.errors import ForkError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

_EVENT = "anon_inode:[eventfd]"
#: signals come to who reads
_SIGNALS = "anon_inode:[signalfd]"
#: null, zero, full, random, urandom
_DEVICES = frozenset(os.makedev(1, minor) for minor in (3, 5, 7, 8, 9))
#: of descriptors that only name a file
_PATH = 0o10000000
_MEMFD = "/memfd:"
_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) \S+ (\d+)\s*(.*)")
_RIGHTS = {"r": mmap.PROT_READ, "w": mmap.PROT_WRITE, "x": mmap.PROT_EXEC}


@dataclass(frozen=True)
class Counter:
    """An eventfd: its value, and how it was made."""

    value: int
    flags: int

    def again(self) -> int:
        """Another one like it; the caller closes it."""
        fd = os.eventfd(0, self.flags | os.EFD_CLOEXEC)
        os.eventfd_write(fd, self.value)
        return fd


@dataclass(frozen=True)
class Range:
    """A range of memory."""

    start: int
    end: int
    #: as mmap(2) takes them
    rights: int
    #: where in its file it begins
    offset: int
    #: of the memfd that is mapped shared, 0 for anything else
    shared_inode: int
    #: the kernel was told to leave it out of forks
    left_out: bool

    @property
    def length(self) -> int:
        return self.end - self.start


def counters(pid: int, replaced: Collection[int]) -> dict[int, Counter]:
    """The eventfds of a process; `ForkError` if it holds what it must not share, beside what is `replaced`."""
    found = {}
    numbers = _numbers(pid)
    if missing := sorted(set(replaced).difference(numbers)):
        raise ForkError(f"process {pid} has no descriptor {missing[0]}")
    for number in numbers:
        if number in replaced:
            continue
        target = os.readlink(_place(pid, number))
        if target == _EVENT:
            found[number] = _counter(pid, number)
        elif target != _SIGNALS and not _is_harmless(pid, number, target):
            raise ForkError(f"descriptor {number} of process {pid} cannot be shared: {target}")
    return found


def _is_harmless(pid: int, number: int, target: str) -> bool:
    """Whether nobody notices who else has it open: files that are only read."""
    status = os.stat(_place(pid, number))
    if stat.S_ISCHR(status.st_mode):
        return status.st_rdev in _DEVICES
    if not target.startswith("/") or not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        return False
    flags = int(_fields(pid, number)["flags"], 8)
    return bool(flags & _PATH) or flags & os.O_ACCMODE == os.O_RDONLY or _is_sealed(pid, number, target)


def _is_sealed(pid: int, number: int, target: str) -> bool:
    if not target.startswith(_MEMFD):
        return False
    fd = os.open(_place(pid, number), os.O_RDONLY | os.O_CLOEXEC)
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE)
    finally:
        os.close(fd)


def _place(pid: int, number: int) -> str:
    return f"/proc/{pid}/fd/{number}"


def _numbers(pid: int) -> list[int]:
    return sorted(int(name) for name in os.listdir(f"/proc/{pid}/fd"))


def _counter(pid: int, number: int) -> Counter:
    fields = _fields(pid, number)
    flags = int(fields["flags"], 8) & os.EFD_NONBLOCK
    if fields.get("eventfd-semaphore", "0") != "0":
        flags |= os.EFD_SEMAPHORE
    return Counter(value=int(fields["eventfd-count"], 16), flags=flags)


def _fields(pid: int, number: int) -> Mapping[str, str]:
    with open(f"/proc/{pid}/fdinfo/{number}") as file:
        pairs = (line.split(":", 1) for line in file if ":" in line)
        return {name: value.strip() for name, value in pairs}


def descriptors_of(pid: int, inode: int) -> list[int]:
    """Which descriptors of a process are open on a memfd."""
    found = []
    for number in _numbers(pid):
        place = _place(pid, number)
        if os.stat(place).st_ino == inode and os.readlink(place).startswith(_MEMFD):
            found.append(number)
    return found


def mappings(pid: int) -> Iterator[Range]:
    """The memory of a process; `ForkError` at what it shares with others without a memfd."""
    with open(f"/proc/{pid}/smaps") as file:
        for line in file:
            if (match := _LINE.match(line)) is not None:
                start, end, rights, offset, inode, name = match.groups()
            elif line.startswith("VmFlags:"):
                flags = line.split()
                memfd = name.startswith(_MEMFD)
                if "sh" in flags and not memfd:
                    raise ForkError(f"process {pid} has memory that cannot be shared: {name or start}")
                yield Range(
                    start=int(start, 16),
                    end=int(end, 16),
                    rights=sum(number for letter, number in _RIGHTS.items() if letter in rights),
                    offset=int(offset, 16),
                    shared_inode=int(inode) if memfd and rights[3] == "s" else 0,
                    left_out="dc" in flags,
                )
