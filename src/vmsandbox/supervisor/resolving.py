"""Name servers that only a pod's network namespace reaches, for a guest whose loopback is its own.

docker answers the names of a user-defined network at 127.0.0.11 of each container's namespace.  The guest listens at
the same address of its own, and what it is asked is asked here, by sockets of the namespace.
"""

from __future__ import annotations

import asyncio
import logging
import random
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING

from vmsandbox.errors import SandboxError
from vmsandbox.resources.network import attach

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator

    from vmsandbox.guest.client import AgentClient
    from vmsandbox.guest.naming import Names
    from vmsandbox_protocol import agent_pb2 as pb

log = logging.getLogger(__name__)

PORT = 53
#: seconds a name server may take; who asked has given up by then
TIMEOUT = 15.0
#: questions that are under way; a guest that asks more is not answered
MOST_UNDER_WAY = 256
#: seconds between a relay that broke and the next try
PAUSE = 0.5


async def keep(agent: AgentClient, namespace: str, address: str, listening: asyncio.Event) -> None:
    """Answer what the guest asks at `address`, until cancelled; `listening` is set as long as it can ask."""
    while True:
        try:
            await _serve(agent, namespace, address, listening)
        except SandboxError as error:
            log.info("names that are asked for at %s are not answered: %s", address, error)
        except OSError as error:
            log.info("names that are asked for at %s are not answered: %s", address, error.strerror)
        finally:
            listening.clear()
        await asyncio.sleep(PAUSE)


async def _serve(agent: AgentClient, namespace: str, address: str, listening: asyncio.Event) -> None:
    server = NameServer(namespace, address)
    under_way: set[asyncio.Task[None]] = set()
    async with server.reached(), agent.names(address) as names:
        try:
            async for question in names.questions():
                if not question.message:
                    listening.set()
                elif len(under_way) < MOST_UNDER_WAY:
                    task = asyncio.create_task(_answer(server, names, question), name="name")
                    under_way.add(task)
                    task.add_done_callback(under_way.discard)
        finally:
            for task in under_way:
                task.cancel()


async def _answer(server: NameServer, names: Names, question: pb.NameQuestion) -> None:
    try:
        async with asyncio.timeout(TIMEOUT):
            answer = await server.ask(question.message, by_tcp=question.by_tcp)
            await names.answer(question.number, answer)
    except (TimeoutError, OSError, SandboxError) as error:
        log.debug("a name was not answered: %s", error)


class NameServer(asyncio.DatagramProtocol):
    """A name server at an address of a namespace."""

    def __init__(self, namespace: str, address: str) -> None:
        self._namespace = namespace
        self._address = address
        self._transport: asyncio.DatagramTransport | None = None
        #: by the number that a question has on its way; that of who asked may be somebody else's too
        self._asked: dict[bytes, asyncio.Future[bytes]] = {}

    @asynccontextmanager
    async def reached(self) -> AsyncIterator[None]:
        """It can be asked in the block."""
        sock = await attach.connected(self._namespace, self._address, PORT, stream=False)
        with closing(sock):
            transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: self, sock=sock)
            self._transport = transport
            try:
                yield
            finally:
                transport.close()

    async def ask(self, message: bytes, *, by_tcp: bool) -> bytes:
        """The answer to a question, both as DNS has them.  Raises OSError, SandboxError."""
        if by_tcp:
            return await self._ask_by_tcp(message)
        assert self._transport is not None
        number = self._free_number()
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._asked[number] = future
        try:
            self._transport.sendto(number + message[2:])
            answer = await future
        finally:
            del self._asked[number]
        return message[:2] + answer[2:]

    def _free_number(self) -> bytes:
        while (number := random.getrandbits(16).to_bytes(2, "big")) in self._asked:
            pass
        return number

    async def _ask_by_tcp(self, message: bytes) -> bytes:
        with closing(await attach.connected(self._namespace, self._address, PORT, stream=True)) as sock:
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(sock, len(message).to_bytes(2, "big") + message)
            head = await _exactly(sock, 2)
            return await _exactly(sock, int.from_bytes(head, "big"))

    def datagram_received(self, data: bytes, addr: object) -> None:
        future = self._asked.get(data[:2])
        if future is not None and not future.done():
            future.set_result(data)

    def error_received(self, exc: Exception) -> None:
        log.debug("the name server at %s is not there: %s", self._address, exc)


async def _exactly(sock: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = await asyncio.get_running_loop().sock_recv(sock, count - len(parts))
        if not part:
            raise ConnectionResetError("the name server closed the connection")
        parts += part
    return bytes(parts)
