"""Unix sockets of machines: those that listen exist before whoever serves them, so that nobody polls for a path."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
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


async def hang_up(path: Path) -> None:
    """Be at a port's socket once and go, for whoever was there before and may have gone while the guest was writing.

    QEMU (7.2) finds out by a write that fails, which ends the connection, and then waits for room at what is no
    connection any more: the port stands still for whoever comes next.  The end of another connection sets that right.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        with suppress(OSError):  # who comes next says why
            await asyncio.get_running_loop().sock_connect(sock, str(path))
