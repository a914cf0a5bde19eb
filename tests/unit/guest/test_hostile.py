"""An agent that lies, floods and stays silent: one kind of error comes of it, in bounded time and memory."""

from __future__ import annotations

import asyncio
import resource
import subprocess
import sys
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from tests.unit.guest.hostile import agent, answering, saying
from vmsandbox.errors import BY_CODE, NotFoundError, SandboxError, TimedOutError, UnavailableError
from vmsandbox.guest.client import AgentClient
from vmsandbox_agent import errors
from vmsandbox_protocol import agent_pb2 as pb
from vmsandbox_protocol import link

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

MIB = 1 << 20


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("h")


# ---------------------------------------------------------------- single answers

CONTAINERS = pb.ListContainersResponse(containers=[pb.ContainerRow()] * 65_537)


def containers(*processes: pb.ProcessState) -> pb.ListContainersResponse:
    return pb.ListContainersResponse(containers=[pb.ContainerRow(processes=processes)])


async def created(client: AgentClient) -> pb.CreateContainerResponse:
    return await client.create_container(pb.CreateContainerRequest(), timeout=30)


LIES: list[tuple[str, Any, Callable[[AgentClient], Awaitable[Any]]]] = [
    ("a message that is too large", pb.GuestDetails(agent_version="x" * 9 * MIB), lambda c: c.details()),
    ("a text that is too long", pb.GuestDetails(kernel_release="x" * 65_537), lambda c: c.details()),
    ("a long text among several", pb.GuestDetails(filesystems=["ext4", "x" * 65_537]), lambda c: c.details()),
    ("a long key", pb.GuestDetails(boot_phases_us={"x" * 65_537: 1}), lambda c: c.details()),
    ("control characters in a list", pb.GuestDetails(filesystems=["\x1b[2J"]), lambda c: c.details()),
    ("control characters in a key", pb.GuestDetails(boot_phases_us={"\x1b[2J": 1}), lambda c: c.details()),
    ("bytes that are no message", b"\xff" * 100, lambda c: c.details()),
    ("a text that is not UTF-8", b"\x0a\x02\xff\xfe", lambda c: c.details()),
    ("too many entries", CONTAINERS, lambda c: c.containers()),
    (
        "a long value",
        pb.ListInterfacesResponse(interfaces=[pb.Interface(sysctls={"a": "x" * 65_537})]),
        lambda c: c.interfaces(),
    ),
    ("an impossible exit code", pb.ExitStatus(code=256), lambda c: c.wait("a", "")),
    ("an impossible signal", pb.ExitStatus(signal=65), lambda c: c.wait("a", "")),
    (
        "an impossible exit in a list",
        containers(pb.ProcessState(exit=pb.ExitStatus(code=1 << 31))),
        lambda c: c.containers(),
    ),
    (
        "more processors online than there are",
        pb.OnlineCpusResponse(online=3, present=2),
        lambda c: c.online_cpus(3, 1),
    ),
    (
        "more processors than a machine has",
        pb.OnlineCpusResponse(online=1, present=1 << 31),
        lambda c: c.online_cpus(3, 1),
    ),
    (
        "the address of a disk that nobody asked for",
        pb.AddStoragesResponse(addresses=[pb.StorageAddress(mount_point="/other")]),
        lambda c: c.add_storages([pb.Storage(mount_point="/run/vmsandbox/a")]),
    ),
    (
        "no address of a disk",
        pb.AddStoragesResponse(),
        lambda c: c.add_storages([pb.Storage(driver=pb.Storage.DRIVER_BLOCK, mount_point="/run/vmsandbox/a")]),
    ),
    ("an exec that has a path", containers(pb.ProcessState(exec_id="../x")), lambda c: c.containers()),
    ("an exec with a long id", containers(pb.ProcessState(exec_id="x" * 129)), lambda c: c.containers()),
    ("too many processes", containers(*[pb.ProcessState()] * 16_385), lambda c: c.containers()),
    ("many phases", pb.GuestDetails(boot_phases_us={"a" * n: 1 for n in range(1, 18)}), lambda c: c.details()),
    ("a phase with a long name", pb.GuestDetails(boot_phases_us={"a" * 33: 1}), lambda c: c.details()),
    ("a long phase", pb.CreateContainerResponse(phases_us={"create": 1 << 42}), lambda c: created(c)),
    (
        "a phase of no agent's",
        pb.CreateSandboxResponse(details=pb.GuestDetails(boot_phases_us={"A": 1})),
        lambda c: c.create_sandbox(pb.CreateSandboxRequest(), timeout=30),
    ),
]


@pytest.mark.parametrize(("answer", "asking"), [pytest.param(*case[1:], id=case[0]) for case in LIES])
async def test_an_answer_that_no_honest_agent_gives_is_refused(
    directory: Path, answer: Any, asking: Callable[[AgentClient], Awaitable[Any]]
) -> None:
    async with agent(directory, answering(answer)) as client:
        with pytest.raises(UnavailableError) as caught:
            await asking(client)
    assert not isinstance(caught.value, TimedOutError)
    assert len(str(caught.value)) < 5000


async def test_nothing_compressed_is_unpacked_so_no_bomb_is(directory: Path) -> None:
    """What is small, and would be welcome as it is, is refused when it comes compressed."""
    welcome = pb.GuestDetails(agent_version="x" * 4000)
    async with agent(directory, answering(welcome)) as client:
        assert (await client.details()).agent_version == "x" * 4000
    async with agent(directory, answering(welcome), compression=grpc.Compression.Gzip) as client:
        with pytest.raises(UnavailableError):
            await client.details()


async def test_no_answer_at_all_is_waited_for_no_longer_than_said(directory: Path) -> None:
    async with agent(directory, saying()) as client:
        with pytest.raises(TimedOutError):
            await client.details(timeout=0.3)
        with pytest.raises(TimedOutError):
            await client.wait("a", "", timeout=0.3)


async def test_an_end_without_an_answer_is_an_error(directory: Path) -> None:
    async with agent(directory, answering()) as client:
        with pytest.raises(UnavailableError):
            await client.details()


async def test_a_processs_command_cannot_speak_to_the_terminal(directory: Path) -> None:
    row = pb.ProcessRow(pid=1, command="sh\x1b]0;title\x07\n\x9b2J", user="r\roo\tt", tty="ä")
    async with agent(directory, answering(pb.ListProcessesResponse(processes=[row]))) as client:
        (found,) = await client.processes("web")
    assert (found.command, found.user, found.tty) == ("sh?]0;title???2J", "r?oo?t", "ä")


# ---------------------------------------------------------------- errors


def failing(status: grpc.StatusCode, text: str, *metadata: tuple[str, str]) -> Callable[..., AsyncIterator[bytes]]:
    async def answer(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        context.set_trailing_metadata(metadata)
        await context.abort(status, text)
        yield b""

    return answer


async def test_the_text_of_an_error_is_cut_and_cleaned(directory: Path) -> None:
    text = "no \x1b[2J such \r\n thing " + "x" * 6000
    answer = failing(grpc.StatusCode.NOT_FOUND, text, ("vmsandbox-code", "not-found"))
    async with agent(directory, answer) as client:
        with pytest.raises(NotFoundError) as caught:
            await client.stats("web")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 4096


@pytest.mark.parametrize("code", ["no-such-code", "internal", "", "unavailable", "x" * 10_000])
async def test_any_code_becomes_an_error_of_ours(directory: Path, code: str) -> None:
    answer = failing(grpc.StatusCode.INTERNAL, "text", ("vmsandbox-code", code))
    async with agent(directory, answer) as client:
        with pytest.raises(SandboxError):
            await client.stats("web")


@pytest.mark.parametrize("code", sorted(BY_CODE))
async def test_a_code_that_no_agent_gives_says_nothing(directory: Path, code: str) -> None:
    async with agent(directory, failing(grpc.StatusCode.INTERNAL, "text", ("vmsandbox-code", code))) as client:
        with pytest.raises(SandboxError) as caught:
            await client.stats("web")
    assert caught.value.code == (code if code in {error.code for error in agents_errors()} else "internal")


def agents_errors() -> list[type[errors.AgentError]]:
    return [errors.AgentError, *errors.AgentError.__subclasses__()]


@pytest.mark.parametrize("status", [status for status in grpc.StatusCode if status is not grpc.StatusCode.OK])
async def test_a_status_without_a_code_is_an_agent_that_is_not_ours(directory: Path, status: grpc.StatusCode) -> None:
    async with agent(directory, failing(status, "text")) as client:
        with pytest.raises(SandboxError) as caught:
            await client.stats("web", timeout=5)
    if status is not grpc.StatusCode.UNIMPLEMENTED:
        assert isinstance(caught.value, UnavailableError)


async def test_more_metadata_than_there_is_room_for_is_an_error(directory: Path) -> None:
    answer = failing(grpc.StatusCode.INTERNAL, "text", *((f"key-{n}", "x" * 4000) for n in range(20)))
    async with agent(directory, answer) as client:
        with pytest.raises(UnavailableError):
            await client.stats("web", timeout=5)


async def test_what_is_asked_of_a_closed_client_is_an_unavailable_agent(directory: Path) -> None:
    asked = asyncio.Event()

    async def answer(requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
        asked.set()
        await asyncio.Event().wait()
        yield b""

    async with agent(directory, answer) as client:
        under_way = asyncio.create_task(client.details())
        await asked.wait()
    with pytest.raises(UnavailableError):
        await under_way
    with pytest.raises(UnavailableError):
        await client.details()
    with pytest.raises(UnavailableError):
        await anext(aiter(client.events()))
    with pytest.raises(UnavailableError):
        async with client.attach("web", ""):
            pass


# ---------------------------------------------------------------- streams

STDIN, STDOUT, STDERR = pb.STREAM_STDIN, pb.STREAM_STDOUT, pb.STREAM_STDERR


def accepted(offset: int, stream: pb.Stream = STDIN) -> pb.AttachResponse:
    return pb.AttachResponse(accepted=pb.Ack(stream=stream, offset=offset))


def output(offset: int, data: bytes = b"", *, stream: pb.Stream = STDOUT, eof: bool = False) -> pb.AttachResponse:
    return pb.AttachResponse(output=pb.Chunk(stream=stream, offset=offset, data=data, eof=eof))


EXITED = pb.AttachResponse(exited=pb.ExitStatus(code=0))
ENDS = (output(0, eof=True), output(0, stream=STDERR, eof=True))

BROKEN_STREAMS = {
    "output before anything was accepted": [output(0, b"x")],
    "a gap": [accepted(0), output(1, b"x")],
    "a repetition": [accepted(0), output(0, b"xy"), output(0, b"xy")],
    "an overlap": [accepted(0), output(0, b"xy"), output(1, b"yz")],
    "an offset beyond all bounds": [accepted(0), output((1 << 64) - 1, b"x")],
    "too much in one chunk": [accepted(0), output(0, b"x" * (MIB + 1))],
    "a chunk of nothing": [accepted(0), output(0)],
    "output of a stream that is input": [accepted(0), output(0, b"x", stream=STDIN)],
    "output of a stream that does not exist": [accepted(0), pb.AttachResponse(output=pb.Chunk(stream=7, data=b"x"))],  # type: ignore[arg-type]
    "output after its end": [accepted(0), output(0, eof=True), output(0, b"x")],
    "two ends": [accepted(0), output(0, eof=True), output(0, eof=True)],
    "acceptance of what was not sent": [accepted(0), accepted(1)],
    "acceptance that goes back": [accepted(5), accepted(4)],
    "acceptance that stands still": [accepted(5), accepted(5)],
    "acceptance of output": [accepted(0, STDOUT)],
    "an exit before the end of the output": [accepted(0), ENDS[0], EXITED],
    "two exits": [accepted(0), *ENDS, EXITED, EXITED],
    "output after the exit": [accepted(0), *ENDS, EXITED, output(0, b"x")],
    "an impossible exit": [accepted(0), *ENDS, pb.AttachResponse(exited=pb.ExitStatus(code=300))],
    "input that is closed twice": [accepted(0), *[pb.AttachResponse(stdin_closed=True)] * 2],
    "input that is not closed": [accepted(0), pb.AttachResponse(stdin_closed=False)],
    "a message that says nothing": [accepted(0), pb.AttachResponse()],
    "a message that is none": [accepted(0), b"\xff\xff\xff"],
    "a message that is too large": [accepted(0), output(0, b"x" * (9 * MIB))],
}


@pytest.mark.parametrize("messages", [pytest.param(value, id=key) for key, value in BROKEN_STREAMS.items()])
async def test_a_stream_out_of_order_is_refused(directory: Path, messages: list[Any]) -> None:
    async with agent(directory, saying(*messages)) as client, client.attach("web", "") as attachment:
        for _ in messages[:-1]:
            await attachment.receive()
        with pytest.raises(UnavailableError, match="broke the protocol"):
            await attachment.receive()


async def test_a_stream_that_breaks_does_not_strand_whoever_sends(directory: Path) -> None:
    async with agent(directory, saying(accepted(0), output(5, b"x"))) as client, client.attach("web", "") as attachment:
        sending = asyncio.create_task(attachment.send_input(0, bytes(3 * MIB)))
        await attachment.receive()
        with pytest.raises(UnavailableError):
            await attachment.receive()
        with pytest.raises(UnavailableError):
            await sending


async def test_output_without_end_is_taken_only_as_fast_as_it_is_received(directory: Path) -> None:
    sent = 0

    async def flood(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        nonlocal sent
        yield accepted(0).SerializeToString()
        while True:
            yield output(sent, bytes(MIB)).SerializeToString()
            sent += MIB

    async with agent(directory, flood) as client, client.attach("web", "") as attachment:
        await attachment.receive()
        before = -1
        while before != sent:  # until it stands still
            before = sent
            await asyncio.sleep(0.2)
        assert sent < 32 * MIB


async def test_an_exit_is_not_lost_when_the_call_ends_under_what_is_being_sent(directory: Path) -> None:
    """An honest agent does this: the process ended and nobody needs the rest of its input."""
    messages = (accepted(0), *ENDS, EXITED)
    for _ in range(20):
        async with agent(directory, answering(*messages)) as client, client.attach("web", "") as attachment:
            await attachment.receive()
            with suppress(UnavailableError):
                await attachment.send_input(0, bytes(MIB))
            told = [await attachment.receive() for _ in range(4)]
            assert [answer and answer.WhichOneof("what") for answer in told] == ["output", "output", "exited", None]


@pytest.mark.parametrize(
    "event",
    [
        pb.Event(container_id="web"),
        pb.Event(container_id="x" * 65_537, oom=pb.OomKill(count=1)),
        pb.Event(exited=pb.ExitStatus(code=256)),
    ],
)
async def test_an_event_that_no_honest_agent_tells_ends_the_watching(directory: Path, event: pb.Event) -> None:
    async with agent(directory, saying(event)) as client:
        with pytest.raises(UnavailableError):
            await anext(client.events())


async def test_watching_fails_in_one_way_only(directory: Path) -> None:
    answer = failing(grpc.StatusCode.INVALID_ARGUMENT, "text", ("vmsandbox-code", "invalid-argument"))
    async with agent(directory, answer) as client:
        with pytest.raises(UnavailableError):
            await anext(client.events())


@pytest.mark.parametrize("size", [MIB, 0])
async def test_an_archive_without_end_ends_at_the_deadline(directory: Path, size: int) -> None:
    async def flood(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        while True:
            yield pb.CopyOutResponse(data=bytes(size)).SerializeToString()

    async with agent(directory, flood) as client:
        with pytest.raises(TimedOutError):
            async for _ in client.copy_out("web", "/", timeout=0.5):
                pass


# ---------------------------------------------------------------- the port


@asynccontextmanager
async def port(directory: Path, talk: Callable[..., Awaitable[None]]) -> AsyncIterator[AgentClient]:
    """A client of a guest whose end of the port is `talk`."""
    path = directory / "port"
    talks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                await talk(reader, writer)
        finally:
            writer.transport.abort()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talks.add(asyncio.create_task(serve(reader, writer)))

    server = await asyncio.start_unix_server(connected, str(path))
    try:
        async with AgentClient.connected(path, directory=directory) as client:
            yield client
    finally:
        server.close()
        for each in talks:
            each.cancel()
        await asyncio.gather(*talks, return_exceptions=True)


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    hello = await reader.readexactly(link.HELLO)
    writer.write(link.ECHO + hello[len(link.MARK) :])


async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(link.ECHO + b"0" * 1000 + bytes(range(256)) * 256)
        await writer.drain()


async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def hanging_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    return


async def ending_at_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await _echo(reader, writer)
    writer.write(link.END)
    await writer.drain()
    await reader.read()


async def nonsense_in_frames(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await _echo(reader, writer)
    while True:
        writer.write(link.head(1000) + b"z" * 1000)
        await writer.drain()


async def frames_too_large(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await _echo(reader, writer)
    writer.write(link.head(link.MAX_FRAME + 1) + b"z" * 100)
    await reader.read()


async def half_a_frame(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await _echo(reader, writer)
    writer.write(link.head(1000) + b"z")
    await reader.read()


@pytest.mark.parametrize(
    "talk", [garbage, silence, hanging_up, ending_at_once, nonsense_in_frames, frames_too_large, half_a_frame]
)
async def test_a_port_that_makes_no_sense_costs_no_more_than_the_deadline(
    directory: Path, talk: Callable[..., Awaitable[None]]
) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with port(directory, talk) as client:
        with pytest.raises(UnavailableError):
            await client.details(timeout=1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


async def test_a_question_to_a_name_server_is_no_longer_than_there_can_be(directory: Path) -> None:
    flood = answering(pb.NameQuestion(), pb.NameQuestion(message=bytes(65_536)))
    async with agent(directory, flood) as client, client.names("127.0.0.11") as names:
        questions = names.questions()
        assert not (await anext(questions)).message
        with pytest.raises(UnavailableError, match="longer than there can be"):
            await anext(questions)


def test_judging_an_answer_does_not_load_what_describes_descriptors() -> None:
    """Which takes longer than all else that a pod's first answer costs."""
    code = (
        "import sys; from vmsandbox.guest.replies import check_bounds; from vmsandbox_protocol import agent_pb2 as pb; "
        "check_bounds(pb.GuestDetails(boot_phases_us={'kernel': 1}, filesystems=['erofs'])); "
        "sys.exit('google.protobuf.descriptor_pb2' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
