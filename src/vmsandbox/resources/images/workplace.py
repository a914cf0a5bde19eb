"""Where an import works before anything of it is in the store.

    work/KEY.lock   held (flock) by the process that imports KEY, and by the file system builder it started
    work/KEY/       what it has made so far

The lock makes two imports of one image do the work once, and tells an import under way from one that was killed:
whatever lies here without a held lock is rubbish.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_SUFFIX = ".lock"


@dataclass(frozen=True)
class Workplace:
    """A directory of one's own, and the descriptor of the lock that says so."""

    directory: Path
    lock: int


@contextmanager
def working(work: Path, key: str | None = None, *, waiting: Callable[[], None] = lambda: None) -> Iterator[Workplace]:
    """Have a directory below `work` for the block, alone for `key` (None: a key of its own).

    While another process works on the same key, `waiting` is called once and then it is waited for.  Leftovers of
    killed imports are removed.
    """
    work.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = key or f"unnamed-{secrets.token_hex(8)}"
    path = work / f"{key}{_SUFFIX}"
    lock = _locked(path, waiting)
    try:
        clean(work)
        directory = work / key
        _remove(directory)
        directory.mkdir(mode=0o700)
        try:
            yield Workplace(directory, lock)
        finally:
            _remove(directory)
    finally:
        # Under the lock: whoever waits for it sees that the file is another's by now.
        path.unlink(missing_ok=True)
        os.close(lock)


def clean(work: Path) -> list[str]:
    """Remove what killed imports left; returns their keys."""
    removed = []
    try:
        entries = os.listdir(work)
    except FileNotFoundError:
        return []
    for key in {entry.removesuffix(_SUFFIX) for entry in entries}:
        path = work / f"{key}{_SUFFIX}"
        lock = _try_lock(path)
        if lock is None:
            continue
        try:
            _remove(work / key)
            path.unlink(missing_ok=True)
            removed.append(key)
        finally:
            os.close(lock)
    return removed


def _locked(path: Path, waiting: Callable[[], None]) -> int:
    lock = _try_lock(path)
    if lock is not None:
        return lock
    waiting()
    while True:
        lock = _open(path)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _same(lock, path):
                return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _try_lock(path: Path) -> int | None:
    lock = _open(path)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _same(lock, path):
            return lock
    except BlockingIOError:
        pass
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _same(lock: int, path: Path) -> bool:
    """Whether the file that was locked is still the one of that name."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(lock), os.stat(path))
    return False


def _remove(directory: Path) -> None:
    if directory.is_symlink() or directory.is_file():
        directory.unlink()
    elif directory.exists():
        shutil.rmtree(directory)
