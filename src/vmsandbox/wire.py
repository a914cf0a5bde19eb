"""Framing between thin clients, stand-ins and a supervisor on its control socket.

A frame is a 5-byte head (payload length, kind) and a payload.  `MESSAGE` frames hold one JSON object; the other
kinds hold stdio: an 8-byte offset and the bytes at it, so that a broken connection resumes without gap or
repetition.  Stdlib only, and nothing here knows a verb.
"""

from __future__ import annotations

import struct

from vmsandbox import plainjson

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from typing import Any

    from vmsandbox.plainsocket import Socket

HEAD = struct.Struct("!IB")
OFFSET = struct.Struct("!Q")

#: a JSON object
MESSAGE = 0
STDIN = 1
STDOUT = 2
STDERR = 3

#: No honest peer sends more in one frame.
MAX_PAYLOAD = 16 * 1024 * 1024
#: Stdio is cut into frames of at most this many bytes.
CHUNK = 256 * 1024


class WireError(Exception):
    """The peer broke the framing."""


class Frame:
    """One frame; `offset` is 0 for messages."""

    __slots__ = ("kind", "offset", "payload")

    def __init__(self, kind: int, payload: bytes, offset: int = 0) -> None:
        self.kind = kind
        self.payload = payload
        self.offset = offset

    def message(self) -> dict[str, Any]:
        """The JSON object of a `MESSAGE` frame."""
        if self.kind != MESSAGE:
            raise WireError(f"expected a message, got stdio of kind {self.kind}")
        try:
            value = plainjson.loads(self.payload)
        except (ValueError, RecursionError) as error:
            raise WireError(f"bad message: {error}") from error
        if not isinstance(value, dict):
            raise WireError("bad message: not an object")
        return value


def encode_message(value: dict[str, Any]) -> bytes:
    payload = plainjson.dumps(value).encode()
    return HEAD.pack(len(payload), MESSAGE) + payload


def encode_data(kind: int, offset: int, data: bytes | memoryview) -> bytes:
    return b"".join((HEAD.pack(len(data) + OFFSET.size, kind), OFFSET.pack(offset), data))


def decode(kind: int, payload: bytes) -> Frame:
    """Make a frame of a payload of `kind`; raises `WireError` where it is malformed."""
    if kind == MESSAGE:
        return Frame(kind, payload)
    if kind not in (STDIN, STDOUT, STDERR) or len(payload) < OFFSET.size:
        raise WireError(f"bad frame of kind {kind}")
    return Frame(kind, payload[OFFSET.size :], OFFSET.unpack_from(payload)[0])


def check_length(length: int) -> None:
    if length > MAX_PAYLOAD:
        raise WireError(f"frame of {length} bytes is larger than {MAX_PAYLOAD}")


def receive(sock: Socket) -> Frame | None:
    """Read one frame from a blocking socket; None at end of stream."""
    head = _receive_exactly(sock, HEAD.size)
    if not head:
        return None
    if len(head) < HEAD.size:
        raise WireError("connection ended within a frame")
    length, kind = HEAD.unpack(head)
    check_length(length)
    payload = _receive_exactly(sock, length)
    if len(payload) < length:
        raise WireError("connection ended within a frame")
    return decode(kind, payload)


def _receive_exactly(sock: Socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = sock.recv(min(count - len(parts), 1 << 20))
        if not part:
            break
        parts += part
    return bytes(parts)


async def read(reader: asyncio.StreamReader) -> Frame | None:
    """Read one frame from an asyncio stream; None at end of stream."""
    import asyncio

    head = await reader.read(HEAD.size)
    if not head:
        return None
    try:
        if len(head) < HEAD.size:
            head += await reader.readexactly(HEAD.size - len(head))
        length, kind = HEAD.unpack(head)
        check_length(length)
        payload = await reader.readexactly(length)
    except asyncio.IncompleteReadError as error:
        raise WireError("connection ended within a frame") from error
    return decode(kind, payload)


class Decoder:
    """Turns bytes as they come into frames, for peers that multiplex with `select`."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        self._buffer += data
        frames = []
        start = 0
        while len(self._buffer) - start >= HEAD.size:
            length, kind = HEAD.unpack_from(self._buffer, start)
            check_length(length)
            end = start + HEAD.size + length
            if len(self._buffer) < end:
                break
            frames.append(decode(kind, bytes(self._buffer[start + HEAD.size : end])))
            start = end
        del self._buffer[:start]
        return frames
