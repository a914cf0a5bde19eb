"""A guest's kernel: parameters that suit the machine the driver builds, and what of it never changes."""

from __future__ import annotations

import mmap
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Literal

#: what an ELF file for x86-64 begins with, and of its header where its tables are and how many entries they have
_MAGIC, _MACHINE = b"\x7fELF\x02\x01", 62
_HEADER = struct.Struct("<16xHH12xQQ6xHHHH2x")
#: type, flags, address, physical address and size in the file
_SEGMENT = struct.Struct("<II8xQQQ16x")
#: type, flags, address and size
_SECTION = struct.Struct("<4xIQQ8xQ24x")
_LOAD, _WRITABLE = 1, 2
_CONTENT, _NOTE = 1, 7
_WRITE, _ALLOC = 1, 2
#: the most between two sections that belong together, in bytes
_PADDING = 64


def constant_pieces(vmlinux: Path) -> tuple[tuple[int, int], ...]:
    """Where in a machine's memory this kernel has code and tables that it neither writes to nor ever gives to a device.

    Whole pages, begin and end of each piece; none for what is no ELF file.  Its data that is constant after its start
    is not among them: a program's own output may come from there (the vDSO is such data).
    """
    with vmlinux.open("rb") as file:
        head = file.read(_HEADER.size)
        if len(head) < _HEADER.size or not head.startswith(_MAGIC):
            return ()
        _, machine, segments_at, sections_at, segment_size, segments, section_size, sections = _HEADER.unpack(head)
        if machine != _MACHINE or segment_size != _SEGMENT.size or section_size != _SECTION.size:
            return ()
        file.seek(segments_at)
        first = file.read(segments * segment_size)
        file.seek(sections_at)
        second = file.read(sections * section_size)
    if (len(first), len(second)) != (segments * segment_size, sections * section_size):
        return ()
    loaded, described = [*_SEGMENT.iter_unpack(first)], [*_SECTION.iter_unpack(second)]
    found: list[tuple[int, int]] = []
    for kind, flags, address, place, length in loaded:
        if kind != _LOAD or flags & _WRITABLE:
            continue
        for sort, rights, begin, size in described:
            inside = address <= begin and begin + size <= address + length
            if inside and sort in (_CONTENT, _NOTE) and rights & (_ALLOC | _WRITE) == _ALLOC:
                start = place + begin - address
                if found and 0 <= start - found[-1][1] <= _PADDING:
                    start = found.pop()[0]
                found.append((start, place + begin - address + size))
    whole = [(-(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE) for start, end in found]
    return tuple((start, end) for start, end in whole if start < end)


def tsc_frequency(khz: int) -> str:
    """Tell an emulated guest how fast the host's time-stamp counter is, which is its own as well.

    Measured in a guest that a busy host lets wait, it can come out many times too slow: then the guest's clock is that
    many times too fast.  The kernel takes a value that is off by less than a hundredth for a first one.
    """
    return f"tsc_early_khz={khz}"


def parameters(
    accel: Literal["kvm", "tcg"], *, hz: int = 250, khz: int | None = None, quiet: bool = True
) -> tuple[str, ...]:
    """Console on the serial port, a panic that ends the VM, memory that is online when it arrives, no slow calibration.

    `hz` is the guest kernel's CONFIG_HZ; with `khz`, the clock, an emulated guest need not measure it, and its
    hot-plugged vCPUs no delays.
    """
    # Memory that could be hot-plugged above 4 GiB makes a kernel set 64 MiB aside for devices that reach no further;
    # there are none.
    found = ["console=ttyS0", "panic=-1", "noreplace-smp", "swiotlb=noforce"]
    # Hot-plugged memory is usable at once, and virtio-mem goes on to plug more: it stops while much is offline.
    found.append("memhp_default_state=online")
    if accel == "tcg":
        found.append("no_timer_check")
        if khz is not None:
            found += [tsc_frequency(khz), f"lpj={khz * 1000 // hz}"]
    if quiet:
        found.append("quiet")
    return tuple(found)
