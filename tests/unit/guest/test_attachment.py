"""Attachments whose connection is taken away: told from the cancellation of the task that uses them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

import pytest

from vmsandbox.errors import UnavailableError
from vmsandbox.guest.attachment import Attachment

if TYPE_CHECKING:
    from vmsandbox.guest import transport


class Relay:
    async def ready(self) -> None:
        pass


class Call:
    """As grpc's: closing the channel cancels what the reader waits for."""

    def __init__(self) -> None:
        self._answer: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self.reading = asyncio.Event()

    async def write(self, request: object) -> None:
        if self._answer.cancelled():
            raise asyncio.CancelledError

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> object:
        self.reading.set()
        return await self._answer

    def cancel(self) -> None:
        self._answer.cancel()


def attachment(call: Call) -> Attachment:
    relay = cast("transport.Relay", Relay())
    return Attachment(relay, lambda **_: call, "container", "", stdout_offset=0, stderr_offset=0)


async def test_a_channel_closed_while_receiving_is_an_unavailable_agent() -> None:
    call = Call()
    async with attachment(call) as attached:
        receiving = asyncio.create_task(attached.receive())
        await call.reading.wait()
        call.cancel()
        with pytest.raises(UnavailableError):
            await receiving


async def test_a_channel_closed_before_sending_is_an_unavailable_agent() -> None:
    call = Call()
    async with attachment(call) as attached:
        call.cancel()
        with pytest.raises(UnavailableError):
            await attached.resize(80, 25)


async def test_a_cancelled_receiver_is_cancelled() -> None:
    call = Call()
    async with attachment(call) as attached:
        receiving = asyncio.create_task(attached.receive())
        await call.reading.wait()
        receiving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await receiving
