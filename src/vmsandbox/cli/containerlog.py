"""A container's log: written by its stand-in, read by `vmsandbox logs`.

One record a line, as the Kubernetes container runtimes write it: time, stream, `F` for a whole line or `P`
for a part of one, text.  A file is rotated when it has reached its size, so that a container
cannot fill the host's disk.
"""

from __future__ import annotations

import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


def _stamp() -> bytes:
    now = time.time_ns()
    seconds, nanos = divmod(now, 1_000_000_000)
    return (time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{nanos:09d}Z").encode()


class LogWriter:
    """Appends output to a log file, keeping at most `files` files of about `max_bytes` each."""

    def __init__(self, path: str, *, max_bytes: int, files: int) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self.files = files
        self.broken = False
        self._fd = -1
        self._size = 0
        self._open()

    def _open(self) -> None:
        try:
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            self._size = os.fstat(self._fd).st_size
        except OSError:
            self.broken = True

    def write(self, stream: str, data: bytes) -> None:
        """Append a chunk; a log that can no longer be written (disk full) is given up, the container goes on."""
        if self.broken:
            return
        if self._size > self.max_bytes:
            self._rotate()
        head = b"%s %s " % (_stamp(), stream.encode())
        whole, newline, part = data.rpartition(b"\n")
        record = b""
        if newline:
            record = head + b"F " + whole.replace(b"\n", b"\n" + head + b"F ") + b"\n"
        if part:
            record += head + b"P " + part + b"\n"
        try:
            self._size += os.write(self._fd, record)
        except OSError:
            self.broken = True

    def _rotate(self) -> None:
        os.close(self._fd)
        for number in range(self.files - 1, 0, -1):
            older = self.path if number == 1 else f"{self.path}.{number - 1}"
            try:
                os.rename(older, f"{self.path}.{number}")
            except OSError:
                continue
        if self.files == 1:
            os.truncate(self.path, 0)
        self._open()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Record:
    """One line of a log; `partial` text has no newline of its own."""

    __slots__ = ("partial", "stamp", "stream", "text")

    def __init__(self, stamp: str, stream: str, partial: bool, text: bytes) -> None:
        self.stamp = stamp
        self.stream = stream
        self.partial = partial
        self.text = text

    def data(self) -> bytes:
        return self.text if self.partial else self.text + b"\n"


def parse(line: bytes) -> Record | None:
    """Read one line of a log file; None for anything that is not a record."""
    fields = line.rstrip(b"\n").split(b" ", 3)
    if len(fields) != 4 or fields[2] not in (b"F", b"P") or fields[1] not in (b"stdout", b"stderr"):
        return None
    return Record(fields[0].decode("ascii", "replace"), fields[1].decode(), fields[2] == b"P", fields[3])


def files(path: str) -> list[str]:
    """The files of a log, oldest first."""
    found = []
    number = 1
    while os.path.exists(f"{path}.{number}"):
        found.append(f"{path}.{number}")
        number += 1
    return [*reversed(found), *([path] if os.path.exists(path) else [])]


def records(path: str) -> Iterator[Record]:
    for name in files(path):
        try:
            with open(name, "rb") as file:
                for line in file:
                    record = parse(line)
                    if record is not None:
                        yield record
        except FileNotFoundError:
            continue
