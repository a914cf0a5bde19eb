"""Names that a guest asks for are asked of the namespace's name server, and each answer goes to its question."""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import pytest

from vmsandbox.errors import UnavailableError
from vmsandbox.resources.network import attach
from vmsandbox.supervisor import resolving
from vmsandbox_protocol import agent_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

ADDRESS = "127.0.0.11"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A name server that answers a question with the same in capital letters, datagrams in pairs and the last first."""
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagrams.bind((ADDRESS, 0))
    listener = socket.create_server((ADDRESS, 0))

    def answer_datagrams() -> None:
        while True:
            pair = [datagrams.recvfrom(1000) for _ in range(2)]
            for message, peer in reversed(pair):
                if message == b"":
                    return
                datagrams.sendto(message[:2] + message[2:].upper(), peer)

    def answer_connections() -> None:
        while True:
            connection, _ = listener.accept()
            with connection, connection.makefile("rb") as stream:
                head = stream.read(2)
                if not head:
                    return
                message = stream.read(int.from_bytes(head, "big"))
                connection.sendall(head + message[:2] + message[2:].upper())

    async def connected(_path: str, _address: str, _port: int, *, stream: bool) -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM if stream else socket.SOCK_DGRAM)
        sock.connect((listener if stream else datagrams).getsockname())
        sock.setblocking(False)
        return sock

    monkeypatch.setattr(attach, "connected", connected)
    threads = [threading.Thread(target=target) for target in (answer_datagrams, answer_connections)]
    for thread in threads:
        thread.start()
    yield
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
        for _ in range(2):
            last.sendto(b"", datagrams.getsockname())
    socket.create_connection(listener.getsockname()).close()
    for thread in threads:
        thread.join()
    datagrams.close()
    listener.close()


class Guest:
    """An agent whose call breaks as often as it is to, and then asks what it is to."""

    def __init__(self, *questions: pb.NameQuestion, breaking: int = 0) -> None:
        self.to_ask = questions
        self.breaking = breaking
        self.answers: asyncio.Queue[tuple[int, bytes]] = asyncio.Queue()

    @asynccontextmanager
    async def names(self, address: str) -> AsyncIterator[Guest]:
        assert address == ADDRESS
        if self.breaking:
            self.breaking -= 1
            raise UnavailableError("the agent is gone")
        yield self

    async def questions(self) -> AsyncIterator[pb.NameQuestion]:
        yield pb.NameQuestion()
        for question in self.to_ask:
            yield question
        await asyncio.Event().wait()

    async def answer(self, number: int, message: bytes) -> None:
        self.answers.put_nowait((number, message))


@asynccontextmanager
async def relayed(guest: Guest) -> AsyncIterator[asyncio.Event]:
    listening = asyncio.Event()
    task = asyncio.create_task(resolving.keep(cast("Any", guest), "/run/netns/it", ADDRESS, listening))
    try:
        yield listening
    finally:
        task.cancel()
        await asyncio.wait({task})


@pytest.mark.usefixtures("server")
async def test_questions_with_one_number_get_their_own_answers() -> None:
    first = pb.NameQuestion(number=1, message=b"\0\7first")
    second = pb.NameQuestion(number=2, message=b"\0\7second")
    guest = Guest(first, second)
    async with relayed(guest) as listening:
        answers = dict([await guest.answers.get() for _ in range(2)])
        assert listening.is_set()
    assert answers == {1: b"\0\7FIRST", 2: b"\0\7SECOND"}


@pytest.mark.usefixtures("server")
async def test_what_came_by_tcp_is_asked_by_tcp() -> None:
    message = b"\1\2" + b"long" * 10_000
    guest = Guest(pb.NameQuestion(number=7, message=message, by_tcp=True))
    async with relayed(guest):
        assert await guest.answers.get() == (7, b"\1\2" + b"LONG" * 10_000)


@pytest.mark.usefixtures("server")
async def test_a_relay_that_breaks_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolving, "PAUSE", 0)
    guest = Guest(pb.NameQuestion(number=7, message=b"\1\2x", by_tcp=True), breaking=3)
    async with relayed(guest):
        assert await guest.answers.get() == (7, b"\1\2X")
