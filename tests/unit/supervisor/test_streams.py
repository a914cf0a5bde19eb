"""A stand-in's connection: what it says before the agent's side is there is not lost."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import pytest

from vmsandbox import wire
from vmsandbox.errors import InvalidStateError, NotFoundError, SandboxError
from vmsandbox.supervisor.process import Process
from vmsandbox.supervisor.streams import Link
from vmsandbox_protocol import agent_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from vmsandbox.guest.client import AgentClient


class Agent:
    """Attaches when it is allowed to, and keeps what it is told then."""

    def __init__(self) -> None:
        self.may_attach = asyncio.Event()
        self.told: asyncio.Queue[tuple[Any, ...]] = asyncio.Queue()
        #: what is said to a signal, if not that it was taken
        self.refusal: SandboxError | None = None

    @asynccontextmanager
    async def attach(self, *_: object, **__: object) -> AsyncIterator[Agent]:
        await self.may_attach.wait()
        yield self

    async def receive(self) -> None:
        await asyncio.Event().wait()

    async def signal(self, *_: object) -> None:
        if self.refusal is not None:
            raise self.refusal

    async def ack(self, stream: int, offset: int) -> None:
        await self.told.put(("ack", stream, offset))

    async def close_output(self, stream: int) -> None:
        await self.told.put(("close", stream))


async def test_what_is_said_of_output_before_there_is_an_attachment_reaches_it() -> None:
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_unix_connection(sock=ours)
    standin_reader, standin = await asyncio.open_unix_connection(sock=theirs)
    agent = Agent()
    process = Process("c0ffee", "", terminal=False, standin=None)
    link = Link(process, reader, writer, {"stdout": 9}, ended=lambda *_: None)
    serving = asyncio.create_task(link.serve(cast("AgentClient", agent)))
    standin.write(wire.encode_message({"ack": "stdout", "offset": 7}))
    standin.write(wire.encode_message({"closed": "stderr"}))
    standin.write(wire.encode_message({"signal": 0}))
    assert await wire.read(standin_reader)  # it has heard all three
    agent.may_attach.set()
    told = {await agent.told.get() for _ in range(2)}
    assert told == {("ack", pb.STREAM_STDOUT, 7), ("close", pb.STREAM_STDERR)}
    standin.close()
    await serving
    writer.close()


@pytest.mark.parametrize(
    "error", [NotFoundError("gone"), InvalidStateError("process", state="stopped", wanted="signal")]
)
async def test_a_signal_for_what_has_ended_is_taken_and_breaks_nothing(error: SandboxError) -> None:
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_unix_connection(sock=ours)
    standin_reader, standin = await asyncio.open_unix_connection(sock=theirs)
    agent = Agent()
    agent.refusal = error
    link = Link(Process("c0ffee", "", terminal=False, standin=None), reader, writer, {}, ended=lambda *_: None)
    serving = asyncio.create_task(link.serve(cast("AgentClient", agent)))
    standin.write(wire.encode_message({"signal": 9}))
    frame = await wire.read(standin_reader)
    assert frame is not None
    assert frame.message() == {"signalled": 9}
    assert not serving.done()
    standin.close()
    await serving
    writer.close()
