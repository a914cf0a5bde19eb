"""A validated configuration, kept so that the next process need not validate it again.

Importing pydantic and building its schema costs more than everything else a supervisor does before it spawns QEMU.
The cache is one small JSON file per distinct input below the run root, named by the hash of that input.  It is
only ever a shortcut: whatever is odd about it (owner, mode, content) makes it count as absent, and failing to
write it is no error.
"""

from __future__ import annotations

import json
import os
import stat
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

from vmsandbox.config.model import SECTIONS, Settings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: files kept; each distinct set of overrides has its own
MOST_FILES = 32
MOST_BYTES = 64 * 1024


@contextmanager
def _directory(path: Path) -> Iterator[int | None]:
    """An open descriptor of the cache directory; None unless it is ours and nobody else can enter it."""
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


def read(directory: Path, key: str) -> Settings | None:
    """The settings stored under `key`, or None if there are none that can be trusted."""
    with _directory(directory) as parent:
        if parent is None:
            return None
        try:
            descriptor = os.open(_name(key), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=parent)
        except OSError:
            return None
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or not _private(status, 0o600):
            os.close(descriptor)
            return None
        with os.fdopen(descriptor, "rb") as file:
            return _decoded(file.read(MOST_BYTES), key)


def write(directory: Path, key: str, settings: Settings) -> None:
    """Store `settings` if the run root exists and can be written; otherwise do nothing."""
    with suppress(OSError):
        directory.mkdir(mode=0o700)
    with _directory(directory) as parent:
        if parent is None:
            return
        temporary = f".{_name(key)}.{os.getpid()}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with suppress(OSError):
            descriptor = os.open(temporary, flags, 0o600, dir_fd=parent)
            try:
                with os.fdopen(descriptor, "w") as file:
                    json.dump({"key": key, "settings": asdict(settings)}, file)
                os.rename(temporary, _name(key), src_dir_fd=parent, dst_dir_fd=parent)
            except OSError:
                os.unlink(temporary, dir_fd=parent)
            _prune(parent)


def _name(key: str) -> str:
    return f"config-{key[:32]}.json"


def _decoded(data: bytes, key: str) -> Settings | None:
    """Settings from a document that this module wrote; None for any other content."""
    try:
        document = json.loads(data)
        if document["key"] != key:
            return None
        values = document["settings"]
        return Settings(**{name: cls(**values[name]) for name, cls in SECTIONS.items()})
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _prune(parent: int) -> None:
    names = [name for name in os.listdir(parent) if "config-" in name]
    if len(names) > MOST_FILES:
        names.sort(key=lambda name: os.stat(name, dir_fd=parent, follow_symlinks=False).st_mtime_ns)
        for name in names[:-MOST_FILES]:
            os.unlink(name, dir_fd=parent)
