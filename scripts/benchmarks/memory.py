"""Memory of a pod: what would be free if it were not there.

The proportional set size (PSS) of each of its processes counts shared pages in parts, which add up over all who map
them.  It misses pages of the guest's memory that no process has mapped at the moment, because that memory is a file
without a name (a memfd) whose blocks stay whether mapped or not; those are added.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

BLOCK = 512
#: the line that begins a mapping in /proc/PID/smaps, for memfds
MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S+ [0-9a-f]+ [0-9a-f:]+ (\d+) +/memfd:")
HEADER = re.compile(r"^[0-9a-f]+-[0-9a-f]+ ")


@dataclass(frozen=True)
class Footprint:
    """In KiB: PSS by process, what of that is memory files, and what of those is allocated but mapped by none."""

    pss: Mapping[int, int]
    files: int
    unmapped: int

    @property
    def total_mib(self) -> float:
        return (sum(self.pss.values()) + self.unmapped) / 1024


def footprint(pids: Iterable[int]) -> Footprint:
    """The memory of these processes together."""
    pss: dict[int, int] = {}
    files = 0
    allocated: dict[int, int] = {}
    mapped: dict[int, int] = {}
    for pid in pids:
        with suppress(OSError):
            pss[pid] = parse_pss(Path(f"/proc/{pid}/smaps_rollup").read_text())
            for inode, (shared, proportional) in parse_memfds(Path(f"/proc/{pid}/smaps").read_text()).items():
                files += proportional
                # Several processes may map the same pages: the largest share is what is mapped for sure.
                mapped[inode] = max(mapped.get(inode, 0), shared)
            allocated.update(memfds(pid))
    unmapped = sum(max(0, size - mapped.get(inode, 0)) for inode, size in allocated.items())
    return Footprint(pss, files, unmapped)


def memfds(pid: int) -> dict[int, int]:
    """The memory files that a process holds open: inode -> allocated KiB."""
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            if os.readlink(entry).startswith("/memfd:"):
                info = entry.stat()
                found[info.st_ino] = info.st_blocks * BLOCK // 1024
    return found


def parse_pss(text: str) -> int:
    """The KiB of the `Pss` line of smaps_rollup."""
    match = re.search(r"^Pss:\s+(\d+) kB$", text, re.MULTILINE)
    return int(match[1]) if match else 0


def parse_memfds(text: str) -> dict[int, tuple[int, int]]:
    """For each mapped memory file in smaps, by inode: resident KiB of the file itself, and proportional KiB of all.

    What a private mapping has written to (`Anonymous`) is resident, but not in the file.
    """
    found: dict[int, tuple[int, int]] = {}
    inode: int | None = None
    for line in text.splitlines():
        if HEADER.match(line):
            match = MAPPING.match(line)
            inode = int(match[1]) if match else None
        elif inode is not None:
            name, _, value = line.partition(":")
            resident, proportional = found.get(inode, (0, 0))
            if name == "Rss":
                found[inode] = (resident + int(value.split()[0]), proportional)
            elif name == "Anonymous":
                found[inode] = (resident - int(value.split()[0]), proportional)
            elif name == "Pss":
                found[inode] = (resident, proportional + int(value.split()[0]))
    return found
