"""Archives between a client on the control socket and the agent, as fast as the slower side takes them.

Nothing is unpacked or kept here.  A client that goes away ends the agent's call, and an archive that was not ended
by its sender counts as broken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmsandbox import wire
from vmsandbox.errors import InvalidArgumentError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator

    from vmsandbox.supervisor.container import Container
    from vmsandbox.supervisor.sandbox import Sandbox

VERBS = frozenset({"copy-in", "copy-out"})
#: seconds the largest copy may take
TIMEOUT = 24 * 3600.0
#: unsent bytes towards a client before no more is taken from the agent
HIGH_WATER = 1 << 20


async def serve(
    container: Container,
    sandbox: Sandbox,
    request: dict[str, Any],
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> dict[str, Any]:
    """Relay one archive; returns the last message for the client."""
    path = request.get("path")
    if not isinstance(path, str) or not path.startswith("/") or "\0" in path:
        raise InvalidArgumentError(f"'{path}' is not an absolute path in the container")
    container.require("copy")
    if request["verb"] == "copy-in":
        return {"bytes": await sandbox.agent.copy_in(container.id, path, incoming(reader), timeout=TIMEOUT)}
    writer.transport.set_write_buffer_limits(high=HIGH_WATER)
    offset = 0
    follow = bool(request.get("follow"))
    async for data in sandbox.agent.copy_out(container.id, path, follow_link=follow, timeout=TIMEOUT):
        for at in range(0, len(data), wire.CHUNK):
            piece = data[at : at + wire.CHUNK]
            writer.write(wire.encode_data(wire.STDOUT, offset, piece))
            offset += len(piece)
            await writer.drain()
    return {"bytes": offset}


async def incoming(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The client's archive up to the message that ends it."""
    while (frame := await wire.read(reader)) is not None:
        if frame.kind == wire.MESSAGE:
            return
        yield frame.payload
    raise wire.WireError("the client went away in the middle of an archive")
