"""The guest's end of the byte pipe to the host.

`Port` is any virtio-serial port on which hosts come and go, `ServedPort` the one that carries RPCs.  That has two
threads: one takes what the host sends, looks for hellos and hands on the payload, the other sends the answers.  A
port is opened once and non-blocking, and waited for with edge-triggered epoll: while no host is connected it reports
a hang-up all the time, and a level-triggered wait would spin.

`vmsandbox_protocol.link` says what crosses the port.
"""

from __future__ import annotations

import os
import select
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from vmsandbox_protocol import link

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

#: A port's buffers are pages; one vector takes many of them in one call.
_PAGE = 4096
_PAGES = 64
_SEND = 128 * 1024
#: seconds
_MOMENT = 0.005


class Session(Protocol):
    """One host's use of a port."""

    def receive(self, data: memoryview) -> bool:
        """Take what the host sent, without keeping `data`; False if the session is over."""

    @property
    def is_late(self) -> bool:
        """Whether there is something to say that was put off until nothing comes for a moment."""

    def catch_up(self) -> None:
        """Say it."""

    def end(self) -> None:
        """Stop sending, even within a frame, and close everything."""


class Answering(Protocol):
    """What a host talks to; `receive` and `take` are called by one thread each."""

    def receive(self, data: bytes) -> bool:
        """Take what the host sent, without waiting for anybody; False if there is nothing more to say."""

    def take(self, most: int) -> bytes:
        """Wait for an answer, and take at most so many bytes of it; nothing once all is said."""

    def end(self) -> None:
        """Say nothing more than what can be taken."""

    def drain(self, timeout: float) -> None:
        """Wait until what was asked is answered and taken."""


class Endpoint(Protocol):
    """A place at which hosts are served."""

    def start(self) -> None: ...

    def drain(self, timeout: float) -> None:
        """Wait until the last answers are on their way."""


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
                    self._wait(epoll)
                    continue
                self._take(finder, count)

    def _wait(self, epoll: select.epoll) -> None:
        """Wait until something may have come."""
        session = self._session
        if session is not None and session.is_late:
            if epoll.poll(_MOMENT):
                return
            session.catch_up()
        epoll.poll()

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


class ServedPort(Port):
    """Serves the hosts that come on one port."""

    def __init__(self, port: int, connect: Callable[[], Answering]) -> None:
        """`connect` makes what serves a host that has come."""
        super().__init__(port, lambda fd, digits: _Served(fd, digits, connect()))

    @classmethod
    def opened(cls, port: Path, connect: Callable[[], Answering]) -> ServedPort:
        return cls(opened(port), connect)

    def drain(self, timeout: float) -> None:
        """Wait until what was answered last has been handed to the port, then end the session."""
        session = self._session
        if isinstance(session, _Served):
            session.drain(timeout)


def opened(port: Path) -> int:
    return os.open(port, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)


class _Served:
    """A session that carries RPCs; its thread sends, whoever calls `receive` is the other direction."""

    def __init__(self, port: int, digits: bytes, connection: Answering) -> None:
        self._port = port
        self._over = False
        self._unframer = link.Unframer()
        self._connection = connection
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._send_answers, args=(digits,), name="port-out", daemon=True)
        self._thread.start()

    def receive(self, data: memoryview) -> bool:
        """Serve the payload in `data`; False if the session is over."""
        if self._over:
            return False
        try:
            for piece in self._unframer.feed(data):
                if not self._connection.receive(bytes(piece)):
                    return False
        except link.LinkError:
            return False
        return not self._unframer.ended

    @property
    def is_late(self) -> bool:
        return False

    def catch_up(self) -> None:
        """Nothing is put off here."""

    def drain(self, timeout: float) -> None:
        self._connection.drain(timeout)
        self._connection.end()
        self._thread.join(timeout)

    def end(self) -> None:
        """Stop sending, even within a frame, and close everything."""
        self._over = True
        self._connection.end()
        os.eventfd_write(self._wakeup, 1)
        self._thread.join()
        os.close(self._wakeup)

    def _send_answers(self, digits: bytes) -> None:
        """Echo the hello, then send what there is to say until the connection or the session ends."""
        with select.epoll() as epoll:
            epoll.register(self._port, select.EPOLLOUT | select.EPOLLET)
            epoll.register(self._wakeup, select.EPOLLIN)
            with suppress(OSError):
                self._write(memoryview(link.ECHO + digits), epoll)
                while not self._over:
                    data = self._connection.take(_SEND)
                    self._write(memoryview(link.head(len(data)) + data), epoll)
                    if not data:  # which has sent the end frame
                        return

    def _write(self, data: memoryview, epoll: select.epoll) -> None:
        while len(data) and not self._over:
            try:
                data = data[os.write(self._port, data) :]
            except BlockingIOError:
                epoll.poll()
