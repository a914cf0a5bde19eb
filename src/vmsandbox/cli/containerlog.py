"""A container's log: written by its stand-in, read by `vmsandbox logs`.

One record a line, as the Kubernetes container runtimes write it: time, stream, `F` for a whole line or `P`
for a part of one, text.  A file is rotated when it has reached its size, so that a container
cannot fill the host's disk.  On a disk that others have filled the container goes on; each chunk that comes is another
attempt to write, and a record says how much is missing.
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
        self._fd = -1
        self._size = 0
        #: of what is to be written next: what had no room, at most one chunk's records
        self._rest = b""
        #: bytes of output that came while there was a rest
        self._lost = 0
        self._reason = ""
        self._open()

    def _open(self) -> bool:
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            self._size = os.fstat(self._fd).st_size
            # Of a life that ended on a full disk.
            if self._size and os.pread(self._fd, 1, self._size - 1) != b"\n":
                self._rest = b"\n"
        except OSError as error:
            self._reason = error.strerror or str(error)
            return False
        return True

    def write(self, stream: str, data: bytes) -> None:
        """Append a chunk, or count it as lost while there is no room for what came before."""
        if self._size > self.max_bytes and not self._rest:
            self._rotate()
        if (self._rest or self._lost or self._fd < 0) and not self._caught_up():
            self._lost += len(data)
            return
        head = b"%s %s " % (_stamp(), stream.encode())
        whole, newline, part = data.rpartition(b"\n")
        record = b""
        if newline:
            record = head + b"F " + whole.replace(b"\n", b"\n" + head + b"F ") + b"\n"
        if part:
            record += head + b"P " + part + b"\n"
        self._append(record)

    def _append(self, record: bytes) -> bool:
        """Write as much as there is room for; whether that is everything."""
        try:
            count = os.write(self._fd, record)
        except OSError as error:
            self._reason = error.strerror or str(error)
            count = 0
        self._size += count
        self._rest = record[count:]
        return not self._rest

    def _caught_up(self) -> bool:
        """Write what had no room, then what is missing after it."""
        if self._fd < 0 and not self._open():
            return False
        if self._rest and not self._append(self._rest):
            return False
        if not self._lost:
            return True
        lost, self._lost = self._lost, 0
        text = f"vmsandbox: {lost} bytes of output are missing here: the log could not be written: {self._reason}"
        return self._append(b"%s stderr F %s\n" % (_stamp(), text.encode()))

    def _rotate(self) -> None:
        os.close(self._fd)
        self._fd = -1
        for number in range(self.files - 1, 0, -1):
            older = self.path if number == 1 else f"{self.path}.{number - 1}"
            try:
                os.rename(older, f"{self.path}.{number}")
            except OSError:
                continue
        try:
            if self.files == 1:
                os.truncate(self.path, 0)
        except OSError as error:
            self._reason = error.strerror or str(error)
        self._open()

    def close(self) -> None:
        if self._rest or self._lost:
            self._caught_up()
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
