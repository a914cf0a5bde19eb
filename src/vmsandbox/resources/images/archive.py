"""Finds blobs: files of a directory, or members of a tar archive that is indexed once and never unpacked."""

from __future__ import annotations

import os
import posixpath
import stat
import tarfile
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from vmsandbox.errors import InvalidArgumentError, NotFoundError
from vmsandbox.resources.images.description import DOCUMENT_MAX
from vmsandbox.resources.images.streams import Section
from vmsandbox.resources.images.tarstream import TarError, TarReader

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

#: The most members an archive of blobs may have.
_MEMBERS_MAX = 100_000
_LINKS_MAX = 10


class Blobs(Protocol):
    """Where an image's files are read from, by their path relative to its root."""

    def opened(self, name: str) -> AbstractContextManager[Section]:
        """Open one file; raises `NotFoundError`."""
        ...


def document(blobs: Blobs, name: str) -> bytes:
    """Read a small file whole; raises `NotFoundError`, and `InvalidArgumentError` for one that is too large."""
    with blobs.opened(name) as section:
        if section.size > DOCUMENT_MAX:
            raise InvalidArgumentError(f"'{name}' has {section.size} bytes: at most {DOCUMENT_MAX} are allowed")
        return b"".join(iter(lambda: section.read(1 << 20), b""))


class Directory:
    """The files of a directory."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def opened(self, name: str) -> Iterator[Section]:
        """Open one regular file; anything else, a fifo for example, is refused without waiting for it."""
        path = self._path / name
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise NotFoundError(f"'{path}' does not exist") from error
        except OSError as error:
            raise InvalidArgumentError(f"cannot read '{path}': {error.strerror}") from error
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise InvalidArgumentError(f"'{path}' is not a file")
            yield Section(descriptor, 0, status.st_size)
        finally:
            os.close(descriptor)


class Archive:
    """The members of an uncompressed tar archive, open as `descriptor` (which stays the caller's)."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor = descriptor
        self._path = path
        self._files: dict[str, tuple[int, int]] = {}
        self._links: dict[str, str] = {}
        self._index()

    @contextmanager
    def opened(self, name: str) -> Iterator[Section]:
        """Open one member, through symbolic and hard links within the archive."""
        wanted = posixpath.normpath(name)
        for _ in range(_LINKS_MAX):
            if wanted in self._files:
                offset, size = self._files[wanted]
                yield Section(self._descriptor, offset, size)
                return
            if wanted not in self._links:
                break
            wanted = self._links[wanted]
        raise NotFoundError(f"'{self._path}' has no member '{name}'")

    def _index(self) -> None:
        stream = _Seekable(self._descriptor, os.fstat(self._descriptor).st_size)
        reader = TarReader(stream, skip=stream.skip)
        try:
            for count, entry in enumerate(reader):
                if count >= _MEMBERS_MAX:
                    raise TarError(f"it has more than {_MEMBERS_MAX} members")
                name = posixpath.normpath(entry.name).lstrip("/")
                self._files.pop(name, None)
                self._links.pop(name, None)
                if entry.kind == tarfile.REGTYPE and entry.segments is None:
                    self._files[name] = (stream.position, entry.size)
                elif entry.kind == tarfile.SYMTYPE:
                    self._links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), entry.link))
                elif entry.kind == tarfile.LNKTYPE:
                    self._links[name] = posixpath.normpath(entry.link)
        except TarError as error:
            raise InvalidArgumentError(f"'{self._path}' is not a tar archive that can be read: {error}") from error


class _Seekable:
    """A stream over a file that passes over data without reading it."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor = descriptor
        self._size = size
        self.position = 0

    def read(self, size: int, /) -> bytes:
        data = os.pread(self._descriptor, size, self.position)
        self.position += len(data)
        return data

    def skip(self, size: int) -> bool:
        """Pass over `size` bytes; False if there are not so many."""
        self.position += size
        return self.position <= self._size
