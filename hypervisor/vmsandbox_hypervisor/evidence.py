"""What is left to look at when a VM is in trouble: how far it came, QEMU's stderr, the last lines of the console."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from vmsandbox_hypervisor.console import Console, shown, tail

if TYPE_CHECKING:
    from pathlib import Path

STDERR_MAX = 8 * 1024
CONSOLE_LINES = 40
#: of what the console shows before a panic
LINES_BEFORE = 10
#: letters of a console line that go into a message
TELLING_MAX = 200
CONSOLE_LOG = "console.log"
STDERR_LOG = "qemu.stderr"
_PANIC = re.compile(r"Kernel panic - not syncing: .*")
#: that the first program is missing or has ended says nothing about why; what was printed before that does
_ABOUT_INIT = re.compile(r"kill init|mount root|No working init|Requested init")
_TIME = re.compile(r"^\[ *\d+\.\d+\] ")
_PROGRAM = re.compile(r"^(?:qemu[-\w]*|setpriv): ")


class Evidence:
    """Reads all of it, also after the files have been removed."""

    def __init__(self, directory: Path) -> None:
        self.console = Console(directory / CONSOLE_LOG)
        #: seconds since exec, by phase, as far as it came
        self.phases: dict[str, float] = {}
        self._path = directory / STDERR_LOG
        self._kept: str | None = None

    def stderr(self) -> str:
        """The last 8 KiB that QEMU and its helpers printed."""
        if self._kept is not None:
            return self._kept
        return shown(tail(self._path, STDERR_MAX))

    def text(self) -> str:
        """Everything, with headings; what there is nothing of is said as well."""
        reached = ", ".join(f"{phase} after {seconds:.2f} s" for phase, seconds in self.phases.items())
        parts = [f"reached: {reached}"] if reached else []
        stderr = self.stderr().strip()
        parts.append(f"stderr of QEMU:\n{stderr}" if stderr else "stderr of QEMU: empty")
        lines = self._console_lines()
        parts.append("\n".join(["last lines of the console:", *lines]) if lines else "the console is empty")
        return "\n".join(parts)

    def _console_lines(self) -> list[str]:
        lines = self.console.lines()
        at = _panic_in(lines)
        start = max(0, len(lines) - CONSOLE_LINES)
        if at is None:
            return lines[start:]
        # The registers and calls that a kernel prints after it can be more lines than are shown.
        before = max(0, at - LINES_BEFORE)
        return lines[min(before, start) :] if at + 1 >= start else [*lines[before : at + 1], "...", *lines[start:]]

    def reason(self) -> str:
        """The line of stderr that most likely names the cause; empty if there is none."""
        return reason_in(self.stderr())

    def panic(self) -> str:
        """The words in which the guest's kernel says why it gave up; empty if it does not.

        Before those that only say that there is no first program (any more) come the last two lines that say why.
        """
        lines = self.console.lines()
        at = _panic_in(lines)
        if at is None:
            return ""
        panic = str(_PANIC.findall(lines[at])[-1]).strip()
        if not _ABOUT_INIT.search(panic):
            return panic
        telling = list(dict.fromkeys(_TIME.sub("", line).strip()[:TELLING_MAX] for line in reversed(lines[:at])))
        return "; ".join([*reversed(telling[:2]), panic])

    def keep(self) -> None:
        """Remember the stderr: its file is about to go."""
        if self._kept is None:
            self._kept = self.stderr()


def _panic_in(lines: list[str]) -> int | None:
    return next((at for at in reversed(range(len(lines))) if _PANIC.search(lines[at])), None)


def reason_in(stderr: str) -> str:
    """The last line that is not a warning, without the program's name."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    telling = [line for line in lines if "warning:" not in line]
    return _PROGRAM.sub("", (telling or lines or [""])[-1])
