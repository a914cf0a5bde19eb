"""Listening unix sockets that exist before the process that serves them does, so nobody polls for a path."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

#: bytes of sun_path, less its terminating zero
PATH_MAX = 107


def listening(path: Path) -> socket.socket:
    """Bind and listen at `path`, for its owner only; a stale socket there is replaced.

    Raises `OSError`; a path that is too long is one with that reason.
    """
    name = str(path)
    if len(name.encode()) > PATH_MAX:
        raise OSError(f"socket path '{name}' is longer than {PATH_MAX} bytes: choose a shorter directory")
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(name)
        # Nobody can connect before listen(), so there is no moment with a wider mode.
        path.chmod(0o600)
        listener.listen(4)
    except BaseException:
        listener.close()
        path.unlink(missing_ok=True)
        raise
    return listener
