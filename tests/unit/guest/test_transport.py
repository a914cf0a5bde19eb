"""The relay between gRPC's socket and the agent, against a port that keeps stale bytes and loses others."""

from __future__ import annotations

import asyncio
import errno
import random
import socket
import threading
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.agent.fake_port import FakePort
from vmsandbox.errors import InvalidArgumentError
from vmsandbox.guest import transport
from vmsandbox_agent.link import ServedPort
from vmsandbox_agent.server import ServedSocket
from vmsandbox_protocol import link

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("t")


class Echo:
    """Stands for what answers in the guest: every session gets its own bytes back."""

    def __init__(self) -> None:
        self._said = bytearray()
        self._over = False
        self._changed = threading.Condition()

    def receive(self, data: bytes) -> bool:
        with self._changed:
            self._said += data
            self._changed.notify_all()
            return not self._over

    def take(self, most: int) -> bytes:
        with self._changed:
            self._changed.wait_for(lambda: self._said or self._over)
            data = bytes(self._said[:most])
            del self._said[:most]
            return data

    def end(self) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def drain(self, timeout: float) -> None:
        """Nothing is asked here that would be worth waiting for."""


@asynccontextmanager
async def serving(port: FakePort, connect: Callable[[], Echo] = Echo) -> AsyncIterator[None]:
    """The agent's end of a port."""
    served = ServedPort(port.guest_fd, connect)
    served.start()
    try:
        yield
    finally:
        await asyncio.to_thread(served.stop)


@asynccontextmanager
async def guest(directory: Path, seed: int | None = None) -> AsyncIterator[FakePort]:
    """A port with the agent's end of it."""
    async with FakePort.opened(directory / "port", seed=seed) as port, serving(port):
        yield port


async def converse(path: Path, data: bytes, cut_after: int | None = None) -> bytes:
    """Send `data` and answer what comes back, leaving early after `cut_after` bytes of it."""
    reader, writer = await asyncio.open_unix_connection(str(path))
    received = bytearray()

    async def send() -> None:
        with suppress(ConnectionError):
            writer.write(data)
            await writer.drain()

    sending = asyncio.create_task(send())
    try:
        while len(received) < len(data) and (cut_after is None or len(received) < cut_after):
            more = await reader.read(65536)
            if not more:
                break
            received += more
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        writer.transport.abort()
    return bytes(received)


async def test_bytes_go_to_the_guest_and_back(directory: Path) -> None:
    data = random.Random(1).randbytes(3_000_000)
    async with guest(directory) as port, transport.relayed(transport.through_port(port.path), directory=directory) as r:
        await r.ready()
        assert await converse(r.path, data) == data


async def test_the_mark_itself_may_be_in_the_bytes(directory: Path) -> None:
    hello = link.MARK + b"0" * link.NONCE_DIGITS
    data = b"x".join([hello, link.MARK, link.ECHO + b"1" * 32, hello * 3, link.MARK[:7]]) * 50
    async with (
        guest(directory, seed=3) as port,
        transport.relayed(transport.through_port(port.path), directory=directory) as relay,
    ):
        assert await converse(relay.path, data) == data
        assert port.connections == 1


async def test_stale_bytes_of_any_kind_are_dropped(directory: Path) -> None:
    stale = [
        link.MARK,
        link.MARK + b"abc",
        link.MARK + b"0" * 32 + link.head(100) + b"half a frame",
        link.head(5000),
        bytes(range(256)) * 40,
        link.MARK[:9],
    ]
    async with guest(directory) as port:
        for each in stale:
            port.write_stale(each)
            async with transport.relayed(transport.through_port(port.path), directory=directory) as relay:
                assert await converse(relay.path, b"fresh bytes") == b"fresh bytes"


@pytest.mark.deadline(100)
@pytest.mark.parametrize("seed", [11, 12, 13])
async def test_no_byte_of_one_session_is_seen_by_another(directory: Path, seed: int) -> None:
    """Hundreds of sessions, most of which break with bytes under way in both directions."""
    chance = random.Random(seed)
    whole = 0
    async with (
        guest(directory, seed=seed) as port,
        transport.relayed(transport.through_port(port.path), directory=directory) as relay,
    ):
        for session in range(150):
            # Every session has bytes of its own, so that a foreign one is recognised.
            data = b"".join(b"%05d:%07d;" % (session, n) for n in range(chance.choice((1, 50, 5000))))
            how = chance.choice(("whole", "client leaves", "port breaks"))
            breaking = asyncio.get_running_loop().call_later(chance.random() * 0.02, port.break_connection)
            if how != "port breaks":
                breaking.cancel()
            cut = chance.randrange(len(data)) if how == "client leaves" else None
            received = await converse(relay.path, data, cut)
            breaking.cancel()
            assert data.startswith(received)
            if how == "whole":
                assert received == data
                whole += 1
    assert whole > 25


async def test_a_new_supervisor_takes_over_while_the_old_ones_bytes_are_under_way(directory: Path) -> None:
    async with guest(directory, seed=5) as port:
        for number in range(30):
            async with transport.relayed(transport.through_port(port.path), directory=directory) as relay:
                abandoned = asyncio.create_task(converse(relay.path, b"old" * 100_000))
                await asyncio.sleep(0.001 * (number % 5))
            abandoned.cancel()
            await asyncio.gather(abandoned, return_exceptions=True)
            async with transport.relayed(transport.through_port(port.path), directory=directory) as relay:
                assert await converse(relay.path, b"new%d" % number) == b"new%d" % number


async def test_the_relay_waits_for_a_vmm_and_a_guest_that_are_not_there_yet(directory: Path) -> None:
    async with transport.relayed(transport.through_port(directory / "port"), directory=directory) as relay:
        early = asyncio.create_task(converse(relay.path, b"early"))
        async with guest(directory):
            assert await early == b"early"
            await relay.ready()


async def test_a_guest_that_cannot_serve_is_silent_and_answers_the_next_host(directory: Path) -> None:
    able = False

    def connect() -> Echo:
        if not able:
            raise OSError(errno.EMFILE, "too many")
        return Echo()

    async with FakePort.opened(directory / "port") as port, serving(port, connect):
        async with transport.relayed(transport.through_port(port.path), directory=directory) as relay:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(relay.ready(), 0.3)
        able = True
        async with transport.relayed(transport.through_port(port.path), directory=directory) as relay:
            assert await converse(relay.path, b"hello") == b"hello"


async def test_a_socket_is_removed_and_a_long_directory_refused(directory: Path) -> None:
    async with transport.relayed(transport.through_port(directory / "port"), directory=directory) as relay:
        assert relay.path.is_socket()
    assert not relay.path.exists()
    long = directory / ("x" * 120)
    with pytest.raises(InvalidArgumentError, match="too long"):
        async with transport.relayed(transport.through_port(directory / "port"), directory=long):
            pytest.fail("listened at a path that is too long")


CID_LOCAL = 1
VSOCK_PORT = 5005


class StandIn(socket.socket):
    """vsock over a unix socket: not every kernel can loop it back."""

    place: Path

    def __init__(self, family: int, kind: int) -> None:
        assert family == socket.AF_VSOCK
        super().__init__(socket.AF_UNIX, kind)

    def bind(self, address: Any) -> None:
        assert address == (socket.VMADDR_CID_ANY, VSOCK_PORT)
        super().bind(str(self.place))

    def connect(self, address: Any) -> None:
        assert address == (CID_LOCAL, VSOCK_PORT)
        super().connect(str(self.place))


@pytest.fixture(params=["stand-in", *(["vsock"] if Path("/sys/module/vsock_loopback").exists() else [])])
def make(request: pytest.FixtureRequest, directory: Path) -> Callable[[int, int], socket.socket]:
    return type("", (StandIn,), {"place": directory / "vsock"}) if request.param == "stand-in" else socket.socket


async def test_a_connection_that_the_kernel_keeps_needs_no_hello(
    directory: Path, make: Callable[[int, int], socket.socket]
) -> None:
    data = random.Random(2).randbytes(1_000_000)
    dial = transport.through_vsock(CID_LOCAL, VSOCK_PORT, make=make)
    async with transport.relayed(dial, directory=directory) as relay:
        early = asyncio.create_task(converse(relay.path, data))  # before the guest serves
        ServedSocket.at_vsock(VSOCK_PORT, Echo, make=make).start()
        assert await early == data
        await relay.ready()
        for _ in range(3):
            assert await converse(relay.path, data) == data


async def test_an_agent_that_sends_nonsense_ends_the_session(directory: Path) -> None:
    """A frame that is too long breaks the session, and the next one works."""
    async with FakePort.opened(directory / "port") as port:
        loop = asyncio.get_running_loop()
        raw = socket.socket(fileno=port.guest_fd)

        async def hello() -> bytes:
            received = b""
            while len(received) < link.HELLO:
                received += await loop.sock_recv(raw, link.HELLO - len(received))
            return received[len(link.MARK) :]

        async with transport.relayed(transport.through_port(port.path), directory=directory) as relay:
            await loop.sock_sendall(raw, link.ECHO + await hello() + link.head(link.MAX_FRAME + 1) + b"zz")
            reader, writer = await asyncio.open_unix_connection(str(relay.path))
            assert await reader.read() == b""
            writer.close()
            await loop.sock_sendall(raw, link.ECHO + await hello() + link.head(2) + b"ok")
            reader, writer = await asyncio.open_unix_connection(str(relay.path))
            assert await reader.readexactly(2) == b"ok"
            writer.close()
        raw.close()
