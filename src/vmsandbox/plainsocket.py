"""Unix sockets for programs that live shorter than importing Python's own module takes: that brings `enum` along.

What is underneath is the same; `socket.socket` is made of it too, so functions that take a `Socket` take both.
"""

from __future__ import annotations

import _socket
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

#: the type of all sockets
Socket = _socket.socket
SOCK_STREAM, SOCK_SEQPACKET = int(_socket.SOCK_STREAM), int(_socket.SOCK_SEQPACKET)
MSG_DONTWAIT = int(_socket.MSG_DONTWAIT)
_NUMBER = struct.Struct("i")


class UnixSocket(Socket):
    """A socket that is closed with its block; with `fileno` one that is there already."""

    def __init__(self, kind: int = SOCK_STREAM, *, fileno: int | None = None) -> None:
        super().__init__(_socket.AF_UNIX, kind, 0, fileno)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def pair(kind: int = SOCK_STREAM) -> tuple[UnixSocket, UnixSocket]:
    """Two that are connected."""
    one, other = _socket.socketpair(_socket.AF_UNIX, kind)
    return UnixSocket(kind, fileno=one.detach()), UnixSocket(kind, fileno=other.detach())


def send_descriptors(sock: Socket, data: bytes, descriptors: Sequence[int]) -> int:
    """Send bytes with descriptors along; how many bytes were taken."""
    numbers = b"".join(_NUMBER.pack(fd) for fd in descriptors)
    return sock.sendmsg([data], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, numbers)])


def receive_descriptor(sock: Socket, size: int) -> tuple[bytes, int]:
    """Receive bytes and the descriptor that comes with them, -1 if none does."""
    data, extra, _, _ = sock.recvmsg(size, _socket.CMSG_LEN(_NUMBER.size))
    for level, kind, numbers in extra:
        if (level, kind) == (_socket.SOL_SOCKET, _socket.SCM_RIGHTS) and len(numbers) >= _NUMBER.size:
            return data, int(_NUMBER.unpack_from(numbers)[0])
    return data, -1
