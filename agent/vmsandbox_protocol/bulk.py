"""What crosses the port for bulk stdio, once a hello was answered: see `link` for that.

Streams that carry little go through gRPC.  One that carries much moves here, where a byte costs the guest two copies
and its share of a few system calls.  Each frame names the attachment it belongs to by a number that the host chose:

    length (4 bytes)   kind   stream   flags   channel (4)   offset (8)   0   and as many bytes as `length` says

all big endian; what a head ends with cannot be the beginning of a hello's mark.  `DATA` is input to the guest and
output to the host, beginning at `offset`; `ACK` has no payload and says that everything below `offset` has been taken
over.  A frame with `EOF` is the last one of its stream.

The port may never stand still because of one stream: nobody sends more than a window beyond what was acknowledged, so
that whoever receives can always put it somewhere.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from vmsandbox_protocol.link import MAX_FRAME, LinkError, pieces

if TYPE_CHECKING:
    from collections.abc import Iterator

HEAD = struct.Struct("!IBBBIQx")

DATA = 1
ACK = 2
#: flags
EOF = 1

STDIN = 1
STDOUT = 2
STDERR = 3
#: A stream moves when it has carried so many bytes in one attachment.
WORTH_MOVING = 256 * 1024


class Part(NamedTuple):
    """A frame, or as much of its payload as has come: `data` begins at `offset`."""

    kind: int
    stream: int
    channel: int
    offset: int
    data: memoryview
    eof: bool


_NOTHING = memoryview(b"")


def data_head(stream: int, channel: int, offset: int, length: int, *, eof: bool = False) -> bytes:
    return HEAD.pack(length, DATA, stream, EOF if eof else 0, channel, offset)


def ack(stream: int, channel: int, offset: int) -> bytes:
    return HEAD.pack(0, ACK, stream, 0, channel, offset)


def input_frames(channel: int, offset: int, data: bytes, *, eof: bool) -> Iterator[bytes]:
    """Input as frames, cut so that no payload contains the mark of a hello, which the guest looks for."""
    for start, stop in pieces(data, 0, len(data)):
        last = eof and stop == len(data)
        head = data_head(STDIN, channel, offset + start, stop - start, eof=last)
        yield b"".join((head, memoryview(data)[start:stop]))
    if eof and not data:
        yield data_head(STDIN, channel, offset, 0, eof=True)


class Unframer:
    """Takes frames apart as they come, without copying payload together."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._left = 0
        self._kind = self._stream = self._flags = self._channel = self._offset = 0

    def feed(self, data: memoryview) -> Iterator[Part]:
        """Yield what is in `data`; raises LinkError for what no honest peer sends."""
        at = 0
        while at < len(data):
            if not self._left:
                take = data[at : at + HEAD.size - len(self._head)]
                self._head += take
                at += len(take)
                if len(self._head) < HEAD.size:
                    return
                self._begin()
                if not self._left:
                    yield Part(self._kind, self._stream, self._channel, self._offset, _NOTHING, self._flags == EOF)
                continue
            piece = data[at : at + self._left]
            at += len(piece)
            self._left -= len(piece)
            offset = self._offset
            self._offset += len(piece)
            eof = self._flags == EOF and not self._left
            yield Part(self._kind, self._stream, self._channel, offset, piece, eof)

    def _begin(self) -> None:
        length, self._kind, self._stream, self._flags, self._channel, self._offset = HEAD.unpack(self._head)
        self._head.clear()
        if self._kind not in (DATA, ACK) or not STDIN <= self._stream <= STDERR or self._flags > EOF:
            raise LinkError(f"a frame of kind {self._kind} for stream {self._stream} with flags {self._flags}")
        says_something = bool(length or self._flags)
        if length > MAX_FRAME or says_something != (self._kind == DATA):
            raise LinkError(f"a frame of kind {self._kind} has {length} bytes")
        self._left = length
