"""A stand-in's connection to its pod's supervisor, which is not its parent and may die at any time.

Where the connection breaks, the next supervisor is connected to, or started.  What was said over the old connection
may not have arrived, and nothing of it is kept here: whoever connects says again what has to be known.

What a reader would get wrong: nothing here blocks but `connect` and `finish`, and after the stand-in has entered the
container's files nothing may be imported that is not there yet.
"""

from __future__ import annotations

import os
import select
import time
from contextlib import nullcontext

from vmsandbox import wire
from vmsandbox.cli import launch
from vmsandbox.plainsocket import MSG_DONTWAIT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from vmsandbox.cli.runtime import namespaces
    from vmsandbox.paths import Roots, SandboxPaths
    from vmsandbox.plainsocket import UnixSocket

#: seconds before a connection is tried again that broke without having brought anything
RECONNECT_PAUSE = 0.2
#: seconds for what is said last
FINISH_TIMEOUT = 5
#: the most that is received at once, in bytes
RECEIVED = 1024 * 1024


class Attachment:
    """The connection that there is now, if any, and what is to be sent over it."""

    def __init__(self, roots: Roots, sandbox: SandboxPaths, *, starter: int) -> None:
        self.roots = roots
        self.sandbox = sandbox
        #: by which a process outside of our namespaces is asked for the supervisor; -1: we are in none of our own
        self.starter = starter
        #: what this process sees of files, once that is the container's and no longer the host's
        self.enclosure: namespaces.Enclosure | None = None
        self._sock: UnixSocket | None = None
        self._decoder = wire.Decoder()
        self._unsent = bytearray()
        #: whether this connection brought anything: one that did not is not tried again at once
        self._heard = True

    # ------------------------------------------------------------ connecting

    @property
    def connected(self) -> bool:
        return self._sock is not None

    def connect(self, *, first: bool) -> bool:
        """(Re)connect to the supervisor, to which nothing has been said yet; False when the pod is gone."""
        if not first and not self._heard:
            time.sleep(RECONNECT_PAUSE)
        try:
            self._sock = launch.connect(self.sandbox) if first else self._found()
        except OSError:
            return False
        self._decoder = wire.Decoder()
        self._unsent = bytearray()
        self._heard = False
        return True

    def _found(self) -> UnixSocket:
        """The supervisor that is there, or a new one, which must not be in our namespaces."""
        if self.starter < 0:
            return launch.connect_or_take_over(self.roots, self.sandbox)
        from vmsandbox.cli.runtime import starter

        try:
            return starter.ask(self.starter)
        except starter.StarterDiedError:
            return self._awaited()

    def _awaited(self) -> UnixSocket:
        """The supervisor that the next verb starts, since we cannot; FileNotFoundError once the pod is gone."""
        while True:
            with self.enclosure.left() if self.enclosure else nullcontext():
                try:
                    return launch.connect(self.sandbox)
                except (ConnectionRefusedError, FileNotFoundError):
                    if not os.path.exists(self.sandbox.document_file):
                        raise
            time.sleep(RECONNECT_PAUSE)

    def _disconnected(self) -> None:
        assert self._sock is not None
        self._sock.close()
        self._sock = None

    # ------------------------------------------------------------ sending and receiving

    @property
    def backlog(self) -> int:
        """Bytes that are not sent yet."""
        return len(self._unsent)

    def send(self, message: dict[str, Any]) -> None:
        """Have a message sent, as soon as the supervisor takes it."""
        self._unsent += wire.encode_message(message)

    def send_data(self, kind: int, offset: int, data: bytes) -> None:
        """Have a piece of a stream sent, likewise."""
        self._unsent += wire.encode_data(kind, offset, data)

    def register(self, poll: select.poll) -> None:
        """Have `poll` wake up for what `turn` can do."""
        assert self._sock is not None
        poll.register(self._sock, select.POLLIN | (select.POLLOUT if self._unsent else 0))

    def turn(self, ready: dict[int, int]) -> Iterable[wire.Frame]:
        """Send what is taken now, and answer what came; the connection may be gone after that."""
        assert self._sock is not None
        events = ready.get(self._sock.fileno(), 0)
        if events & select.POLLOUT:
            self._flush()
        if self._sock is not None and events & ~select.POLLOUT:
            return self._received()
        return ()

    def _flush(self) -> None:
        assert self._sock is not None
        try:
            count = self._sock.send(self._unsent, MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            self._disconnected()
            return
        del self._unsent[:count]

    def _received(self) -> Iterable[wire.Frame]:
        assert self._sock is not None
        try:
            data = self._sock.recv(RECEIVED, MSG_DONTWAIT)
        except BlockingIOError:
            return ()
        except OSError:
            data = b""
        if not data:
            self._disconnected()
            return ()
        self._heard = True
        return self._decoder.feed(data)

    def finish(self, message: dict[str, Any]) -> None:
        """Send what is left and then this, if there is a connection; nobody waits for it to arrive."""
        if self._sock is None:
            return
        self.send(message)
        self._sock.settimeout(FINISH_TIMEOUT)
        try:
            self._sock.sendall(self._unsent)
        except OSError:
            return
