"""Following a log that is being written, without polling: inotify tells of changes, the stand-in's end of the last.

A log is rotated by renaming, so what is followed is a file and not a path: it is read to its end before the next
newer one is opened.
"""

from __future__ import annotations

import ctypes
import os
import select

from vmsandbox.cli import containerlog
from vmsandbox.errors import UnavailableError
from vmsandbox.records import is_alive

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

IN_MODIFY, IN_MOVED_TO, IN_CREATE = 0x2, 0x80, 0x100
#: bytes read at once
CHUNK = 256 * 1024


class Watch:
    """New files in a directory, more in the files that are open, and the end of a process: one thing to wait for.

    The directory also holds the container's writable layer, so changes of just any file in it would be too many.
    """

    def __init__(self, directory: str, pid: object, started: object) -> None:
        self.process = -1
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.inotify: int = self._libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self.inotify < 0:
            raise UnavailableError(f"cannot watch '{directory}': {os.strerror(ctypes.get_errno())}")
        self._add(directory, IN_MOVED_TO | IN_CREATE)
        if isinstance(pid, int) and is_alive(pid, started):
            try:
                self.process = os.pidfd_open(pid)
            except ProcessLookupError:
                pass
            else:
                # Another process may have got the pid between the look and the open.
                if not is_alive(pid, started):
                    os.close(self.process)
                    self.process = -1

    def file(self, fd: int) -> None:
        """Watch an open file as well, whatever its name becomes."""
        self._add(f"/proc/self/fd/{fd}", IN_MODIFY)

    def _add(self, path: str, mask: int) -> None:
        if self._libc.inotify_add_watch(self.inotify, os.fsencode(path), mask) < 0:
            reason = os.strerror(ctypes.get_errno())
            self.close()
            raise UnavailableError(f"cannot watch '{path}': {reason}; 'fs.inotify.max_user_watches' sets the limit")

    def wait(self) -> bool:
        """Wait for a change; False once the process has ended and nothing more will change."""
        if self.process < 0:
            return False
        poll = select.poll()
        poll.register(self.inotify, select.POLLIN)
        poll.register(self.process, select.POLLIN)
        ready = dict(poll.poll())
        if self.inotify in ready:
            self._drain()
        return self.process not in ready

    def _drain(self) -> None:
        try:
            while os.read(self.inotify, 65536):
                pass
        except BlockingIOError:
            return

    def close(self) -> None:
        for fd in (self.inotify, self.process):
            if fd >= 0:
                os.close(fd)
        self.inotify = self.process = -1


class Tail:
    """Reads the files of a log one after the other, wherever they have been renamed to."""

    def __init__(self, path: str, *, opened: Callable[[int], None] = lambda _fd: None) -> None:
        self.path = path
        #: called with each file that is opened, before it is read
        self.opened = opened
        self._fd = -1
        self._rest = b""

    def records(self) -> Iterator[containerlog.Record]:
        """What there is from where the last call ended."""
        if self._fd < 0 and not self._open_oldest():
            return
        while True:
            # Looked up before reading: what was renamed by now gets no more lines, so the end found is its last.
            newer = self._newer()
            yield from self._read()
            if newer is None:
                return
            self._open(newer)

    def _read(self) -> Iterator[containerlog.Record]:
        if os.fstat(self._fd).st_size < os.lseek(self._fd, 0, os.SEEK_CUR):
            os.lseek(self._fd, 0, os.SEEK_SET)  # a log of a single file starts over
            self._rest = b""
        while data := os.read(self._fd, CHUNK):
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                record = containerlog.parse(line)
                if record is not None:
                    yield record

    def _open_oldest(self) -> bool:
        found = containerlog.files(self.path)
        return bool(found) and self._open(found[0])

    def _newer(self) -> str | None:
        """The file after the one that is open; the oldest there is if that one has been removed meanwhile."""
        while True:
            ours = os.fstat(self._fd)
            found = containerlog.files(self.path)
            inodes = [_inode(name) for name in found]
            if ours.st_ino in inodes:
                place = inodes.index(ours.st_ino) + 1
                return found[place] if place < len(found) else None
            if not ours.st_nlink:
                return found[0] if found else None
            # Renamed just while it was looked for.

    def _open(self, path: str) -> bool:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        self.close()
        self._fd = fd
        self._rest = b""
        self.opened(fd)
        return True

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _inode(path: str) -> int:
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return -1
