"""What the host relies on, of an agent that is a service on this machine and of one that is PID 1 of a guest."""

from __future__ import annotations

import asyncio
import io
import json
import random
import tarfile
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from tests.agent import harness
from tests.agent.hearing import hear
from tests.agent.loops import Loop
from tests.agent.served import SLOW, Served
from vmsandbox.errors import (
    AlreadyExistsError,
    CommandNotExecutableError,
    CommandNotFoundError,
    InvalidArgumentError,
    InvalidStateError,
    NotFoundError,
    UnavailableError,
)
from vmsandbox_protocol import agent_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

pytestmark = pytest.mark.deadline(180)

NOTHING = pb.Stdio()
OUTPUT = pb.Stdio(stdout=True, stderr=True)


@pytest.fixture(scope="module", params=["service", "guest"])
def agent(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    if request.param == "guest":
        yield request.getfixturevalue("guest")
        return
    with Loop() as loop, loop.entered(harness.running(tmp_path_factory.mktemp("s"))) as served:
        served.loop = loop
        # Until it answers, its processes are not all there: the rest would look as if the first test had left it.
        loop.run(served.client.details(timeout=SLOW))
        yield served


@asynccontextmanager
async def removed(agent: Served, *container_ids: str) -> AsyncIterator[None]:
    """Remove containers at the end of the block; nothing of them is left."""
    try:
        yield
    finally:
        for container_id in container_ids:
            await agent.client.remove_container(container_id, force=True, timeout=SLOW)
    assert not {*container_ids} & {row.container_id for row in await agent.client.containers(timeout=SLOW)}


async def test_output_and_exit_arrive_and_input_is_accepted(agent: Served) -> None:
    async with removed(agent, "web"):
        await agent.create("web", ["sh", "-c", "echo before; cat; echo wrong >&2; exit 7"])
        async with agent.client.attach("web", "") as attachment:
            hearing = asyncio.create_task(hear(attachment))
            await attachment.send_input(0, b"some input\n", eof=True)
            heard = await hearing
        assert (heard.stdout, heard.stderr) == (b"before\nsome input\n", b"wrong\n")
        assert (heard.exit and heard.exit.code, heard.accepted) == (7, len(b"some input\n"))


async def test_much_goes_both_ways_at_once_in_order(agent: Served) -> None:
    data = random.Random(7).randbytes(3_000_000)
    async with removed(agent, "web"):
        await agent.create("web", ["cat"])
        async with asyncio.timeout(150), agent.client.attach("web", "") as attachment:
            hearing = asyncio.create_task(hear(attachment))
            await attachment.send_input(0, data, eof=True)
            heard = await hearing
        assert heard.stdout == data


async def test_what_was_not_acknowledged_is_given_again(agent: Served) -> None:
    async with removed(agent, "web"):
        await agent.create("web", ["sh", "-c", "echo first; read line; echo $line"])
        async with agent.client.attach("web", "") as attachment:
            await hear(attachment, acknowledge=False, until=b"first\n")
        async with agent.client.attach("web", "") as attachment:
            assert (await hear(attachment, until=b"first\n")).stdout == b"first\n"
            await attachment.send_input(0, b"second\n")
            assert (await hear(attachment, until=b"second\n")).stdout == b"second\n"
        with pytest.raises(InvalidArgumentError):
            async with agent.client.attach("web", "") as attachment:
                await attachment.receive()
        async with agent.client.attach("web", "", stdout_offset=len(b"first\nsecond\n")) as attachment:
            heard = await hear(attachment)
        assert (heard.stdout, heard.exit and heard.exit.code) == (b"", 0)


async def test_a_newer_attachment_takes_over(agent: Served) -> None:
    async with removed(agent, "web"):
        await agent.create("web", ["sh", "-c", "echo here; sleep 100000"])
        async with asyncio.timeout(SLOW), agent.client.attach("web", "") as old:
            await hear(old, acknowledge=False, until=b"here")
            async with agent.client.attach("web", "") as new:
                assert b"here" in (await hear(new, acknowledge=False, until=b"here")).stdout
                with pytest.raises(UnavailableError):
                    await hear(old)


async def test_an_exec_has_what_init_has_and_is_forgotten_when_acknowledged(agent: Served) -> None:
    async with removed(agent, "web"):
        await agent.create("web", ["sleep", "100000"], stdio=NOTHING)
        heard = await agent.exec("web", "one", ["sh", "-c", "id -u; env; exit 3"], user="web", default_home=True)
        assert heard.stdout.startswith(b"1000\n")
        assert b"HOME=/home/web\n" in heard.stdout
        assert b"PATH=/bin\n" in heard.stdout
        assert heard.exit is not None
        assert heard.exit.code == 3
        with pytest.raises(NotFoundError):
            await agent.client.wait("web", "one")


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["nothing-like-this"], CommandNotFoundError),
        (["/no/such/file"], CommandNotFoundError),
        (["/etc/passwd"], CommandNotExecutableError),
    ],
)
async def test_a_program_that_cannot_run_is_told_apart(agent: Served, argv: list[str], error: type[Exception]) -> None:
    with pytest.raises(error):
        await agent.create("web", argv)
    assert "web" not in {row.container_id for row in await agent.client.containers()}
    async with removed(agent, "web"):
        await agent.create("web", ["sleep", "100000"], stdio=NOTHING)
        with pytest.raises(error):
            await agent.start_exec("web", "one", argv)


async def test_states_are_respected(agent: Served) -> None:
    async with removed(agent, "web"):
        await agent.create("web", ["sleep", "100000"], stdio=NOTHING, start=False)
        with pytest.raises(AlreadyExistsError):
            await agent.create("web", ["true"])
        with pytest.raises(InvalidStateError) as caught:
            await agent.client.pause("web")
        assert caught.value.state == "created"
        await agent.client.start_container("web")
        with pytest.raises(InvalidStateError):
            await agent.client.start_container("web")
        with pytest.raises(InvalidStateError):
            await agent.client.remove_container("web")
        await agent.client.signal("web", "", 15, all=True)
        await agent.client.signal("web", "", 9)
        status = await agent.client.wait("web", "")
        assert (status.code, status.signal) == (137, 9)
        with pytest.raises(InvalidStateError) as caught:
            await agent.client.signal("web", "", 15)
        assert caught.value.state == "stopped"
    with pytest.raises(NotFoundError):
        await agent.client.remove_container("web")


async def test_a_paused_container_stands_still_and_its_limits_can_change(agent: Served) -> None:
    async with removed(agent, "web"):
        await agent.create("web", ["sleep", "100000"], stdio=NOTHING, resources={"pids": {"limit": 20}})
        assert (await agent.client.stats("web")).pids_limit == 20
        await agent.client.pause("web")
        with pytest.raises(InvalidStateError):
            await agent.start_exec("web", "one", ["true"])
        await agent.client.resume("web")
        await agent.client.update_container("web", json.dumps({"pids": {"limit": 33}}).encode())
        stats = await agent.client.stats("web")
        assert (stats.pids_limit, stats.pids) == (33, 1)
        assert stats.memory_bytes > 0


async def test_archives_go_in_and_come_out(agent: Served) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("new/file")
        info.size, info.mode = 5, 0o640
        tar.addfile(info, io.BytesIO(b"hello"))

    async def pieces() -> AsyncIterator[bytes]:
        yield buffer.getvalue()

    async with removed(agent, "web"):
        await agent.create("web", ["sleep", "100000"], stdio=NOTHING)
        await agent.client.copy_in("web", "/tmp", pieces(), timeout=SLOW)
        assert (await agent.exec("web", "cat", ["cat", "/tmp/new/file"])).stdout == b"hello"
        got = b"".join([data async for data in agent.client.copy_out("web", "/tmp/new", timeout=SLOW)])
    with tarfile.open(fileobj=io.BytesIO(got)) as tar:
        member = tar.extractfile("new/file")
        assert member is not None
        assert member.read() == b"hello"
        assert tar.getmember("new/file").mode == 0o640


async def test_an_exit_is_told_to_whoever_watches(agent: Served) -> None:
    async with removed(agent, "web"):
        await agent.create("web", ["sh", "-c", "exit 4"], stdio=NOTHING)
        events = agent.client.events()
        async for event in events:
            if event.container_id == "web" and event.WhichOneof("what") == "exited":
                assert (event.exec_id, event.exited.code) == ("", 4)
                break
        await events.aclose()
