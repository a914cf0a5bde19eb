"""A name server in the guest that knows nothing: what it is asked goes to the host, which knows whom to ask.

Engines have name servers at loopback addresses of a pod's network namespace (docker's is 127.0.0.11).  A guest has a
loopback of its own, so what its containers send there would end there.
"""

from __future__ import annotations

import queue
import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from vmsandbox_agent.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PORT = 53
#: questions that wait for an answer; the oldest gives way to a new one, as if it had been lost on its way
MOST_WAITING = 512
#: connections that may ask at a time
MOST_CONNECTIONS = 32
#: seconds that a connection may be idle
IDLE = 30.0
_LARGEST = 65535


class Question(NamedTuple):
    """What somebody in the guest asked."""

    number: int
    message: bytes
    by_tcp: bool


class NameServer:
    """Listens at an address, over UDP and TCP, until it is closed."""

    def __init__(self, address: str, port: int = PORT) -> None:
        """Raises UnavailableError if something else listens there, or there is no such address."""
        self._questions: queue.SimpleQueue[Question | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting: dict[int, Callable[[bytes], object]] = {}
        self._number = 0
        self._connections: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            self._datagrams.bind((address, port))
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listener.bind(self._datagrams.getsockname())
            self._listener.listen(MOST_CONNECTIONS)
        except OSError as error:
            self.close()
            raise UnavailableError(f"cannot listen for names at {address}: {error.strerror}") from error
        for target in (self._take_datagrams, self._take_connections):
            thread = threading.Thread(target=target, name="names", daemon=True)
            self._threads.append(thread)
            thread.start()

    @property
    def port(self) -> int:
        return int(self._datagrams.getsockname()[1])

    def questions(self) -> Iterator[Question]:
        """What is asked, until it is closed."""
        while (question := self._questions.get()) is not None:
            yield question

    def answer(self, number: int, message: bytes) -> None:
        """Give an answer to whoever asked, if they still want it."""
        with self._lock:
            reply = self._waiting.pop(number, None)
        if reply is not None:
            with suppress(OSError):
                reply(message)

    def close(self) -> None:
        """Listen no more; safe to repeat."""
        with self._lock:
            sockets = [self._datagrams, self._listener, *self._connections]
            self._connections.clear()
            self._waiting.clear()
        for each in sockets:
            with suppress(OSError):  # a thread that waits at it is woken by this, not by closing
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join()  # as long as one waits at a socket, its address is taken
        self._questions.put(None)

    def _asked(self, message: bytes, reply: Callable[[bytes], object], *, by_tcp: bool) -> None:
        if self._questions.qsize() >= MOST_WAITING:
            return  # the host takes no more
        with self._lock:
            self._number = number = self._number % 0xFFFFFFFF + 1
            if len(self._waiting) >= MOST_WAITING:
                del self._waiting[next(iter(self._waiting))]
            self._waiting[number] = reply
        self._questions.put(Question(number, message, by_tcp))

    def _take_datagrams(self) -> None:
        while True:
            try:
                message, peer = self._datagrams.recvfrom(_LARGEST)
            except OSError:
                return
            if message:
                self._asked(message, lambda answer, peer=peer: self._datagrams.sendto(answer, peer), by_tcp=False)  # type: ignore[misc]

    def _take_connections(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except ConnectionAbortedError:
                continue
            except OSError:
                return
            with self._lock:
                if len(self._connections) >= MOST_CONNECTIONS:
                    connection.close()
                    continue
                self._connections.add(connection)
            threading.Thread(target=self._serve, args=(connection,), name="names", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        """Take what comes over a connection: each message has its length in front."""
        connection.settimeout(IDLE)
        try:
            with connection, connection.makefile("rb") as stream:
                while len(head := stream.read(2)) == 2:
                    message = stream.read(int.from_bytes(head, "big"))
                    self._asked(
                        message,
                        lambda answer: connection.sendall(len(answer).to_bytes(2, "big") + answer),
                        by_tcp=True,
                    )
        except OSError:
            pass
        finally:
            with self._lock:
                self._connections.discard(connection)
