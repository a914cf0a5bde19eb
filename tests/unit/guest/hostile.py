"""An agent that answers whatever a test wants: real gRPC, raw bytes, on a unix socket."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc

from vmsandbox.guest.client import AgentClient
from vmsandbox.guest.transport import StreamLink

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from vmsandbox.guest.transport import Link


class _Everything(grpc.GenericRpcHandler):
    """Every method of every service is the same one."""

    def __init__(self, answering: Callable[..., AsyncIterator[bytes]]) -> None:
        self._handler = grpc.stream_stream_rpc_method_handler(answering)

    def service(self, handler_call_details: Any) -> Any:
        return self._handler


def saying(*messages: Any) -> Callable[..., AsyncIterator[bytes]]:
    """Answer with these messages, protobuf or bytes, then stay silent until the call is cancelled."""

    async def answer(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        for message in messages:
            yield message if isinstance(message, bytes) else message.SerializeToString()
        await asyncio.Event().wait()

    return answer


def answering(*messages: Any) -> Callable[..., AsyncIterator[bytes]]:
    """Answer with these messages and end the call."""

    async def answer(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        for message in messages:
            yield message if isinstance(message, bytes) else message.SerializeToString()

    return answer


@asynccontextmanager
async def agent(
    directory: Path,
    answer: Callable[..., AsyncIterator[bytes]],
    *,
    compression: grpc.Compression | None = None,
    bulk_path: Path | None = None,
) -> AsyncIterator[AgentClient]:
    """A client of such an agent."""
    path = directory / "hostile.sock"
    server = grpc.aio.server(
        handlers=[_Everything(answer)],
        compression=compression,
        options=[("grpc.max_send_message_length", -1), ("grpc.max_metadata_size", 1 << 20)],
    )
    server.add_insecure_port(f"unix:{path}")
    await server.start()

    @asynccontextmanager
    async def dial() -> AsyncIterator[Link]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, str(path))
            yield StreamLink(sock)

    try:
        async with AgentClient.dialled(dial, directory=directory, bulk_path=bulk_path) as client:
            yield client
    finally:
        await server.stop(0)
