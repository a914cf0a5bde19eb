"""The client's side of the nursery: have it fork a supervisor or a stand-in, or start one.  Stdlib only."""

from __future__ import annotations

import fcntl
import os

from vmsandbox import wire
from vmsandbox.plainsocket import UnixSocket, send_descriptors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from vmsandbox.paths import Roots
    from vmsandbox.plainsocket import Socket

#: seconds an idle nursery takes at most to greet, on a busy machine
PATIENCE = 1.0
#: seconds it may take where nothing but memory is to be had from it
SHORT = 0.1


def forked(roots: Roots, listener: Socket, log: int, arguments: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Have the nursery fork a supervisor on `listener`; False if there is none for us.

    Raises `OSError` or `WireError` when it went away in the middle: then nobody knows whether there is a supervisor.
    """
    request = {"arguments": [*arguments], "environment": {**environment}}
    return _asked(roots, request, [log, listener.fileno()], patience=PATIENCE) is not None


def standin(roots: Roots, words: Sequence[str], environment: Mapping[str, str]) -> int | None:
    """The pid of a stand-in that it has forked with these `words`; otherwise as `forked`."""
    return _asked(roots, {"standin": [*words], "environment": {**environment}}, [], patience=SHORT)


def _asked(roots: Roots, request: dict[str, Any], descriptors: Sequence[int], *, patience: float) -> int | None:
    with UnixSocket() as nursery:
        nursery.settimeout(patience)
        try:
            nursery.connect(roots.nursery_file)
            if wire.receive(nursery) is None:
                return None
        except OSError:
            return None
        nursery.settimeout(None)
        encoded = wire.encode_message(request)
        send_descriptors(nursery, encoded[: wire.HEAD.size], descriptors)
        nursery.sendall(encoded[wire.HEAD.size :])
        answer = wire.receive(nursery)
        if answer is None:
            raise wire.WireError("the nursery ended before it answered")
        pid: int | None = answer.message()["pid"]
        return pid


def place(roots: Roots) -> UnixSocket | None:
    """A bound socket for a new nursery; None if somebody else makes one, or one is there that is not for us."""
    lock = os.open(roots.nursery_file + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with UnixSocket() as probe:
            try:
                probe.connect(roots.nursery_file)
                return None
            except OSError:
                pass
        try:
            os.unlink(roots.nursery_file)
        except FileNotFoundError:
            pass
        made = UnixSocket()
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
