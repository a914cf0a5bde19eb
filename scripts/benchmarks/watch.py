"""Watching a pod from outside: when its files appear and change, and what its documents say.

The kernel reports changes below the run root (inotify) the moment they happen and costs the pod nothing, so the phases
of a `run --rm`, whose documents are gone at its end, are measured on the very run that is timed.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from types import TracebackType

IN_CLOEXEC = 0o2000000
IN_NONBLOCK = 0o4000
IN_CREATE = 0x100
IN_MOVED_TO = 0x80
IN_ISDIR = 0x40000000
IN_ONLYDIR = 0x1000000
HEAD = struct.Struct("iIII")


@dataclass(frozen=True)
class Seen:
    """A file that appeared or was replaced: when (`time.monotonic`), where, and what it said if it is a document."""

    time: float
    path: str
    document: dict[str, Any] | None = None


class Watch:
    """Collects what happens below a directory for the duration of the block, in `seen`.

    What is there already when the block begins is left alone.
    """

    def __init__(self, directory: Path) -> None:
        self._top = str(directory)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._paths: dict[int, str] = {}
        self.seen: list[Seen] = []

    def __enter__(self) -> Self:
        self._fd = self._libc.inotify_init1(IN_CLOEXEC | IN_NONBLOCK)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._add(self._top, reporting=False)
        self._thread = threading.Thread(target=self._follow, name=f"watch {self._top}", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        os.close(self._fd)
        os.close(self._stop)

    def _add(self, directory: str, *, reporting: bool = True) -> None:
        """Watch a directory, and report what came into it before that."""
        flags = IN_CREATE | IN_MOVED_TO | IN_ONLYDIR
        number = self._libc.inotify_add_watch(self._fd, os.fsencode(directory), flags)
        if number < 0:
            return  # gone already
        self._paths[number] = directory
        try:
            entries = list(os.scandir(directory))
        except OSError:
            return
        for entry in entries if reporting else ():
            self._take(entry.path, is_directory=entry.is_dir(follow_symlinks=False))

    def _follow(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        while True:
            ready = dict(poll.poll())
            if self._fd in ready:
                self._read()
            elif self._stop in ready:
                return

    def _read(self) -> None:
        data = os.read(self._fd, 65536)
        offset = 0
        while offset < len(data):
            number, mask, _, length = HEAD.unpack_from(data, offset)
            name = data[offset + HEAD.size : offset + HEAD.size + length].rstrip(b"\0")
            offset += HEAD.size + length
            if name and number in self._paths:
                self._take(f"{self._paths[number]}/{os.fsdecode(name)}", is_directory=bool(mask & IN_ISDIR))

    def _take(self, path: str, *, is_directory: bool) -> None:
        now = time.monotonic()
        document = None
        if path.endswith(".json"):
            try:
                loaded = json.loads(Path(path).read_bytes())
            except (OSError, ValueError):
                loaded = None
            document = loaded if isinstance(loaded, dict) else None
        self.seen.append(Seen(now, path[len(self._top) + 1 :], document))
        if is_directory:
            self._add(path)
