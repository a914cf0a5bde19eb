"""The host's end of the port for bulk stdio.

The port is not touched before an attachment wants it; then it is dialled, and lasts as long as it can.  A session that
breaks takes the attachments with it whose streams had moved there: they are attached anew, and the offsets say what is
missing.  What comes is always taken at once, so that a container whose output nobody reads holds up no other; how much
that can be, each `Receiver` knows.  `vmsandbox_protocol.bulk` says what crosses the port.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from vmsandbox.errors import UnavailableError
from vmsandbox.guest.replies import broken
from vmsandbox_hypervisor.sockets import hang_up
from vmsandbox_protocol import bulk, link

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

log = logging.getLogger(__name__)

#: seconds for the guest to answer; until then, and without it, output keeps to the calls unless it was quicker
_PATIENCE = 5.0
_BUFFER = 512 * 1024
#: unsent bytes towards the guest before whoever sends has to wait
_HIGH_WATER = 512 * 1024


class Receiver(Protocol):
    """An attachment, as the port sees it."""

    def receive_bulk(self, part: bulk.Part) -> None:
        """Take output or what input was accepted, without keeping its data; raises UnavailableError for a lie."""

    def bulk_ended(self, error: UnavailableError) -> None:
        """Nothing will come by this lane any more."""


class BulkPort:
    """The port, and who receives what comes through it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._receivers: dict[int, Receiver] = {}
        self._channels = 0
        self._next = _digits()
        self._session: _Session | None = None
        self._dialling: asyncio.Task[None] | None = None

    @contextmanager
    def lane(self, receiver: Receiver) -> Iterator[Lane]:
        """A receiver's share of the port for the block."""
        self._channels += 1
        lane = Lane(self, self._channels, self._session.digits if self._is_up() and self._session else self._next)
        self._receivers[lane.channel] = receiver
        try:
            yield lane
        finally:
            del self._receivers[lane.channel]

    def dial(self) -> None:
        """Begin a session unless there is one; where that fails, streams stay where they are."""
        if not self._is_up() and (self._dialling is None or self._dialling.done()):
            self._dialling = asyncio.create_task(self._dial(), name="bulk")

    async def close(self) -> None:
        if self._dialling is not None:
            self._dialling.cancel()
            await asyncio.wait([self._dialling])
        if self._session is not None:
            self._session.close()

    def session(self, digits: str) -> _Session | None:
        """The session with these digits if it is up."""
        session = self.begun(digits)
        return session if session is not None and session.greeted else None

    def begun(self, digits: str) -> _Session | None:
        """The session with these digits, whether the guest's greeting has come or is still under way."""
        session = self._session
        begun = session is not None and session.digits == digits and session.transport is not None and not session.over
        return session if begun else None

    def _is_up(self) -> bool:
        return self._session is not None and not self._session.over

    async def _dial(self) -> None:
        digits, self._next = self._next, _digits()
        again, session = self._session is not None, _Session(self, digits)
        self._session = session
        try:
            if again:
                await hang_up(self._path)
            await asyncio.get_running_loop().create_unix_connection(lambda: session, str(self._path))
        except OSError as error:
            session.over = True
            log.info("there is no port for bulk stdio: %s", error)

    def give(self, part: bulk.Part) -> None:
        """Hand on what came; raises LinkError if it is for an attachment that never was."""
        if part.channel > self._channels:
            raise link.LinkError(f"a frame is for channel {part.channel}, which was never offered")
        receiver = self._receivers.get(part.channel)
        if receiver is None:
            return  # it has just left
        try:
            receiver.receive_bulk(part)
        except UnavailableError as error:
            receiver.bulk_ended(error)

    def ended(self, error: UnavailableError) -> None:
        for receiver in [*self._receivers.values()]:
            receiver.bulk_ended(error)


class Lane:
    """An attachment's share of the port."""

    def __init__(self, port: BulkPort, channel: int, digits: str) -> None:
        self._port = port
        self.channel = channel
        #: of the session that it is part of, begun or not
        self.digits = digits

    @property
    def is_up(self) -> bool:
        return self._port.session(self.digits) is not None

    def dial(self) -> None:
        self._port.dial()

    def ack(self, stream: int, offset: int) -> None:
        """Say that output below `offset` has been taken over; nothing where the session is over.

        The call may have told of a stream's move before the port brings the guest's greeting.
        """
        session = self._port.begun(self.digits)
        if session is not None:
            session.write(bulk.ack(stream, self.channel, offset))

    async def send(self, offset: int, data: bytes, *, eof: bool) -> None:
        """Send input; raises UnavailableError where the session is over."""
        for frame in bulk.input_frames(self.channel, offset, data, eof=eof):
            session = self._port.session(self.digits)
            if session is None:
                raise UnavailableError("the session on the port for bulk is over")
            session.write(frame)
            await session.writable.wait()


class _Session(asyncio.BufferedProtocol):
    """One use of the port."""

    def __init__(self, port: BulkPort, digits: str) -> None:
        self.digits = digits
        self.greeted = False
        self.over = False
        self.transport: asyncio.Transport | None = None
        self.writable = asyncio.Event()
        self.writable.set()
        self._port = port
        self._view = memoryview(bytearray(_BUFFER))
        self._unframer = bulk.Unframer()
        self._giving_up: asyncio.TimerHandle | None = None
        #: the end of what came before the guest answered
        self._stale = b""

    def close(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def write(self, data: bytes) -> None:
        assert self.transport is not None
        self.transport.write(data)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._giving_up = asyncio.get_running_loop().call_later(_PATIENCE, self._unanswered)
        transport.set_write_buffer_limits(high=_HIGH_WATER)
        transport.write(link.MARK + self.digits.encode())

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        if self.over:
            return
        try:
            data = self._view[:nbytes]
            if not self.greeted:
                data = self._greet(data)
            for part in self._unframer.feed(data):
                self._port.give(part)
        except link.LinkError as error:
            self._end(broken(str(error)))
            self.close()

    def _greet(self, data: memoryview) -> memoryview:
        """Look for the guest's answer to our hello, in what may be another's; what follows it."""
        wanted = link.ECHO + self.digits.encode()
        text = self._stale + data
        at = text.find(wanted)
        if at < 0:
            self._stale = text[-len(wanted) :]
            return data[:0]
        self.greeted = True
        self._cancel_giving_up()
        self._stale = b""
        return memoryview(text)[at + len(wanted) :]

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def connection_lost(self, error: Exception | None) -> None:
        self._end(UnavailableError("the port for bulk was closed"))

    def _unanswered(self) -> None:
        self._end(UnavailableError(f"the guest has not answered at the port for bulk within {_PATIENCE:g} s"))
        self.close()

    def _cancel_giving_up(self) -> None:
        if self._giving_up is not None:
            self._giving_up.cancel()

    def _end(self, error: UnavailableError) -> None:
        if not self.over:
            self.over = True
            self._cancel_giving_up()
            self.greeted = False
            self.writable.set()
            self._port.ended(error)


def _digits() -> str:
    return secrets.token_hex(link.NONCE_DIGITS // 2)
