"""System calls that are written down instead of made."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field


@dataclass
class Recorder:
    """Stands for `SystemCalls`; a target in `refused` fails with that errno."""

    journal: list[str] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)
    entropy: bytes = b""
    time_ns: int = 0
    hostname: str = ""

    def _try(self, what: str, target: str) -> None:
        self.journal.append(what)
        code = self.refused.get(target)
        if code is not None:
            raise OSError(code, os.strerror(code), target)

    def mount(self, source: str, target: str, fstype: str, flags: int = 0, data: str = "") -> None:
        name = os.path.basename(target)
        self._try(f"mount {source} {name} {fstype} {flags:#x} {data}".rstrip(), target)

    def umount(self, target: str, flags: int = 0) -> None:
        self._try(f"umount {os.path.basename(target)}", f"umount {target}")

    def add_entropy(self, data: bytes) -> None:
        self.journal.append("entropy")
        self.entropy += data

    def set_time(self, time_ns: int) -> None:
        self.journal.append("time")
        self.time_ns = time_ns

    def shift_time(self, shift_ns: int) -> None:
        self.journal.append("shift")
        self.time_ns += shift_ns

    def set_hostname(self, name: str) -> None:
        self.journal.append("hostname")
        self.hostname = name

    def power_off(self) -> None:
        self.journal.append("power off")


BUSY = errno.EBUSY
INVALID = errno.EINVAL
