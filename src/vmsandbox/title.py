"""Process titles: what `ps` shows of supervisors and stand-ins.  Stdlib only."""

from __future__ import annotations


def set_title(title: str) -> None:
    """Show `title` as this process' command line and, cut to 15 bytes, as its name.

    The kernel reads the command line from the process' own memory, so it is overwritten there; a title longer
    than the original arguments is cut.  Where /proc is not writable the old title stays: it is only for people.
    """
    try:
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rpartition(b") ")[2].split()
        start, end = int(fields[45]), int(fields[46])
        room = end - start
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            memory.seek(start)
            memory.write(title.encode()[: room - 1].ljust(room, b"\0"))
        with open("/proc/self/comm", "wb", buffering=0) as comm:
            comm.write(title.replace(" ", "-").encode()[:15])
    except (OSError, IndexError, ValueError):
        return
