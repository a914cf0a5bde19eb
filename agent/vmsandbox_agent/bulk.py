"""The guest's end of the port for bulk stdio.

One thread reads the port and hands input and acknowledgements to the attachment they are for; whoever has output
writes it himself, one at a time.  The reader never waits for a process: what a pipe does not take is kept by its
stream, within the window that the host respects.  `vmsandbox_protocol.bulk` says what crosses the port.
"""

from __future__ import annotations

import os
import select
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from vmsandbox_agent import link
from vmsandbox_agent.errors import AgentError
from vmsandbox_protocol import bulk
from vmsandbox_protocol.link import ECHO, LinkError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

#: bytes of input that are said together to have been accepted: each time costs what a good part of them does
ACCEPTED_TOGETHER = 256 * 1024


class Receiver(Protocol):
    """An attachment, as the port sees it."""

    def receive_bulk(self, offset: int, data: memoryview, *, eof: bool) -> None:
        """Take input, without keeping `data`; raises AgentError."""

    def acknowledge(self, stream: int, offset: int) -> None:
        """Let go of output; raises AgentError."""

    def fail(self, error: AgentError) -> None:
        """The host broke the rules: the attachment ends with this."""


class Bulk:
    """The port, once it is needed, and who may receive what comes through it."""

    def __init__(self, find: Callable[[], int]) -> None:
        """`find` opens the port, non-blocking, and answers its descriptor; raises OSError where there is none."""
        self._find = find
        self._lock = threading.Lock()
        self._port: link.Port | None = None
        self._session: BulkSession | None = None
        self._receivers: dict[tuple[str, int], Receiver] = {}

    def open(self) -> bool:
        """Begin to listen to the port; says whether there is one."""
        with self._lock:
            if self._port is None:
                try:
                    fd = self._find()
                except OSError:
                    return False
                self._port = link.Port(fd, self._began, name="bulk")
                self._port.start()
            return True

    def receiver(self, session: str, channel: int) -> Receiver | None:
        with self._lock:
            return self._receivers.get((session, channel))

    @contextmanager
    def receiving(self, session: str, channel: int, receiver: Receiver) -> Iterator[None]:
        """Give a receiver what comes for a channel of a session, for the block."""
        with self._lock:
            self._receivers[session, channel] = receiver
        try:
            yield
        finally:
            with self._lock:
                del self._receivers[session, channel]

    def session(self, digits: str) -> BulkSession | None:
        """The session with these digits, if it is the one that lasts."""
        session = self._session
        return session if session is not None and session.digits == digits and not session.over else None

    def _began(self, port: int, digits: bytes) -> BulkSession:
        self._session = BulkSession(self, port, digits)
        return self._session


class Lane:
    """An attachment's share of the port."""

    def __init__(self, port: Bulk, session: str, channel: int) -> None:
        self._bulk = port
        self._digits = session
        self._channel = channel
        self._session: BulkSession | None = None
        #: input that was accepted, of which two threads find out, and that which was said to have been
        self._accepted = self._told = 0
        self._accepting = threading.Lock()

    @property
    def is_there(self) -> bool:
        """Whether the host has begun the session that this lane is part of."""
        self._session = self._session or self._bulk.session(self._digits)
        return self._session is not None

    def send(self, stream: int, offset: int, data: Sequence[memoryview], *, eof: bool) -> bool:
        """Send output; False if the session is over, and nobody knows what arrived."""
        assert self._session is not None
        length = sum(len(piece) for piece in data)
        return self._session.send(bulk.data_head(stream, self._channel, offset, length, eof=eof), *data)

    def accept(self, offset: int, *, more: bool) -> None:
        """Say that input below `offset` reached the process; unless the session is over.

        With `more` to come it can wait, until there is enough to tell or nothing comes for a moment.
        """
        with self._accepting:
            self._accepted = max(self._accepted, offset)
            if not self.is_there:
                return
            assert self._session is not None
            if more and self._accepted - self._told < ACCEPTED_TOGETHER:
                self._session.put_off(self)
            else:
                self._tell(self._session)

    def catch_up(self) -> None:
        """Say what was put off."""
        with self._accepting:
            if self._session is not None:
                self._tell(self._session)

    def _tell(self, session: BulkSession) -> None:
        if self._accepted > self._told:
            self._told = self._accepted
            session.send(bulk.ack(bulk.STDIN, self._channel, self._told))

    def joined(self, receiver: Receiver) -> AbstractContextManager[None]:
        """Give a receiver what comes by this lane, for the block."""
        return self._bulk.receiving(self._digits, self._channel, receiver)


class BulkSession:
    """One host's use of the port."""

    def __init__(self, owner: Bulk, port: int, digits: bytes) -> None:
        self.digits = digits.decode()
        self.over = False
        self._owner = owner
        self._port = port
        self._unframer = bulk.Unframer()
        self._sending = threading.Lock()
        #: lanes that have something to say once nothing comes for a moment
        self._late: set[Lane] = set()
        self._putting_off = threading.Lock()
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll()
        self._epoll.register(port, select.EPOLLOUT | select.EPOLLET)
        self._epoll.register(self._wakeup, select.EPOLLIN)
        try:
            self.send(ECHO + digits)
        except OSError:
            self.end()
            raise

    def receive(self, data: memoryview) -> bool:
        if self.over:
            return False
        try:
            for part in self._unframer.feed(data):
                receiver = self._owner.receiver(self.digits, part.channel)
                if receiver is not None:  # else it has just left
                    _give(receiver, part)
        except LinkError:
            return False
        return True

    @property
    def is_late(self) -> bool:
        return bool(self._late)

    def put_off(self, lane: Lane) -> None:
        with self._putting_off:
            self._late.add(lane)

    def catch_up(self) -> None:
        with self._putting_off:
            late, self._late = self._late, set()
        for lane in late:
            lane.catch_up()

    def send(self, *pieces: bytes | memoryview) -> bool:
        """Write to the port, waiting for the host to take it; False when the session is over."""
        with self._sending:
            for piece in pieces:
                self._write(memoryview(piece))
            return not self.over

    def end(self) -> None:
        self.over = True
        os.eventfd_write(self._wakeup, 1)
        with self._sending:
            self._epoll.close()
            os.close(self._wakeup)

    def _write(self, data: memoryview) -> None:
        while len(data) and not self.over:
            try:
                data = data[os.write(self._port, data) :]
            except BlockingIOError:
                for fd, events in self._epoll.poll():
                    if fd == self._port and events & select.EPOLLHUP:
                        # The host went; what it did not read is lost, and who comes next begins anew.
                        self.over = True


def _give(receiver: Receiver, part: bulk.Part) -> None:
    try:
        if part.kind == bulk.ACK:
            receiver.acknowledge(part.stream, part.offset)
        elif part.stream == bulk.STDIN:
            receiver.receive_bulk(part.offset, part.data, eof=part.eof)
    except AgentError as error:
        receiver.fail(error)
