"""Events for one reader: bounded, so a reader that sleeps costs old events and never memory."""

from __future__ import annotations

import asyncio
import collections
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from vmsandbox_hypervisor.api import Event

#: events a slow reader may fall behind before the oldest are dropped
BACKLOG = 256


class Subscription:
    """Events from the moment it is made, until the VM ends."""

    def __init__(self) -> None:
        self._events: collections.deque[Event] = collections.deque(maxlen=BACKLOG)
        self._more = asyncio.Event()
        self._ended = False

    def put(self, event: Event) -> None:
        self._events.append(event)
        self._more.set()

    def end(self) -> None:
        self._ended = True
        self._more.set()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        while not self._events:
            if self._ended:
                raise StopAsyncIteration
            self._more.clear()
            await self._more.wait()
        return self._events.popleft()
