"""How fast the host's time-stamp counter is, as the host's kernel measured it.

The kernel says it beside every performance counter (perf_event_open(2), `time_mult`), unless it runs in a virtual
machine whose clock is another one.  There nothing changes the processor's clock, and /proc/cpuinfo shows it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import struct
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
#: A value that is read again after a reboot is another by some: so that templates stay what they are, and well below
#: what a guest's kernel makes up for.
STEP_KHZ = 1000

_SYS_PERF_EVENT_OPEN = 298
_ATTR = struct.Struct("=IIQ24xQ88x")
_SOFTWARE, _DUMMY = 1, 9
#: disabled, without the kernel and the hypervisor: what anybody may ask for
_FLAGS = 1 | 1 << 5 | 1 << 6
#: of struct perf_event_mmap_page: the capabilities, and shift and factor from ticks to nanoseconds
_CAPABILITIES = struct.Struct("=40xQ2xHI")
_CAP_USER_TIME = 1 << 3


@cache
def host_khz() -> int | None:
    """The frequency of the host's time-stamp counter in kHz, to the nearest MHz; None if it is not known."""
    khz = _of_perf() or of_cpuinfo(CPUINFO)
    return round(khz / STEP_KHZ) * STEP_KHZ if khz else None


def of_cpuinfo(path: Path) -> int | None:
    """The processor's clock in a virtual machine; None elsewhere, where it changes from moment to moment."""
    try:
        text = path.read_text()
    except OSError:
        return None
    first = text.partition("\n\n")[0]
    match = re.search(r"^cpu MHz\s*:\s*([0-9.]+)$", first, re.MULTILINE)
    is_virtual = re.search(r"^flags\s*:.* hypervisor\b", first, re.MULTILINE)
    return int(float(match[1]) * 1000) if match and is_virtual else None


def of_page(page: bytes) -> int | None:
    """From the first bytes of a struct perf_event_mmap_page."""
    capabilities, shift, factor = _CAPABILITIES.unpack_from(page)
    return (10**6 << shift) // factor if capabilities & _CAP_USER_TIME and factor else None


def _of_perf() -> int | None:
    libc = ctypes.CDLL(None, use_errno=True)
    attributes = ctypes.create_string_buffer(_ATTR.pack(_SOFTWARE, _ATTR.size, _DUMMY, _FLAGS), _ATTR.size)
    fd = libc.syscall(_SYS_PERF_EVENT_OPEN, attributes, 0, -1, -1, 0)
    if fd < 0:
        return None
    try:
        with mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ) as page:
            return of_page(page[: _CAPABILITIES.size])
    except (OSError, ValueError):
        return None
    finally:
        os.close(fd)
