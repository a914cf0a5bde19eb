"""What crosses a byte pipe that outlives its users: a virtio-serial port.

A port has no connections.  A host that comes anew may read bytes that were meant for the one before it, and the
guest may find the head of an old message followed by a new host's bytes.  So each session begins with a hello:

    host -> guest   MARK, 32 hex digits of a fresh nonce
    guest -> host   ECHO, the same digits

The guest looks for MARK at every place in its input and drops the old session when it sees one; the host throws
everything away until it sees ECHO with its own nonce, which nobody can have written before.  After the hello
both directions carry frames: four bytes of length, big endian, then as many bytes.  A frame of length zero ends
the session in an orderly way.

MARK cannot occur inside what a host sends: all of its bytes are above 0x7f, the head of a frame begins with 0x00
since no frame is longer than 16 MiB, and a payload that contains MARK, or would with the end of its head, is cut into
two frames.  Hex digits are below 0x80, so that a hello that was cut short cannot hide the next one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

MARK = bytes.fromhex("f6b19ae3c8d7fea5 92bbe0c4d38fa9f1")
ECHO = bytes.fromhex("e9a4f3b8c6d1958b fdaeb7c2e08cd4f5")
NONCE_DIGITS = 32
HELLO = len(MARK) + NONCE_DIGITS
HEAD = 4
#: No frame carries more payload than this.
MAX_FRAME = 256 * 1024
#: Ends a session.
END = bytes(HEAD)

#: what follows the bytes of MARK that a head may end with
_MARK_ENDS = tuple(MARK[count:] for count in range(1, HEAD))
_HEX = frozenset(b"0123456789abcdef")


class LinkError(Exception):
    """The peer broke the framing."""


def head(length: int) -> bytes:
    return length.to_bytes(HEAD, "big")


def pieces(data: bytes | bytearray, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Cut ``data[start:end]`` so that no piece contains MARK and none is longer than a frame may be."""
    while start < end:
        stop = min(start + MAX_FRAME, end)
        found = data.find(MARK, start, stop)
        if found >= 0:
            stop = found + 1
        if data.startswith(_MARK_ENDS, start, stop) and MARK in head(stop - start) + data[start : start + len(MARK)]:
            stop -= 1  # the head would be the beginning of one
        yield start, stop
        start = stop


class Unframer:
    """Takes frames apart, without copying payload together."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._left = 0
        self.ended = False

    def feed(self, data: memoryview) -> Iterator[memoryview]:
        """Yield the payload in `data`; after an end frame nothing more."""
        at = 0
        while at < len(data) and not self.ended:
            if self._left:
                piece = data[at : at + self._left]
                self._left -= len(piece)
                at += len(piece)
                yield piece
                continue
            take = data[at : at + HEAD - len(self._head)]
            self._head += take
            at += len(take)
            if len(self._head) < HEAD:
                return
            length = int.from_bytes(self._head, "big")
            self._head.clear()
            if length > MAX_FRAME:
                raise LinkError(f"frame of {length} bytes is larger than {MAX_FRAME}")
            self._left = length
            self.ended = length == 0


class HelloFinder:
    """Finds ``mark + 32 hex digits`` anywhere in a stream, however it is cut into reads."""

    def __init__(self, mark: bytes) -> None:
        self._mark = mark
        self._tail = b""

    def feed(self, data: memoryview) -> tuple[bytes, int] | None:
        """Answer the digits of the last whole hello in the stream up to here and where in `data` it ends.

        Answers None while there is none; the end of the stream that could begin one is remembered.
        """
        kept = len(self._tail)
        text = self._tail + data
        found: tuple[bytes, int] | None = None
        at = text.find(self._mark)
        while at >= 0:
            begin = at + len(self._mark)
            digits = text[begin : begin + NONCE_DIGITS]
            if not _HEX.issuperset(digits):
                at = text.find(self._mark, at + 1)
            elif len(digits) < NONCE_DIGITS:
                self._tail = text[at:]
                return found
            else:
                found = digits, begin + NONCE_DIGITS - kept
                at = text.find(self._mark, begin + NONCE_DIGITS)
        after = found[1] + kept if found else 0
        self._tail = text[max(after, len(text) - len(self._mark) + 1) :]
        return found
