"""Files that are there to be locked.  Whoever may open one may hold it against everybody, so only its owner may."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO


def opened(path: str | Path) -> BinaryIO:
    """Open a lock file, which is made if there is none; closing it lets go of what `flock` took.

    Raises `FileNotFoundError` if its directory is gone.
    """
    return open(path, "ab", opener=_private)


def _private(path: str, flags: int) -> int:
    descriptor = os.open(path, flags, 0o600)
    try:
        os.fchmod(descriptor, 0o600)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
