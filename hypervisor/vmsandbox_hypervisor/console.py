"""What the guest prints: a ring in memory and a bounded file that survives this process.

The console must never block the guest, so whatever arrives is read at once and old text is dropped.  Two bounds:
`RING` bytes are kept in memory, and the file is rewritten with those when it reaches `FILE_MAX`, so a guest that
prints for ever fills neither memory nor disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

RING = 64 * 1024
FILE_MAX = 256 * 1024
#: firmware and kernel print returns of their own before the one that the line discipline adds
_LINE_ENDS = re.compile(r"\r+\n")


class Console:
    """Reads a console socket for as long as it is open."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._ring = bytearray(tail(log, RING))
        self._socket: socket.socket | None = None
        self._fd = -1
        self._size = 0

    def open(self, path: Path) -> None:
        """Connect and follow; the listening end exists, so this does not wait."""
        self._loop = asyncio.get_running_loop()
        self._reopen(os.O_APPEND)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            connection.connect(str(path))
        except BaseException:
            connection.close()
            self.close()
            raise
        self._socket = connection
        self._loop.add_reader(connection, self._read)

    def _reopen(self, flag: int) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | flag, 0o600)
        self._size = os.fstat(self._fd).st_size

    def _read(self) -> bool:
        """Take what there is; False if that was nothing."""
        if self._socket is None:
            return False
        try:
            data = self._socket.recv(RING)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._disconnect()
            return False
        self._append(data)
        return True

    def _append(self, data: bytes) -> None:
        self._ring += data
        del self._ring[:-RING]
        # A full disk costs the file, never the machine.
        with contextlib.suppress(OSError):
            if self._size + len(data) > FILE_MAX:
                replacement = self._log.with_name(self._log.name + ".new")
                replacement.unlink(missing_ok=True)
                replacement.touch(mode=0o600, exist_ok=False)
                replacement.write_bytes(self._ring)
                replacement.replace(self._log)
                self._reopen(os.O_APPEND)
            else:
                self._size += os.write(self._fd, data)

    def drain(self) -> None:
        """Take what has arrived but was not read yet; for after QEMU's end, when nothing more can come."""
        while self._read():
            pass

    def text(self) -> str:
        """The ring, as it may be shown."""
        return shown(self._ring)

    def lines(self, count: int | None = None) -> list[str]:
        """The last `count` lines that are not empty; without `count` all that are kept."""
        lines = [line for line in self.text().split("\n") if line.strip()]
        return lines if count is None else lines[-count:]

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._loop.remove_reader(self._socket)
            self._socket.close()
            self._socket = None

    def close(self) -> None:
        self._disconnect()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def shown(output: bytes | bytearray) -> str:
    """Lines of text; the guest chose the bytes, so nothing is left that would steer a terminal."""
    text = _LINE_ENDS.sub("\n", output.decode(errors="replace"))
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "?" for letter in text)


def tail(path: Path, count: int) -> bytes:
    """The last `count` bytes of a file; nothing if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - count))
            return file.read(count)
    except OSError:
        return b""
