"""The guest's end of the byte pipe to the host, relayed to the socket that gRPC serves.

`Port` is any virtio-serial port on which hosts come and go, `PortRelay` the one that carries gRPC.  That has two
threads: one takes what the host sends, looks for hellos and passes payload on, the other sends what gRPC answers.  A
port is opened once and non-blocking, and waited for with edge-triggered epoll: while no host is connected it reports
a hang-up all the time, and a level-triggered wait would spin.

`vmsandbox_protocol.link` says what crosses the port.  A vsock connection needs none of that: the kernel begins and
ends it, so bytes are passed through as they are.
"""

from __future__ import annotations

import os
import select
import socket
import threading
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Protocol

from vmsandbox_protocol import link

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

#: A port's buffers are pages; one vector takes many of them in one call.
_PAGE = 4096
_PAGES = 64
_SEND = 128 * 1024
#: seconds that gRPC may take to accept input before the session is given up
_STALLED = 60


class Session(Protocol):
    """One host's use of a port."""

    def receive(self, data: memoryview) -> bool:
        """Take what the host sent, without keeping `data`; False if the session is over."""

    def end(self) -> None:
        """Stop sending, even within a frame, and close everything."""


class Port:
    """Reads one port; a session per hello."""

    def __init__(self, port: int, begin: Callable[[int, bytes], Session], *, name: str = "port") -> None:
        """Takes over the descriptor of a port, which has to be non-blocking.

        `begin` makes a session out of the port and a hello's digits; raises OSError if there is to be none now.
        """
        self._fd = port
        self._begin = begin
        self._stopped = False
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._buffer = bytearray(_PAGE * _PAGES)
        self._vector = [memoryview(self._buffer)[at : at + _PAGE] for at in range(0, len(self._buffer), _PAGE)]
        self._session: Session | None = None
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the session and its thread, and close the port."""
        self._stopped = True
        os.eventfd_write(self._wakeup, 1)
        self._thread.join()
        self._drop_session()
        os.close(self._fd)
        os.close(self._wakeup)

    def _serve(self) -> None:
        finder = link.HelloFinder(link.MARK)
        with select.epoll() as epoll:
            epoll.register(self._fd, select.EPOLLIN | select.EPOLLET)
            epoll.register(self._wakeup, select.EPOLLIN)
            while not self._stopped:
                try:
                    count = os.readv(self._fd, self._vector)
                except BlockingIOError:
                    count = 0
                except OSError:
                    count = 0  # a terminal in a test whose other end is closed
                if count == 0:  # nothing is there, or no host
                    epoll.poll()
                    continue
                self._take(finder, count)

    def _take(self, finder: link.HelloFinder, count: int) -> None:
        data = memoryview(self._buffer)[:count]
        found = finder.feed(data)
        if found is not None:
            digits, end = found
            self._drop_session()  # whole or not
            with suppress(OSError):
                self._session = self._begin(self._fd, digits)
            data = data[end:]
        if self._session is not None and not self._session.receive(data):
            self._drop_session()

    def _drop_session(self) -> None:
        if self._session is not None:
            self._session.end()
            self._session = None


class PortRelay(Port):
    """Relays one port to one unix socket."""

    def __init__(self, port: int, target: Path) -> None:
        super().__init__(port, partial(_Relayed, str(target)))

    @classmethod
    def opened(cls, port: Path, target: Path) -> PortRelay:
        return cls(opened(port), target)

    def drain(self, timeout: float) -> None:
        """Wait until what gRPC answered last has been handed to the port."""
        session = self._session
        if isinstance(session, _Relayed):
            session.thread.join(timeout)


def opened(port: Path) -> int:
    return os.open(port, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)


class _Relayed:
    """A session of gRPC's bytes; its thread sends, whoever calls `receive` is the other direction."""

    def __init__(self, target: str, port: int, digits: bytes) -> None:
        self._port = port
        self._over = False
        self._unframer = link.Unframer()
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(_STALLED))
        try:
            self._socket.connect(target)
        except OSError:
            self._socket.close()
            os.close(self._wakeup)
            raise
        self.thread = threading.Thread(target=self._send_answers, args=(digits,), name="port-out", daemon=True)
        self.thread.start()

    def receive(self, data: memoryview) -> bool:
        """Pass the payload in `data` on; False if the session is over."""
        if self._over:
            return False
        try:
            for piece in self._unframer.feed(data):
                self._socket.sendall(piece)
        except (OSError, link.LinkError):
            return False
        return not self._unframer.ended

    def end(self) -> None:
        """Stop sending, even within a frame, and close everything."""
        self._over = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        os.eventfd_write(self._wakeup, 1)
        self.thread.join()
        self._socket.close()
        os.close(self._wakeup)

    def _send_answers(self, digits: bytes) -> None:
        """Echo the hello, then send what gRPC answers until it closes or the session ends."""
        buffer = bytearray(link.HEAD + _SEND)
        view = memoryview(buffer)
        try:
            with select.epoll() as epoll:
                epoll.register(self._port, select.EPOLLOUT | select.EPOLLET)
                epoll.register(self._wakeup, select.EPOLLIN)
                self._write(memoryview(link.ECHO + digits), epoll)
                while not self._over:
                    count = self._socket.recv_into(view[link.HEAD :])
                    buffer[: link.HEAD] = link.head(count)  # nothing more to come is the end frame
                    self._write(view[: link.HEAD + count], epoll)
                    if count == 0:
                        return
        except OSError:
            return

    def _write(self, data: memoryview, epoll: select.epoll) -> None:
        while len(data) and not self._over:
            try:
                data = data[os.write(self._port, data) :]
            except BlockingIOError:
                epoll.poll()


class VsockRelay:
    """Accepts connections from the host and relays each to the unix socket."""

    def __init__(self, listener: socket.socket, target: Path) -> None:
        self._listener = listener
        self._target = str(target)
        self._thread = threading.Thread(target=self._serve, name="vsock", daemon=True)

    @classmethod
    def listening(cls, port: int, target: Path) -> VsockRelay:
        listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            listener.bind((socket.VMADDR_CID_ANY, port))
            listener.listen(4)
        except OSError:
            listener.close()
            raise
        return cls(listener, target)

    def start(self) -> None:
        self._thread.start()

    def drain(self, timeout: float) -> None:
        """Nothing: the kernel sends what was written before a connection was closed."""

    def stop(self) -> None:
        """Accept no more."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            target = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            try:
                target.connect(self._target)
            except OSError:
                connection.close()
                target.close()
                continue
            pair = _Pair(connection, target)
            threading.Thread(target=pair.copy, args=(connection, target), name="vsock-in", daemon=True).start()
            threading.Thread(target=pair.copy, args=(target, connection), name="vsock-out", daemon=True).start()


class _Pair:
    """Two connected sockets, closed when both directions are done."""

    def __init__(self, *sockets: socket.socket) -> None:
        self._sockets = sockets
        self._lock = threading.Lock()
        self._running = len(sockets)

    def copy(self, source: socket.socket, target: socket.socket) -> None:
        buffer = bytearray(_SEND)
        view = memoryview(buffer)
        try:
            while count := source.recv_into(buffer):
                target.sendall(view[:count])
        except OSError:
            pass
        finally:
            for each in self._sockets:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
            with self._lock:
                self._running -= 1
                if self._running == 0:
                    for each in self._sockets:
                        each.close()


def _timeval(seconds: int) -> bytes:
    return seconds.to_bytes(8, "little") + bytes(8)
