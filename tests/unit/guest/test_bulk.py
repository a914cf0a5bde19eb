"""The host's end of the port for bulk stdio, and a guest that does there what no honest one does."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest

from tests.agent.hearing import hear
from tests.unit.guest.hostile import agent, saying
from vmsandbox.errors import UnavailableError
from vmsandbox.guest import bulk as port
from vmsandbox.guest.attachment import OUTPUT_WINDOW
from vmsandbox_protocol import agent_pb2 as pb
from vmsandbox_protocol import bulk, link

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from vmsandbox.guest.attachment import Attachment
    from vmsandbox.guest.client import AgentClient

FIRST = pb.AttachResponse(accepted=pb.Ack(stream=pb.STREAM_STDIN), has_bulk=True)
WANTED = pb.AttachResponse(bulk_wanted=True)
EXITED = pb.AttachResponse(exited=pb.ExitStatus(code=3))
ERR_ENDS = pb.AttachResponse(output=pb.Chunk(stream=pb.STREAM_STDERR, eof=True))
CHUNK = 256 * 1024


def moved(offset: int = 0, stream: pb.Stream = pb.STREAM_STDOUT) -> pb.AttachResponse:
    return pb.AttachResponse(moved=pb.Ack(stream=stream, offset=offset))


def data(offset: int, text: bytes, *, stream: int = bulk.STDOUT, channel: int = 1, eof: bool = False) -> bytes:
    return bulk.data_head(stream, channel, offset, len(text), eof=eof) + text


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("b")


@asynccontextmanager
async def guest(
    directory: Path,
    answer: Callable[..., AsyncIterator[bytes]],
    *frames: bytes,
    close: bool = False,
    hold: asyncio.Event | None = None,
) -> AsyncIterator[AgentClient]:
    """A client of a guest that says on its port for bulk what a test wants, after bytes that were meant for others.

    With `hold` it waits before it says the last.
    """

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                hello = await reader.readexactly(link.HELLO)
                writer.write(link.ECHO + b"0" * link.NONCE_DIGITS + data(7, b"stale"))
                writer.write(link.ECHO + hello[len(link.MARK) :])
                for frame in frames:
                    if hold is not None and frame is frames[-1]:
                        await hold.wait()
                    writer.write(frame)
                    await writer.drain()
                if not close:
                    await reader.read()
        finally:
            writer.close()  # however the test ends

    path = directory / "bulk"
    server = await asyncio.start_unix_server(serve, str(path))
    try:
        async with agent(directory, answer, bulk_path=path) as client:
            yield client
    finally:
        server.close()


async def exhausted(attachment: Attachment) -> None:
    while True:
        await attachment.receive()


FLOOD = [data(at, bytes(CHUNK)) for at in range(0, OUTPUT_WINDOW + CHUNK, CHUNK)]
LIES: dict[str, list[bytes]] = {
    "a gap": [data(1, b"x")],
    "a repetition": [data(0, b"xy"), data(0, b"xy")],
    "an overlap": [data(0, b"xy"), data(1, b"yz")],
    "an offset beyond all bounds": [data((1 << 64) - 1, b"x")],
    "output after its end": [data(0, b"x", eof=True), data(1, b"x")],
    "output of a stream that is input": [data(0, b"x", stream=bulk.STDIN)],
    "acceptance of what was not sent": [bulk.ack(bulk.STDIN, 1, 5)],
    "output for an attachment that never was": [data(0, b"x", channel=2)],
    "more than was asked for": FLOOD,
    "a frame that is too large": [bulk.data_head(bulk.STDOUT, 1, 0, link.MAX_FRAME + 1)],
    "a frame of an unknown kind": [bulk.HEAD.pack(0, 9, 2, 0, 1, 0)],
}


@pytest.mark.parametrize("frames", [pytest.param(value, id=key) for key, value in LIES.items()])
async def test_a_guest_that_lies_at_the_port_ends_the_attachment(directory: Path, frames: list[bytes]) -> None:
    answer = saying(FIRST, WANTED, moved())
    async with guest(directory, answer, *frames) as client, client.attach("web", "") as attachment:
        with pytest.raises(UnavailableError, match="broke the protocol"):
            await exhausted(attachment)


async def test_a_port_that_closes_ends_the_attachments_that_moved_there(directory: Path) -> None:
    answer = saying(FIRST, WANTED, moved())
    async with guest(directory, answer, data(0, b"x"), close=True) as client, client.attach("web", "") as attachment:
        with pytest.raises(UnavailableError, match="was closed"):
            await exhausted(attachment)


@pytest.mark.parametrize("how", ["a frame of an unknown kind", "output after its end", "closes"])
async def test_a_move_to_a_port_that_has_ended_ends_the_attachment(directory: Path, how: str) -> None:
    async def answer(requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
        yield FIRST.SerializeToString()
        yield WANTED.SerializeToString()
        while attachment._port_ended is None:  # noqa: ASYNC110
            await asyncio.sleep(0)
        yield moved().SerializeToString()
        await asyncio.Event().wait()

    frames = LIES.get(how, [])
    made = guest(directory, answer, *frames, close=how == "closes")
    async with made as client, client.attach("web", "") as attachment:
        with pytest.raises(UnavailableError, match="was closed" if how == "closes" else "broke the protocol"):
            await exhausted(attachment)


async def test_what_is_acknowledged_after_a_move_reaches_the_guest_whose_greeting_is_still_under_way(
    directory: Path,
) -> None:
    acknowledged = asyncio.get_running_loop().create_future()
    wanted = bulk.ack(bulk.STDOUT, 1, OUTPUT_WINDOW)

    async def answer(requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
        yield FIRST.SerializeToString()
        yield WANTED.SerializeToString()
        for at in range(0, OUTPUT_WINDOW, CHUNK):
            chunk = pb.Chunk(stream=pb.STREAM_STDOUT, offset=at, data=bytes(CHUNK))
            yield pb.AttachResponse(output=chunk).SerializeToString()
        await heard.wait()
        yield moved(OUTPUT_WINDOW).SerializeToString()
        await asyncio.Event().wait()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(link.HELLO)
        heard.set()
        acknowledged.set_result(await reader.readexactly(len(wanted)))
        writer.close()

    heard = asyncio.Event()
    server = await asyncio.start_unix_server(serve, str(directory / "bulk"))
    async with agent(directory, answer, bulk_path=directory / "bulk") as client, client.attach("web", "") as attachment:
        receiving = asyncio.create_task(exhausted(attachment))
        while bulk.STDOUT not in attachment._moved:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await attachment.ack(bulk.STDOUT, OUTPUT_WINDOW)
        assert await acknowledged == wanted
        receiving.cancel()
        await asyncio.wait([receiving])
    server.close()


async def test_a_port_that_stands_still_ends_the_session_and_is_hung_up_before_the_next(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(port, "_PATIENCE", 0.05)
    visits: list[bytes] = []
    third = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        visits.append(await reader.read())
        writer.close()
        if len(visits) == 3:
            third.set()

    server = await asyncio.start_unix_server(serve, str(directory / "bulk"))
    answer = saying(FIRST, WANTED, moved())
    async with agent(directory, answer, bulk_path=directory / "bulk") as client:
        for _ in range(2):
            async with client.attach("web", "") as attachment:
                with pytest.raises(UnavailableError, match="has not answered"):
                    await exhausted(attachment)
        await third.wait()
    server.close()
    hello = len(link.MARK) + link.NONCE_DIGITS
    assert [len(visit) for visit in visits] == [hello, 0, hello]


CALLS: dict[str, list[pb.AttachResponse]] = {
    "a move of a stream that is input": [FIRST, moved(stream=pb.STREAM_STDIN)],
    "a move from elsewhere": [FIRST, moved(5)],
    "two moves": [FIRST, moved(), moved()],
    "a wish that is repeated": [FIRST, WANTED, WANTED],
    "output by the call after the move": [
        FIRST,
        moved(),
        pb.AttachResponse(output=pb.Chunk(stream=pb.STREAM_STDOUT, data=b"x")),
    ],
}


@pytest.mark.parametrize("answers", [pytest.param(value, id=key) for key, value in CALLS.items()])
async def test_a_guest_that_lies_about_moves_ends_the_attachment(directory: Path, answers: list[Any]) -> None:
    async with guest(directory, saying(*answers)) as client, client.attach("web", "") as attachment:
        with pytest.raises(UnavailableError, match="broke the protocol"):
            await exhausted(attachment)


async def test_a_move_that_was_not_offered_ends_the_attachment(directory: Path) -> None:
    async with agent(directory, saying(FIRST, moved())) as client, client.attach("web", "") as attachment:
        await attachment.receive()
        with pytest.raises(UnavailableError, match="broke the protocol"):
            await attachment.receive()


async def test_an_exit_waits_for_what_the_port_still_brings(directory: Path) -> None:
    last = asyncio.Event()
    answer = saying(FIRST, WANTED, moved(), ERR_ENDS, EXITED)
    frames = (data(0, b"one "), data(4, b"two", eof=True))
    async with guest(directory, answer, *frames, hold=last) as client, client.attach("web", "") as attachment:
        hearing = asyncio.create_task(hear(attachment, acknowledge=False))
        while attachment._exit is None and not hearing.done():  # noqa: ASYNC110
            await asyncio.sleep(0)
        last.set()
        heard = await hearing
    assert heard.stdout == b"one two"
    assert heard.exit is not None


async def test_what_the_port_brings_early_waits_for_the_move(directory: Path) -> None:
    told = asyncio.Event()

    async def answer(requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
        yield FIRST.SerializeToString()
        yield WANTED.SerializeToString()
        await told.wait()
        chunk = pb.Chunk(stream=pb.STREAM_STDOUT, data=b"one ")
        for message in (pb.AttachResponse(output=chunk), moved(4), ERR_ENDS, EXITED):
            yield message.SerializeToString()
        await asyncio.Event().wait()

    frames = (data(4, b"two "), data(8, b"three", eof=True))
    async with guest(directory, answer, *frames) as client, client.attach("web", "") as attachment:
        await attachment.receive()
        receiving = asyncio.create_task(attachment.receive())
        while not any(early.arrivals for early in attachment._early.values()):  # noqa: ASYNC110
            await asyncio.sleep(0)
        told.set()
        heard = b""
        first = await receiving
        while first is not None and first.WhichOneof("what") == "output":
            heard += first.output.data
            first = await attachment.receive()
    assert heard == b"one two three"
    assert first is not None
    assert first.exited.code == 3


async def test_a_process_that_says_nothing_at_the_port_holds_up_no_other(directory: Path) -> None:
    """One attachment takes nothing of what the port brings for it; the other gets its own."""
    answer = saying(FIRST, WANTED, moved())
    frames = (*FLOOD[: OUTPUT_WINDOW // CHUNK], data(0, b"x", channel=2))
    async with (
        guest(directory, answer, *frames) as client,
        client.attach("slow", "") as slow,
        client.attach("quick", "") as quick,
    ):
        await slow.receive()
        await quick.receive()
        receiving: set[Awaitable[Any]] = {asyncio.create_task(slow.receive())}
        answered = await quick.receive()
        await asyncio.gather(*receiving)
    assert answered is not None
    assert answered.output.data == b"x"
