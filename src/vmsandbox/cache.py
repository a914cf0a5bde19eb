"""Small files that save work: results kept below the run root for the next process.

What is read back decides about configuration and confinement, so it is trusted only if nobody but us can have written
it: a private directory and private regular files, no links.  Anything odd counts as absent, and failing to
write is no error.  Stdlib only.
"""

from __future__ import annotations

import os
import stat
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: files of a kind that are kept
MOST_FILES = 32
MOST_BYTES = 256 * 1024


def read(directory: Path, kind: str, key: str) -> bytes | None:
    """What was stored under `key`, or None if there is nothing that can be trusted."""
    with _opened(directory) as parent:
        if parent is None:
            return None
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            descriptor = os.open(_name(kind, key), flags, dir_fd=parent)
        except OSError:
            return None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or not _private(status, 0o600):
                return None
            data = os.read(descriptor, MOST_BYTES + 1)
        finally:
            os.close(descriptor)
        return data if len(data) <= MOST_BYTES else None


def write(directory: Path, kind: str, key: str, data: bytes) -> None:
    """Store `data` if the directory or its parent exists and can be written; otherwise do nothing.

    The oldest files of the same `kind` (a short word) beyond `MOST_FILES` are removed.
    """
    with suppress(OSError):
        directory.mkdir(mode=0o700)
    with _opened(directory) as parent:
        if parent is None:
            return
        temporary = f".{_name(kind, key)}.{os.getpid()}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with suppress(OSError):
            descriptor = os.open(temporary, flags, 0o600, dir_fd=parent)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
                os.rename(temporary, _name(kind, key), src_dir_fd=parent, dst_dir_fd=parent)
            except OSError:
                os.unlink(temporary, dir_fd=parent)
            _prune(parent, kind)


@contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    """A descriptor of the directory; None unless it is ours and nobody else can enter it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        yield descriptor if _private(os.fstat(descriptor), 0o700) else None
    finally:
        os.close(descriptor)


def _private(status: os.stat_result, mode: int) -> bool:
    return status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) == mode


def _name(kind: str, key: str) -> str:
    return f"{kind}-{key[:32]}"


def _prune(parent: int, kind: str) -> None:
    names = [name for name in os.listdir(parent) if name.lstrip(".").startswith(f"{kind}-")]
    if len(names) > MOST_FILES:
        names.sort(key=lambda name: os.stat(name, dir_fd=parent, follow_symlinks=False).st_mtime_ns)
        for name in names[:-MOST_FILES]:
            os.unlink(name, dir_fd=parent)
