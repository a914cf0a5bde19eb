"""The host's end of the byte pipe to the agent, offered to gRPC as a unix socket.

gRPC cannot speak vsock, and a virtio-serial port has no connections, so bytes are relayed between a unix socket of
ours and the guest.  A `Dial` is the seam: it makes a `Link`, on which the guest's agent has been heard of.  When
either side ends, both are closed and the guest is dialled again; gRPC comes back by itself.

On a port the first bytes may belong to somebody else: see `vmsandbox_protocol.link`.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Protocol

from vmsandbox.errors import InvalidArgumentError
from vmsandbox.paths import SOCKET_PATH_MAX
from vmsandbox_hypervisor.aio import readable
from vmsandbox_hypervisor.sockets import hang_up
from vmsandbox_protocol import link

if TYPE_CHECKING:
    from pathlib import Path

#: seconds between two attempts to reach the guest: the first, and the most
_PAUSE = 0.02
_LONGEST_PAUSE = 0.5
#: bytes that are passed on at once: the pod has as many for each direction as long as it lives
_BUFFER = 64 * 1024
SOCKET_NAME = "agent.sock"


class Link(Protocol):
    """A connection to the agent, of which each side may end."""

    async def copy_to(self, target: socket.socket) -> None:
        """Pass on what the guest sends until it ends the session; raises OSError or LinkError."""

    async def copy_from(self, source: socket.socket) -> None:
        """Send what comes from `source` until it is closed; raises OSError."""


Dial = Callable[[], AbstractAsyncContextManager[Link]]


class Relay:
    """A unix socket that leads to the agent."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._heard = asyncio.Event()

    async def ready(self) -> None:
        """Wait until the agent has been heard of for the first time."""
        await self._heard.wait()

    async def _run(self, listener: socket.socket, dial: Dial) -> None:
        pause = _PAUSE
        while True:
            try:
                async with dial() as connected:
                    self._heard.set()
                    pause = _PAUSE
                    with await _accepted(listener) as connection:
                        await _exchange(connected, connection)
            except (OSError, link.LinkError):
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE)


@asynccontextmanager
async def relayed(dial: Dial, *, directory: Path) -> AsyncIterator[Relay]:
    """Listen at a socket in `directory`, which only we may enter, and relay it for the duration of the block."""
    path = directory / SOCKET_NAME
    if len(str(path).encode()) > SOCKET_PATH_MAX:
        raise InvalidArgumentError(f"'{path}' is too long for a unix socket: choose a shorter directory")
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.setblocking(False)
        listener.bind(str(path))
        try:
            path.chmod(0o600)
            listener.listen(8)
            relay = Relay(path)
            running = asyncio.create_task(relay._run(listener, dial), name="agent-relay")
            try:
                yield relay
            finally:
                running.cancel()
                await asyncio.wait([running])
        finally:
            path.unlink(missing_ok=True)


def through_port(path: Path) -> Dial:
    """Dial a virtio-serial port, which the VMM offers as a unix socket at `path`."""
    before = False

    @asynccontextmanager
    async def dial() -> AsyncIterator[Link]:
        nonlocal before
        if before:
            await hang_up(path)
        before = True
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, str(path))
            yield await PortLink.greeted(sock)

    return dial


def through_vsock(cid: int, port: int, *, make: Callable[[int, int], socket.socket] = socket.socket) -> Dial:
    """Dial an agent that serves at a `port` of vsock in the machine with this context id.

    `make` makes a socket of a family and type.
    """

    @asynccontextmanager
    async def dial() -> AsyncIterator[Link]:
        with make(socket.AF_VSOCK, socket.SOCK_STREAM) as sock:
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, (cid, port))
            yield StreamLink(sock)

    return dial


class StreamLink:
    """Bytes as they are, over a connection that begins and ends: a socket, or vsock."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    async def copy_to(self, target: socket.socket) -> None:
        await _copy(self._socket, target)

    async def copy_from(self, source: socket.socket) -> None:
        await _copy(source, self._socket)


class PortLink:
    """A session on a virtio-serial port."""

    def __init__(self, sock: socket.socket, rest: bytes) -> None:
        self._socket = sock
        self._rest = rest
        self._unframer = link.Unframer()

    @classmethod
    async def greeted(cls, sock: socket.socket) -> PortLink:
        """Send a hello and throw away what comes until the guest has answered it, however long that takes."""
        loop = asyncio.get_running_loop()
        digits = secrets.token_hex(link.NONCE_DIGITS // 2).encode()
        await loop.sock_sendall(sock, link.MARK + digits)
        wanted = link.ECHO + digits
        received = b""
        while True:
            more = await loop.sock_recv(sock, _BUFFER)
            if not more:
                raise ConnectionResetError("the port was closed")
            received += more
            at = received.find(wanted)
            if at >= 0:
                return cls(sock, received[at + len(wanted) :])
            received = received[-len(wanted) :]

    async def copy_to(self, target: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        for piece in self._unframer.feed(memoryview(self._rest)):
            await loop.sock_sendall(target, piece)
        view = memoryview(bytearray(_BUFFER))
        while not self._unframer.ended:
            count = await loop.sock_recv_into(self._socket, view)
            if not count:
                raise ConnectionResetError("the port was closed")
            for piece in self._unframer.feed(view[:count]):
                await loop.sock_sendall(target, piece)

    async def copy_from(self, source: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        buffer = bytearray(link.HEAD + _BUFFER)
        view = memoryview(buffer)
        while count := await loop.sock_recv_into(source, view[link.HEAD :]):
            end = link.HEAD + count
            for start, stop in link.pieces(buffer, link.HEAD, end):
                # What precedes a piece has been sent: its head goes there.
                view[start - link.HEAD : start] = link.head(stop - start)
                await loop.sock_sendall(self._socket, view[start - link.HEAD : stop])
        await loop.sock_sendall(self._socket, link.END)


async def _accepted(listener: socket.socket) -> socket.socket:
    """The next connection of gRPC that it has not given up meanwhile."""
    while True:
        try:
            # Not the loop's own accept: cancelled at the wrong moment it loses a connection that it holds.
            connection, _ = listener.accept()
        except BlockingIOError:
            await readable(listener)
            continue
        connection.setblocking(False)
        with suppress(BlockingIOError):
            if not connection.recv(1, socket.MSG_PEEK):
                connection.close()
                continue
        return connection


async def _exchange(connected: Link, connection: socket.socket) -> None:
    """Relay both ways until one side ends or breaks."""
    tasks = [
        asyncio.create_task(connected.copy_to(connection), name="agent-in"),
        asyncio.create_task(connected.copy_from(connection), name="agent-out"),
    ]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception) and not isinstance(result, asyncio.CancelledError):
            raise result


async def _copy(source: socket.socket, target: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    view = memoryview(bytearray(_BUFFER))
    while count := await loop.sock_recv_into(source, view):
        await loop.sock_sendall(target, view[:count])
