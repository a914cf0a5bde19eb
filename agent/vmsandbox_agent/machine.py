"""The guest as a machine: what it is, what it uses, and processors and memory that come and go.

Processors that are plugged in are not used until somebody sets them online.  Memory of a virtio-mem device is
onlined by the kernel, as ``auto_online_blocks`` says; there the agent only waits until the total has changed.
"""

from __future__ import annotations

import mmap
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmsandbox_agent import __version__
from vmsandbox_agent.devices import Uevents
from vmsandbox_agent.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable

#: 2: an identity may be rehearsed
PROTOCOL_VERSION = 2
#: how often memory is looked at while it shrinks or grows without a uevent, in seconds
_MEMORY_STEP = 0.02
#: what stays free while memory is cleared: the kernel begins to kill below some 2 MiB
_KEPT_FREE_KIB = 8 * 1024
_PAGE_KIB = mmap.PAGESIZE // 1024


def now_ns() -> int:
    """The wall clock."""
    return time.time_ns()


def since_boot_us() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000


def _take_memory(size: int) -> None:
    """Take so many bytes from the kernel at once, and give them back."""
    mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()


class Machine:
    """Reads and changes the machine through /proc and /sys."""

    def __init__(
        self,
        *,
        proc: Path = Path("/proc"),
        sys: Path = Path("/sys"),
        crun_version: Callable[[], str],
        subscribe: Callable[[], Uevents] = Uevents,
        fill: Callable[[int], None] = _take_memory,
    ) -> None:
        self.phases_us: dict[str, int] = {}
        self._proc = proc
        self._sys = sys
        self._ask_crun = crun_version
        self._crun_version = ""
        self._subscribe = subscribe
        self._fill = fill

    def details(self, *, identified: bool, quickly: bool = False) -> dict[str, Any]:
        """The fields of GuestDetails; the boot id only of a guest that has its identity.

        `quickly` leaves out what has to be asked of another program and was not yet.
        """
        if not self._crun_version and not quickly:
            self._crun_version = self._ask_crun()
        # Reading it fixes it for good, and clones of a template would share it.
        boot_id = _text(self._proc / "sys/kernel/random/boot_id") if identified else ""
        return {
            "kernel_release": os.uname().release,
            "agent_version": __version__,
            "protocol_version": PROTOCOL_VERSION,
            "cpus_online": len(parse_cpus(_text(self._sys / "devices/system/cpu/online"))),
            "memory_total_kib": self._memory()["MemTotal"],
            "boot_id": boot_id,
            "crun_version": self._crun_version,
            "filesystems": [line.split()[-1] for line in _text(self._proc / "filesystems").splitlines() if line],
            "boot_phases_us": {**self.phases_us, "answered": since_boot_us()},
            # Last: it grows old.
            "time_ns": now_ns(),
        }

    def metrics(self) -> dict[str, Any]:
        """The fields of Metrics."""
        memory = self._memory()
        tick = os.sysconf("SC_CLK_TCK")
        names = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
        ticks = dict(zip(names, map(int, _text(self._proc / "stat").split("\n", 1)[0].split()[1:9]), strict=False))
        busy = sum(value for name, value in ticks.items() if name not in ("idle", "iowait"))
        status = _text(self._proc / "self/status")
        rss = re.search(r"^VmRSS:\s+(\d+)", status, re.MULTILINE)
        return {
            "memory_total_kib": memory["MemTotal"],
            "memory_available_kib": memory["MemAvailable"],
            "cpu_usage_us": busy * 1_000_000 // tick,
            "agent_rss_kib": int(rss[1]) if rss else 0,
            "processes": sum(name.isdigit() for name in os.listdir(self._proc)),
            "cpu_ticks": ticks,
        }

    def online_cpus(self, count: int, timeout: float) -> tuple[int, int]:
        """Bring the number of online processors to `count`; answers how many are online and how many present.

        Waits up to `timeout` seconds for processors that are being plugged in.
        """
        if count < 1:
            raise InvalidArgumentError("at least one processor stays online")
        uevents = self._subscribe()
        try:
            deadline = time.monotonic() + timeout
            while True:
                online, present = self._adjust_cpus(count)
                if len(online) == count or not uevents.wait(deadline - time.monotonic()):
                    return len(online), len(present)
        finally:
            uevents.close()

    def _adjust_cpus(self, count: int) -> tuple[list[int], list[int]]:
        cpus = self._sys / "devices/system/cpu"
        present = parse_cpus(_text(cpus / "present"))
        online = parse_cpus(_text(cpus / "online"))
        for cpu in present:
            if len(online) < count and cpu not in online and _switch(cpus / f"cpu{cpu}/online", on=True):
                online.append(cpu)
        for cpu in sorted(online, reverse=True):
            if len(online) > count and _switch(cpus / f"cpu{cpu}/online", on=False):
                online.remove(cpu)
        return online, present

    def online_memory(self, total_kib: int, timeout: float, *, shrink: bool) -> tuple[int, int]:
        """Wait until the total is reached; answers total and available memory in KiB, whatever was reached."""
        uevents = self._subscribe()
        try:
            deadline = time.monotonic() + timeout
            while True:
                self._online_blocks()
                memory = self._memory()
                total = memory["MemTotal"]
                left = deadline - time.monotonic()
                if (total <= total_kib if shrink else total >= total_kib) or left <= 0:
                    return total, memory["MemAvailable"]
                # A virtio-mem device changes the total inside a block without telling user space.
                uevents.wait(min(left, _MEMORY_STEP))
        finally:
            uevents.close()

    def clear_memory(self, *, caches: bool) -> int:
        """Have free memory hold zeros instead of what was freed last; answers how many KiB of it.

        The kernel clears what it gives to a process, so all of it is taken and given back, but for what others may
        need in between.  With `caches` what was read from files counts as free, unless it is in use.
        """
        if caches:
            os.sync()
            (self._proc / "sys/vm/drop_caches").write_text("3")
        size = max(0, self._memory()["MemFree"] - _KEPT_FREE_KIB) // _PAGE_KIB * _PAGE_KIB
        if size:
            self._fill(size * 1024)
        return size

    def _online_blocks(self) -> None:
        """Online what a kernel that does not do so by itself left offline."""
        memory = self._sys / "devices/system/memory"
        if _text(memory / "auto_online_blocks") != "offline":
            return
        for state in memory.glob("memory*/state"):
            if _text(state) == "offline":
                with suppress(OSError):
                    state.write_text("online")

    def _memory(self) -> dict[str, int]:
        table = {"MemTotal": 0, "MemFree": 0, "MemAvailable": 0}
        for line in _text(self._proc / "meminfo").splitlines():
            name, _, value = line.partition(":")
            if name in table:
                table[name] = int(value.split()[0])
        return table


def parse_cpus(text: str) -> list[int]:
    """The numbers in a list like ``0-2,5``."""
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            numbers += range(int(first), int(last or first) + 1)
    return numbers


def _switch(path: Path, *, on: bool) -> bool:
    try:
        path.write_text("1" if on else "0")
    except OSError:
        return False  # the boot processor cannot be switched; one that was unplugged is gone
    return True


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
