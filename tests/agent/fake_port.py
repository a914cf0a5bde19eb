"""A virtio-serial port as it behaves at its worst.

Towards the host it is a unix socket that serves one connection at a time, as QEMU's does; towards the guest a
descriptor.  Bytes outlive connections: what one host wrote may reach the guest after another has come, what the
guest wrote for one host may be read by the next, and a connection's last bytes may be lost.
"""

from __future__ import annotations

import asyncio
import random
import socket
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from vmsandbox_hypervisor.aio import readable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

_MOST = 64 * 1024


class FakePort:
    """One port; `guest_fd` is for the guest's side, `path` for the host's."""

    def __init__(self, path: Path, seed: int | None) -> None:
        self.path = path
        self.connections = 0
        #: bytes that went through it
        self.to_host = self.to_guest = 0
        self._random = random.Random(seed) if seed is not None else None
        self._inner, guest = socket.socketpair()
        self._inner.setblocking(False)
        guest.setblocking(False)
        self.guest_fd = guest.detach()
        self._to_guest = bytearray()
        self._to_host = bytearray()
        self._changed = asyncio.Event()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        self._listener.bind(str(path))
        self._listener.listen(8)
        self._connection: socket.socket | None = None

    @classmethod
    @asynccontextmanager
    async def opened(cls, path: Path, *, seed: int | None = None) -> AsyncIterator[FakePort]:
        """With a seed it cuts, delays and loses bytes; without one it only passes them on."""
        port = cls(path, seed)
        tasks = [
            asyncio.create_task(port._serve(), name="port-serve"),
            asyncio.create_task(port._to_guest_pump(), name="port-to-guest"),
            asyncio.create_task(port._from_guest_pump(), name="port-from-guest"),
        ]
        try:
            yield port
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            port.break_connection()
            port._inner.close()
            port._listener.close()
            path.unlink()

    def break_connection(self) -> None:
        """End the host's connection, as if its process had been killed."""
        if self._connection is not None:
            with suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
            self._connection = None
            if self._random is not None and self._to_guest:
                del self._to_guest[self._random.randrange(len(self._to_guest)) :]

    def write_stale(self, data: bytes) -> None:
        """Pretend that an earlier host left bytes for the guest."""
        self._to_guest += data
        self._changed.set()

    async def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                await readable(self._listener)
                continue
            connection.setblocking(False)
            self._connection = connection
            self.connections += 1
            with connection:
                await self._serve_one(connection)

    async def _serve_one(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        sender = asyncio.create_task(self._send_host(connection), name="port-send")
        try:
            while data := await loop.sock_recv(connection, self._size()):
                self._to_guest += data
                self.to_guest += len(data)
                self._changed.set()
                while len(self._to_guest) > 4 * _MOST and self._connection is connection:  # noqa: ASYNC110
                    await asyncio.sleep(0)
        except OSError:
            pass
        finally:
            sender.cancel()
            if self._connection is connection:
                self.break_connection()
            await asyncio.gather(sender, return_exceptions=True)

    async def _send_host(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if not self._to_host:
                self._changed.clear()
                await self._changed.wait()
                continue
            piece = bytes(self._to_host[: self._size()])
            del self._to_host[: len(piece)]
            await loop.sock_sendall(connection, piece)

    async def _to_guest_pump(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if not self._to_guest:
                await asyncio.sleep(0.0005)
                continue
            if self._random is not None and self._random.random() < 0.05:
                await asyncio.sleep(0.001)
            piece = bytes(self._to_guest[: self._size()])
            del self._to_guest[: len(piece)]
            await loop.sock_sendall(self._inner, piece)

    async def _from_guest_pump(self) -> None:
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(self._inner, self._size()):
            self._to_host += data
            self.to_host += len(data)
            self._changed.set()
            while len(self._to_host) > 4 * _MOST:  # noqa: ASYNC110
                await asyncio.sleep(0.0005)

    def _size(self) -> int:
        if self._random is None:
            return _MOST
        return self._random.choice((1, 7, 100, 4096, _MOST))
