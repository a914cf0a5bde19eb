"""What is left to look at when a VM is in trouble: QEMU's stderr and the last lines of the console."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from vmsandbox_hypervisor.console import Console, shown, tail

if TYPE_CHECKING:
    from pathlib import Path

STDERR_MAX = 8 * 1024
CONSOLE_LINES = 40
CONSOLE_LOG = "console.log"
STDERR_LOG = "qemu.stderr"
_PANIC = re.compile(r"Kernel panic - not syncing: .*")
_PROGRAM = re.compile(r"^(?:qemu[-\w]*|setpriv): ")


class Evidence:
    """Reads both, also after the files have been removed."""

    def __init__(self, directory: Path) -> None:
        self.console = Console(directory / CONSOLE_LOG)
        self._path = directory / STDERR_LOG
        self._kept: str | None = None

    def stderr(self) -> str:
        """The last 8 KiB that QEMU and its helpers printed."""
        if self._kept is not None:
            return self._kept
        return shown(tail(self._path, STDERR_MAX))

    def text(self) -> str:
        """Both, with headings; empty if there is nothing."""
        parts = []
        if stderr := self.stderr().strip():
            parts.append(f"stderr of QEMU:\n{stderr}")
        if lines := self.console.lines(CONSOLE_LINES):
            # The registers and calls that a kernel prints after it can be more lines than are shown.
            panic = self.panic()
            first = [panic, "..."] if panic and not any(panic in line for line in lines) else []
            parts.append("\n".join(["last lines of the console:", *first, *lines]))
        return "\n".join(parts)

    def reason(self) -> str:
        """The line of stderr that most likely names the cause; empty if there is none."""
        return reason_in(self.stderr())

    def panic(self) -> str:
        """The line in which the guest's kernel says why it gave up; empty if it does not."""
        found = _PANIC.findall(self.console.text())
        return found[-1].strip() if found else ""

    def keep(self) -> None:
        """Remember the stderr: its file is about to go."""
        if self._kept is None:
            self._kept = self.stderr()


def reason_in(stderr: str) -> str:
    """The last line that is not a warning, without the program's name."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    telling = [line for line in lines if "warning:" not in line]
    return _PROGRAM.sub("", (telling or lines or [""])[-1])
