"""Processes of virtual machines, found by what their command lines say, and their end.

For machines that no document tells of: whoever started one was killed before it could write that down.  Stdlib only.
"""

from __future__ import annotations

import os

from vmsandbox.errors import is_shortage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

#: seconds for a process that was killed to be gone
PATIENCE = 5.0
_SIGKILL = 9


def command_line(pid: int) -> list[bytes]:
    """The words a process was started with; none if it has ended."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().split(b"\0")[:-1]
    except OSError as error:
        if is_shortage(error):
            raise  # to find no machine would mean that there is none
        return []


def processes(directory: str) -> Iterator[int]:
    """QEMU and virtiofsd processes of the machine that has this run directory."""
    name = f"guest=vmsandbox-{os.path.basename(directory)},".encode()
    place = os.fsencode(f"{directory}/")
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        words = command_line(int(entry))
        helper = words and (b"qemu" in words[0] or b"virtiofsd" in words[0])
        if helper and any(word.startswith(name) or place in word for word in words):
            yield int(entry)


def end(pid: int) -> None:
    """Kill a process and wait until it is gone."""
    import select
    import signal

    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(fd, _SIGKILL)
        poll = select.poll()  # select() takes no descriptor beyond 1023
        poll.register(fd, select.POLLIN)
        poll.poll(PATIENCE * 1000)
    except ProcessLookupError:
        return
    finally:
        os.close(fd)


def end_all(directory: str) -> list[int]:
    """End what runs of the machine that has this run directory; answers the processes."""
    found = [*processes(directory)]
    for pid in found:
        end(pid)
    return found
