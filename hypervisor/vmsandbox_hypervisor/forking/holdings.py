"""What a process holds that its fork must not share with it: descriptors and mapped memory.

A fork has a copy of its parent's memory, but the *same* open files.  What both may go on to use has to be harmless:
a kind of descriptor that is not known to be is a reason not to fork.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmsandbox_hypervisor.errors import ForkError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

_EVENT = "anon_inode:[eventfd]"
#: signals come to who reads, so it may be shared
_HARMLESS = frozenset({"anon_inode:[signalfd]", "/dev/null"})
#: flags of /proc/PID/fdinfo
_NONBLOCK = 0o4000
_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) [0-9a-f]+ \S+ (\d+)\s*(.*)")


@dataclass(frozen=True)
class Counter:
    """An eventfd: its value, and whether reading it blocks."""

    value: int
    blocking: bool


@dataclass(frozen=True)
class Range:
    """A range of memory."""

    start: int
    end: int
    writable: bool
    #: inode of the memfd that is mapped shared, 0 for anything else
    shared_inode: int
    #: the kernel was told to leave it out of forks
    left_out: bool


def counters(pid: int, replaced: Collection[int]) -> dict[int, Counter]:
    """The eventfds of a process; `ForkError` if it holds what it must not share, beside what is `replaced`."""
    found = {}
    for number in _numbers(pid):
        if number in replaced:
            continue
        target = os.readlink(f"/proc/{pid}/fd/{number}")
        if target == _EVENT:
            found[number] = _counter(pid, number)
        elif target not in _HARMLESS and not target.startswith(("/memfd:", "/")):
            raise ForkError(f"descriptor {number} of process {pid} cannot be shared: {target}")
    return found


def _numbers(pid: int) -> list[int]:
    return sorted(int(name) for name in os.listdir(f"/proc/{pid}/fd"))


def _counter(pid: int, number: int) -> Counter:
    fields = _fields(f"/proc/{pid}/fdinfo/{number}")
    return Counter(value=int(fields["eventfd-count"], 16), blocking=not int(fields["flags"], 8) & _NONBLOCK)


def _fields(path: str) -> Mapping[str, str]:
    with open(path) as file:
        pairs = (line.split(":", 1) for line in file if ":" in line)
        return {name: value.strip() for name, value in pairs}


def descriptors_of(pid: int, inode: int) -> list[int]:
    """Which descriptors of a process are open on a file without a name."""
    found = []
    for number in _numbers(pid):
        status = os.stat(f"/proc/{pid}/fd/{number}")
        if status.st_ino == inode and os.readlink(f"/proc/{pid}/fd/{number}").startswith("/memfd:"):
            found.append(number)
    return found


def mappings(pid: int) -> Iterator[Range]:
    """The memory of a process."""
    with open(f"/proc/{pid}/smaps") as file:
        start = end = inode = 0
        rights = name = ""
        for line in file:
            if line.startswith("VmFlags:"):
                shared = inode if rights[3] == "s" and name.startswith("/memfd:") else 0
                yield Range(start, end, rights[1] == "w", shared, " dc" in line)
            elif (match := _LINE.match(line)) is not None:
                start, end = int(match[1], 16), int(match[2], 16)
                rights, inode, name = match[3], int(match[4]), match[5]
