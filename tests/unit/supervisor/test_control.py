"""Requests that reach a supervisor just when it ends."""

from __future__ import annotations

import asyncio
import socket
import tempfile
from typing import TYPE_CHECKING, Any, cast

from vmsandbox import wire
from vmsandbox.supervisor.control import Control

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

DELETE = {"verb": "delete", "container": "aa", "force": True}


class Service:
    """One that says what it was asked for, and may be ended while it does it."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()

    async def dispatch(self, request: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(request["verb"])
        self.begun.set()
        await self.go_on.wait()
        return {}

    def ending(self) -> bool:
        return True

    def implicit(self) -> bool:
        return True


async def received(service: Service, during: Callable[[Control], Awaitable[None]]) -> bytes:
    """What a client gets for one request until the supervisor's process has ended."""
    with tempfile.TemporaryDirectory(prefix="vs-") as directory, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{directory}/s")
        listener.listen()
        listener.setblocking(False)
        async with asyncio.TaskGroup() as tasks:
            control = Control(cast("Any", service), tasks)
            server = await control.listen(listener)
            reader, writer = await asyncio.open_unix_connection(f"{directory}/s")
            writer.write(wire.encode_message(DELETE))
            await writer.drain()
            await during(control)
            await control.idle()
            control.released.set()
        server.close()
        for kept in control._until_exit:
            kept.close()
        found = await reader.read()
        writer.close()
        return found


async def test_a_request_is_answered_before_everything_is_released() -> None:
    service = Service()

    async def during(_control: Control) -> None:
        service.go_on.set()

    assert await received(service, during) == wire.encode_message({})


async def test_a_request_that_comes_after_everything_is_released_is_neither_done_nor_answered() -> None:
    service = Service()

    async def during(control: Control) -> None:
        control.released.set()
        service.go_on.set()

    assert await received(service, during) == b""
    assert service.asked == []


async def test_a_request_that_is_overtaken_by_the_end_is_not_answered_as_done() -> None:
    service = Service()

    async def during(control: Control) -> None:
        await service.begun.wait()
        control.released.set()
        service.go_on.set()

    assert await received(service, during) == b""
