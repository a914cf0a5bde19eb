"""Time namespaces: clocks that are ahead or behind, for a container that asks for it.

crun 1.8 loses its child when it makes or joins such a namespace beside one for pids, so it is not told: it is started
inside, and what it makes is inside too.  A namespace's offsets can be set until something is in it: it is made by a
thread, for children that this never has.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING, Any

from vmsandbox_agent import syscalls
from vmsandbox_agent.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

CLOCKS = ("monotonic", "boottime")


#: what joins a namespace and becomes a program in it; a new process, because one with threads cannot
_JOIN = (
    "import ctypes, os, sys; fd = os.open(sys.argv[1], os.O_RDONLY | os.O_CLOEXEC); "
    f"failed = ctypes.CDLL(None).setns(fd, {syscalls.CLONE_NEWTIME}); "
    "sys.exit(70) if failed else os.execv(sys.argv[2], sys.argv[2:])"
)


def take(linux: dict[str, Any]) -> int:
    """Take the time namespace out of a ``linux`` section and make it.

    Answers a descriptor of it, -1 if none is asked for.
    """
    namespaces = linux.get("namespaces") or []
    offsets = linux.pop("timeOffsets", None) or {}
    others = [each for each in namespaces if each.get("type") != "time"]
    if len(others) == len(namespaces):
        return -1
    linux["namespaces"] = others
    return made(offsets)


def inside(path: str, argv: Sequence[str]) -> list[str]:
    """The command line that runs `argv` in the time namespace at `path`; `argv` itself without one."""
    return [sys.executable, "-I", "-S", "-B", "-c", _JOIN, path, *argv] if path else [*argv]


def made(offsets: dict[str, Any]) -> int:
    """A descriptor of a new time namespace.  Raises InvalidArgumentError for offsets that the kernel does not take."""
    lines = "".join(
        f"{clock} {int(offsets[clock].get('secs') or 0)} {int(offsets[clock].get('nanosecs') or 0)}\n"
        for clock in CLOCKS
        if offsets.get(clock)
    )
    found: list[int] = []
    failed: list[OSError] = []

    def body() -> None:
        me = f"/proc/{threading.get_native_id()}"
        try:
            syscalls.begin_time_namespace()
            if lines:
                with open(f"{me}/timens_offsets", "w") as file:
                    file.write(lines)
            found.append(os.open(f"{me}/ns/time_for_children", os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=body, name="time namespace")
    thread.start()
    thread.join()
    if failed:
        raise InvalidArgumentError(f"'linux.timeOffsets' cannot be had: {failed[0].strerror}") from failed[0]
    return found[0]
