"""What a guest asks of a name server that only the host reaches: questions come, answers go, over one call."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from vmsandbox.guest.replies import broken, check_bounds, protocol, translating

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from vmsandbox.guest import transport
    from vmsandbox_protocol import agent_pb2 as pb

#: bytes of a message, as DNS has it
LARGEST = 65535


class Names:
    """The guest listens at a loopback address for the block."""

    def __init__(self, relay: transport.Relay, method: Any, address: str) -> None:
        self._relay = relay
        self._method = method
        self._address = address
        self._call: Any = None
        self._writing = asyncio.Lock()

    async def __aenter__(self) -> Names:
        await self._relay.ready()
        with translating():
            self._call = self._method(wait_for_ready=True)
        try:
            await self._send(protocol().NameAnswer(listen=self._address))
        except BaseException:
            self._call.cancel()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._call.cancel()

    async def questions(self) -> AsyncIterator[pb.NameQuestion]:
        """What is asked; the first one is empty, and says that the guest listens."""
        with translating():
            async for question in self._call:
                check_bounds(question)
                if len(question.message) > LARGEST:
                    raise broken("a question to a name server is longer than there can be")
                yield question

    async def answer(self, number: int, message: bytes) -> None:
        """Answer the question with this number."""
        await self._send(protocol().NameAnswer(number=number, message=message))

    async def _send(self, answer: pb.NameAnswer) -> None:
        async with self._writing:
            with translating():
                await self._call.write(answer)
