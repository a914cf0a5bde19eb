"""A process in the guest as the host sees it: its stand-in, its exit, and whoever waits for it."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmsandbox import records
from vmsandbox.errors import is_shortage
from vmsandbox_hypervisor.aio import readable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

#: Exit code of a process whose virtual machine went away under it: as if it had been killed.
LOST_CODE = 137
#: seconds until a stand-in that there was no descriptor for is looked at again
SHORTAGE_PAUSE = 1.0


@dataclass(frozen=True, kw_only=True)
class Exit:
    """How a process ended.  `reason` is set when it was not the process' own doing."""

    code: int
    signal: int = 0
    time_ns: int
    oom_killed: bool = False
    reason: str = ""

    def document(self) -> dict[str, Any]:
        return {
            "code": self.code,
            "signal": self.signal,
            "time_ns": self.time_ns,
            "oom_killed": self.oom_killed,
            "reason": self.reason,
        }

    @classmethod
    def of(cls, document: dict[str, Any]) -> Exit:
        return cls(
            code=int(document["code"]),
            signal=int(document.get("signal", 0)),
            time_ns=int(document["time_ns"]),
            oom_killed=bool(document.get("oom_killed")),
            reason=str(document.get("reason", "")),
        )


async def _handle(pid: int, started: object) -> int | None:
    """A descriptor of a process, None if it is gone; with none to be had its end is noticed later, and not assumed."""
    while True:
        fd = None
        try:
            fd = os.pidfd_open(pid)
            if records.is_alive(pid, started):
                return fd
            os.close(fd)
            return None
        except OSError as error:
            if fd is not None:
                os.close(fd)
            if not is_shortage(error):
                return None
        await asyncio.sleep(SHORTAGE_PAUSE)


class Process:
    """The init process of a container (`exec_id` is empty) or one that was added to it."""

    def __init__(self, container_id: str, exec_id: str, *, terminal: bool, standin: dict[str, Any] | None) -> None:
        self.container_id = container_id
        self.exec_id = exec_id
        self.terminal = terminal
        self.standin = standin
        self.exit: Exit | None = None
        #: the exit that the agent reported while a stand-in was there to hear it behind the last of the output
        self.reported: Exit | None = None
        #: it was started, or failed to: attached stand-ins wait for this
        self.settled = asyncio.Event()
        self.exited = asyncio.Event()
        #: its stand-in has everything (or is gone): nothing is lost any more when the VM goes
        self.delivered = asyncio.Event()
        self.failed = False

    def __str__(self) -> str:
        what = f"exec '{self.exec_id[:12]}' in " if self.exec_id else ""
        return f"{what}container '{self.container_id[:12]}'"

    def has_standin(self) -> bool:
        """Whether a stand-in lives that will take, or has taken, the output and the exit."""
        standin = self.standin or {}
        try:
            return records.is_alive(standin.get("pid"), standin.get("start_time"))
        except OSError:
            return True  # nobody can look now, and whoever watches it will

    def finish(self, status: Exit) -> bool:
        """Record the exit once; says whether this call did."""
        if self.exit is not None:
            return False
        self.exit = status
        self.settled.set()
        self.exited.set()
        if self.standin is None:
            self.delivered.set()
        return True

    def fail(self) -> None:
        """It never came to run: let whoever waits go."""
        self.failed = True
        self.settled.set()
        self.delivered.set()

    async def watch_standin(self, died: Callable[[Process], Awaitable[None]]) -> None:
        """Call `died` when the stand-in is gone although the process is not."""
        standin = self.standin or {}
        pid, started = standin.get("pid"), standin.get("start_time")
        if not isinstance(pid, int):
            return
        fd = await _handle(pid, started)
        if fd is not None:
            try:
                await readable(fd)
            finally:
                os.close(fd)
        self.delivered.set()
        if self.exit is None and not self.failed:
            await died(self)
