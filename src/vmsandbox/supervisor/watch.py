"""Waiting for what goes from directories, by inotify."""

from __future__ import annotations

import ctypes
import os
import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from types import TracebackType

MOVED_FROM, DELETED, MOVED_ITSELF = 0x40, 0x200, 0x800
_CLOEXEC: Final = 0o2000000
_EVENTS: Final = 64 * 1024
#: watch, mask, cookie, length of the name
_EVENT: Final = struct.Struct("iIII")


class Watch:
    """A descriptor that is readable when something in a directory goes, or the directory moves.

    Of the directory's own removal nobody is told while our socket is in it.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.fd: int = self._libc.inotify_init1(_CLOEXEC)
        self._named: set[int] = set()
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "nothing can be watched")

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.fd)

    def add(self, directory: str, mask: int, *, names: bool = False) -> None:
        """Watch a directory too; it must exist now.  `gone` tells the `names` of what goes."""
        number = self._libc.inotify_add_watch(self.fd, os.fsencode(directory), mask)
        if number < 0:
            raise OSError(ctypes.get_errno(), f"'{directory}' cannot be watched")
        if names:
            self._named.add(number)

    def gone(self) -> list[str]:
        """What is gone since the last call."""
        data, found = os.read(self.fd, _EVENTS), []
        while data:
            number, _, _, length = _EVENT.unpack_from(data)
            if number in self._named:
                found.append(os.fsdecode(data[_EVENT.size : _EVENT.size + length].rstrip(b"\0")))
            data = data[_EVENT.size + length :]
        return found
