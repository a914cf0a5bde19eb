"""The client's side of the nursery: have it fork a supervisor, or start one.  Stdlib only."""

from __future__ import annotations

import fcntl
import os
import socket

from vmsandbox import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vmsandbox.paths import Roots

#: seconds an idle nursery takes at most to greet, on a busy machine
PATIENCE = 1.0


def forked(
    roots: Roots, listener: socket.socket, log: int, arguments: Sequence[str], environment: Mapping[str, str]
) -> int | None:
    """The pid of a supervisor that the nursery forked on `listener`; None if there is none for us.

    Raises `OSError` or `WireError` when it went away in the middle: then nobody knows whether there is a supervisor.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as nursery:
        nursery.settimeout(PATIENCE)
        try:
            nursery.connect(roots.nursery_file)
            if wire.receive(nursery) is None:
                return None
        except OSError:
            return None
        nursery.settimeout(None)
        request = wire.encode_message({"arguments": [*arguments], "environment": {**environment}})
        socket.send_fds(nursery, [request[: wire.HEAD.size]], [log, listener.fileno()])
        nursery.sendall(request[wire.HEAD.size :])
        answer = wire.receive(nursery)
        if answer is None:
            raise wire.WireError("the nursery ended before it answered")
        return int(answer.message()["pid"])


def place(roots: Roots) -> socket.socket | None:
    """A bound socket for a new nursery; None if somebody else makes one, or one is there that is not for us."""
    lock = os.open(roots.nursery_file + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(roots.nursery_file)
                return None
            except OSError:
                pass
        try:
            os.unlink(roots.nursery_file)
        except FileNotFoundError:
            pass
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        old = os.umask(0o177)
        try:
            made.bind(roots.nursery_file)
            made.listen(16)
        except OSError:
            made.close()
            return None
        finally:
            os.umask(old)
        return made
    except BlockingIOError:
        return None
    finally:
        os.close(lock)
