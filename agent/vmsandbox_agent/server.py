"""Serving hosts at sockets, whose connections the kernel begins and ends."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vmsandbox_agent.link import Answering

_PIECE = 128 * 1024


class ServedSocket:
    """Serves the connections that a listening socket accepts."""

    def __init__(self, listener: socket.socket, connect: Callable[[], Answering]) -> None:
        """`connect` makes what serves a host that has come."""
        self._listener = listener
        self._connect = connect
        self._served: set[Answering] = set()
        self._thread = threading.Thread(target=self._accept, name="accept", daemon=True)

    @classmethod
    def at_path(cls, path: Path, connect: Callable[[], Answering]) -> ServedSocket:
        """At a unix socket; raises OSError."""
        path.unlink(missing_ok=True)
        return cls(_listening(socket.socket, socket.AF_UNIX, str(path)), connect)

    @classmethod
    def at_vsock(
        cls, port: int, connect: Callable[[], Answering], *, make: Callable[[int, int], socket.socket] = socket.socket
    ) -> ServedSocket:
        """At a port of vsock; raises OSError.  `make` makes a socket of a family and type."""
        return cls(_listening(make, socket.AF_VSOCK, (socket.VMADDR_CID_ANY, port)), connect)

    def start(self) -> None:
        self._thread.start()

    def drain(self, timeout: float) -> None:
        """Wait until what was answered last has been handed to the kernel, which sends it."""
        for connection in [*self._served]:
            connection.drain(timeout)

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except ConnectionAbortedError:
                continue  # a host that has left already
            except OSError:
                return  # tried again at once, it would fail again at once
            connection = self._connect()
            self._served.add(connection)
            for target in (self._receive, self._send):
                threading.Thread(target=target, args=(peer, connection), name="socket", daemon=True).start()

    def _receive(self, peer: socket.socket, connection: Answering) -> None:
        with suppress(OSError):
            while (data := peer.recv(_PIECE)) and connection.receive(data):
                pass
        self._served.discard(connection)
        connection.end()

    def _send(self, peer: socket.socket, connection: Answering) -> None:
        with peer:
            with suppress(OSError):
                while data := connection.take(_PIECE):
                    peer.sendall(data)
            connection.end()
            with suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)


def _listening(make: Callable[[int, int], socket.socket], family: int, address: object) -> socket.socket:
    listener = make(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.bind(address)  # type: ignore[arg-type]
        listener.listen(8)
    except OSError:
        listener.close()
        raise
    return listener
