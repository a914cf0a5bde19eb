"""The server's side of gRPC's wire protocol on one connection, whatever carries its bytes.

h2 keeps the state of HTTP/2, and streams carry gRPC's messages: a byte for compression, four of length, the message.
gRPC's own library would do the same, but it is a large one in C++: loading it is a fifth of a cold boot under
emulation, and every clone translates anew what an answer executes of it.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

from vmsandbox_agent import unneeded
from vmsandbox_agent.errors import ExhaustedError, InvalidArgumentError

with unneeded.lightly():
    from h2 import events
    from h2.config import H2Configuration
    from h2.connection import H2Connection
    from h2.errors import ErrorCodes
    from h2.exceptions import ProtocolError, StreamClosedError
    from h2.settings import SettingCodes, Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import TypeAlias

    Headers: TypeAlias = Sequence[tuple[str, str]]

#: streams that a host may have open: each attachment, wait and watcher is one, and holds a thread
MOST_STREAMS = 512
#: Larger than any honest message of the host.
MESSAGE_LIMIT = 64 * 1024 * 1024
#: bytes that a host may send before somebody took them: in a stream, and in all of a connection
_STREAM_WINDOW = 1024 * 1024
_CONNECTION_WINDOW = 64 * 1024 * 1024
_SETTINGS = {
    SettingCodes.MAX_CONCURRENT_STREAMS: MOST_STREAMS,
    SettingCodes.INITIAL_WINDOW_SIZE: _STREAM_WINDOW,
    SettingCodes.MAX_FRAME_SIZE: 256 * 1024,
}
#: bytes of answers that wait to be written; who has more to say waits as well
_OUTPUT_LIMIT = 256 * 1024
_PREFIX = 5
_ANSWER = ((":status", "200"), ("content-type", "application/grpc"))
_CONFIG = H2Configuration(
    client_side=False,
    validate_inbound_headers=False,
    validate_outbound_headers=False,
    normalize_outbound_headers=False,
)


class StreamOver(Exception):
    """Nobody listens to this stream any more."""


class Connection:
    """Takes what a host sends (`receive`) and gives what it is to get (`take`), each from a thread of its own."""

    def __init__(self, begin: Callable[[Stream, dict[bytes, bytes]], None]) -> None:
        """`begin` is told of each new stream with its headers; it must neither wait nor use the stream itself."""
        self._begin = begin
        self.lock = threading.Lock()
        self.protocol = H2Connection(_CONFIG)
        self.protocol.local_settings = Settings(client=False, initial_values=_SETTINGS)
        # From the first byte on: what a host sends may come together with its agreement.
        self.protocol.max_inbound_frame_size = _SETTINGS[SettingCodes.MAX_FRAME_SIZE]
        self._streams: dict[int, Stream] = {}
        self._output = bytearray()
        self._over = False
        #: there is output, or has been taken; a stream has ended
        self._flowing = threading.Condition(self.lock)
        with self.lock:
            self.protocol.initiate_connection()
            self.protocol.increment_flow_control_window(_CONNECTION_WINDOW)
            self.flush()

    def receive(self, data: bytes) -> bool:
        """Handle what the host sent, without ever waiting for a stream; False if the connection is over."""
        ended: list[Stream] = []
        with self.lock:
            if self._over:
                return False
            try:
                happenings = self.protocol.receive_data(data)
            except ProtocolError:
                ended += self._close()
            else:
                for happening in happenings:
                    ended += self._handle(happening)
                self.flush()
        _end(ended)
        return not self._over

    def take(self, most: int) -> bytes:
        """Wait for something to be sent, and take at most so many bytes; nothing once the connection is over."""
        with self.lock:
            while not self._output and not self._over:
                self._flowing.wait()
            data = bytes(self._output[:most])
            del self._output[:most]
            self._flowing.notify_all()
            return data

    def end(self) -> None:
        """End all streams at once; what was to be sent can still be taken."""
        with self.lock:
            ended = self._close()
        _end(ended)

    def drain(self, timeout: float) -> None:
        """Wait until all streams have ended and their answers have been taken."""
        with self.lock:
            self._flowing.wait_for(lambda: self._over or not (self._streams or self._output), timeout)

    # ------------------------------------------------------------ with the lock held

    def flush(self) -> None:
        """Have what the protocol wants to say sent."""
        data = self.protocol.data_to_send()
        if data:
            self._output += data
            self._flowing.notify_all()

    def make_room(self) -> None:
        """Wait until little enough is to be sent; raises StreamOver."""
        self._flowing.wait_for(lambda: self._over or len(self._output) < _OUTPUT_LIMIT)
        if self._over:
            raise StreamOver

    def forget(self, stream: Stream) -> None:
        if self._streams.pop(stream.number, None) is not None:
            self._flowing.notify_all()

    def _close(self) -> list[Stream]:
        self.flush()
        self._over = True
        streams = [*self._streams.values()]
        self._streams.clear()
        for stream in streams:
            stream.closed()
        self._flowing.notify_all()
        return streams

    def _handle(self, happening: events.Event) -> list[Stream]:
        """Tell the streams; answers those that have ended by it."""
        if isinstance(happening, events.RequestReceived):
            stream = self._streams[happening.stream_id] = Stream(self, happening.stream_id)
            self._begin(stream, dict(happening.headers))
        elif isinstance(happening, events.DataReceived):
            self._data(happening)
        elif isinstance(happening, events.StreamEnded):
            if stream_ := self._streams.get(happening.stream_id):
                stream_.half_closed()
        elif isinstance(happening, events.StreamReset):
            if stream_ := self._streams.pop(happening.stream_id, None):
                stream_.closed()
                self._flowing.notify_all()
                return [stream_]
        elif isinstance(happening, events.WindowUpdated) and happening.stream_id:
            if stream_ := self._streams.get(happening.stream_id):
                stream_.changed.notify_all()
        elif isinstance(happening, events.ConnectionTerminated):
            return self._close()
        elif isinstance(happening, (events.WindowUpdated, events.RemoteSettingsChanged)):
            for each in self._streams.values():
                each.changed.notify_all()
        return []

    def _data(self, happening: events.DataReceived) -> None:
        stream = self._streams.get(happening.stream_id)
        length = happening.flow_controlled_length or 0
        if stream is None:
            self.protocol.acknowledge_received_data(length, happening.stream_id)
        else:
            stream.received(happening.data or b"", length)


class Stream:
    """One call's messages, both ways."""

    def __init__(self, connection: Connection, number: int) -> None:
        self.number = number
        self._connection = connection
        #: a message came, the host has said all, has taken some, or listens no more
        self.changed = threading.Condition(connection.lock)
        self._partial = bytearray()
        self._messages: deque[bytes] = deque()
        #: bytes that the host has not been told were taken
        self._held = 0
        self._heard_all = False
        self._answering = False
        self._over = False
        self._refusal: Exception | None = None
        self._callbacks: list[Callable[[], None]] = []

    def when_over(self, callback: Callable[[], None]) -> bool:
        """Call this once when the stream has ended, however; False if it has already."""
        with self._connection.lock:
            if not self._over:
                self._callbacks.append(callback)
            return not self._over

    def messages(self) -> Iterator[bytes]:
        """What the host sends until it has said all; raises StreamOver, AgentError."""
        while True:
            with self._connection.lock:
                self.changed.wait_for(
                    lambda: self._messages or self._heard_all or self._over or self._refusal is not None
                )
                if self._over:
                    raise StreamOver
                if not self._messages:
                    if self._refusal is not None:
                        raise self._refusal
                    return
                message = self._messages.popleft()
                if not self._messages:
                    self._release()
            yield message

    def send(self, message: bytes, trailers: Headers | None = None) -> None:
        """Send a message, and with trailers end the stream; waits as long as the host takes nothing.

        Raises StreamOver.
        """
        with self._connection.lock:
            self._answer()
            self._send(bytes(1) + len(message).to_bytes(4, "big") + message)
            if trailers is None:
                self._connection.flush()
                return
            callbacks = self._finish(trailers)
        _call(callbacks)

    def end(self, trailers: Headers) -> None:
        """End the stream, if the host has not."""
        with self._connection.lock:
            if self._over:
                return
            self._answer()
            callbacks = self._finish(trailers)
        _call(callbacks)

    def ended(self) -> None:
        """Tell whoever wanted to know; without the lock."""
        _call(self._callbacks)

    # ------------------------------------------------------------ with the lock held

    def received(self, data: bytes, length: int) -> None:
        """Take `data`, for which the host counts `length`."""
        self._held += length
        self._partial += data
        while self._refusal is None and len(self._partial) >= _PREFIX:
            size = int.from_bytes(self._partial[1:_PREFIX], "big")
            if self._partial[0]:
                self._refusal = InvalidArgumentError("compressed messages are not understood")
            elif size > MESSAGE_LIMIT:
                self._refusal = ExhaustedError(
                    f"a message of {size} bytes is larger than {MESSAGE_LIMIT}: send less at once"
                )
            elif len(self._partial) < _PREFIX + size:
                break
            else:
                self._messages.append(bytes(self._partial[_PREFIX : _PREFIX + size]))
                del self._partial[: _PREFIX + size]
        if self._refusal is not None:
            self._partial.clear()
        if not self._messages:
            self._release()  # one that is larger than the window has to get in
        self.changed.notify_all()

    def half_closed(self) -> None:
        self._heard_all = True
        self.changed.notify_all()

    def closed(self) -> None:
        self._over = True
        self._messages.clear()
        self._partial.clear()
        self._release()
        self.changed.notify_all()

    def _release(self) -> None:
        """Let the host send more."""
        held, self._held = self._held, 0
        if held:
            self._connection.protocol.acknowledge_received_data(held, self.number)
            self._connection.flush()

    def _answer(self) -> None:
        if self._over:
            raise StreamOver
        if not self._answering:
            self._answering = True
            self._connection.protocol.send_headers(self.number, _ANSWER)

    def _send(self, data: bytes) -> None:
        protocol = self._connection.protocol
        start = 0
        while start < len(data):
            try:
                room = min(protocol.local_flow_control_window(self.number), protocol.max_outbound_frame_size)
            except StreamClosedError:
                raise StreamOver from None
            if room <= 0:
                self._connection.flush()
                self.changed.wait()
            else:
                protocol.send_data(self.number, data[start : start + room])
                start += room
                if start < len(data):
                    self._connection.flush()
                    self._connection.make_room()
            if self._over:
                raise StreamOver
        self._connection.make_room()
        if self._over:
            raise StreamOver

    def _finish(self, trailers: Headers) -> list[Callable[[], None]]:
        protocol = self._connection.protocol
        protocol.send_headers(self.number, trailers, end_stream=True)
        if not self._heard_all:
            # What the host still has to say is of no interest.
            protocol.reset_stream(self.number, ErrorCodes.NO_ERROR)
        self._connection.forget(self)
        self.closed()
        self._connection.flush()
        return self._callbacks


def _end(streams: list[Stream]) -> None:
    for stream in streams:
        stream.ended()


def _call(callbacks: list[Callable[[], None]]) -> None:
    while callbacks:
        callbacks.pop()()
