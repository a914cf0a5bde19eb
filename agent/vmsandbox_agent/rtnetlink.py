"""A conversation with the kernel's rtnetlink: messages in and out, and nothing about what they mean.

A request is a fixed head (packed by the caller) and attributes; nested attributes are lists of the same.  Objects come
back as their head's bytes and a table of attributes.
"""

from __future__ import annotations

import _socket as socket
import errno
import os
import struct
from typing import TYPE_CHECKING, TypeAlias

from vmsandbox_agent.errors import AgentError, InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    Value: TypeAlias = "bytes | int | str | Sequence[Attribute]"
    Attribute: TypeAlias = "tuple[int, Value]"

_HEAD = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_ERROR, _DONE = 2, 3
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_INTERRUPTED, _CAPPED, _ACK_TLVS = 0x10, 0x100, 0x200
_SOL_NETLINK, _NETLINK_EXT_ACK = 270, 11
_NESTED = 0x8000
_KIND_MASK = 0x3FFF
_RECEIVE = 1 << 18

REPLACE, EXCLUSIVE, CREATE = 0x100, 0x200, 0x400


class Rtnetlink:
    """A socket; every method raises OSError with the kernel's reason."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
        self._socket.bind((0, 0))
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Rtnetlink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def change(self, kind: int, head: bytes, attributes: Sequence[Attribute] = (), *, flags: int = 0) -> None:
        """Ask for a change and wait until it was made."""
        self._send(kind, flags | _REQUEST | _ACK, head, attributes)
        for _ in self._answers():
            pass

    def dump(self, kind: int, head: bytes, size: int) -> list[tuple[bytes, Mapping[int, bytes]]]:
        """All objects of a kind, each with `size` bytes of head; taken again if they changed meanwhile."""
        while True:
            self._send(kind, _REQUEST | _DUMP, head, ())
            try:
                return [(body[:size], attributes(body[size + 3 & ~3 :])) for body in self._answers()]
            except InterruptedError:
                continue

    def _send(self, kind: int, flags: int, head: bytes, content: Sequence[Attribute]) -> None:
        self._sequence += 1
        body = head + packed(content)
        self._socket.send(_HEAD.pack(_HEAD.size + len(body), kind, flags, self._sequence, 0) + body)

    def _answers(self) -> Iterator[bytes]:
        interrupted = False
        while True:
            data = self._socket.recv(_RECEIVE)
            at = 0
            while at + _HEAD.size <= len(data):
                length, kind, flags, sequence, _ = _HEAD.unpack_from(data, at)
                body = data[at + _HEAD.size : at + length]
                at += length + 3 & ~3
                if sequence != self._sequence:
                    continue
                interrupted |= bool(flags & _INTERRUPTED)
                if kind == _ERROR:
                    _raise_failure(body, flags)
                    return
                if kind == _DONE:
                    if interrupted:
                        raise InterruptedError
                    return
                yield body


def packed(content: Sequence[Attribute]) -> bytes:
    """Attributes one after the other: an int is 32 bits, a text ends with a zero."""
    parts = []
    for kind, value in content:
        if isinstance(value, int):
            data = struct.pack("=I", value)
        elif isinstance(value, str):
            data = value.encode() + b"\0"
        elif isinstance(value, bytes):
            data = value
        else:
            data = packed(value)
            kind |= _NESTED
        parts.append(_ATTRIBUTE.pack(_ATTRIBUTE.size + len(data), kind) + data + bytes(-len(data) % 4))
    return b"".join(parts)


def attributes(data: bytes) -> dict[int, bytes]:
    """The attributes in `data`; of one that is repeated the last."""
    found = {}
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            break
        found[kind & _KIND_MASK] = data[at + _ATTRIBUTE.size : at + length]
        at += length + 3 & ~3
    return found


def _raise_failure(body: bytes, flags: int) -> None:
    """Raise what an error message says; an acknowledgement says nothing."""
    (code,) = struct.unpack_from("=i", body)
    if code == 0:
        return
    reason = os.strerror(-code)
    if flags & _ACK_TLVS:
        (length,) = struct.unpack_from("=I", body, 4)
        said = attributes(body[4 + (_HEAD.size if flags & _CAPPED else length + 3 & ~3) :]).get(1)
        if said:
            reason = f"{reason} ({said.rstrip(bytes(1)).decode(errors='replace')})"
    raise OSError(-code, reason)


def refused(what: str, error: OSError) -> AgentError:
    """The kernel's refusal: of what was asked for, unless it is out of memory."""
    cls = AgentError if error.errno in (errno.ENOMEM, errno.ENOBUFS) else InvalidArgumentError
    return cls(f"{what}: {error.strerror}")
