"""Descriptors that are kept back, so that whoever asks is answered when there are no others.

A process that cannot take a connection in leaves its client waiting, for as long as something else holds what it
would need.  With these it takes the client in; what the request itself then cannot have is an error that says so.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from vmsandbox.errors import is_shortage

if TYPE_CHECKING:
    import asyncio

#: clients at once that are answered when there are no more descriptors
KEPT = 8


class Reserve:
    """Some descriptors of nothing."""

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._held: list[int] = []
        self.refill()

    def refill(self) -> None:
        """Keep back what there is, up to as many as there were."""
        try:
            while len(self._held) < self._kept:
                self._held.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            return  # the next one that goes is tried for again

    def yield_one(self) -> None:
        """Let whoever comes next have one."""
        if self._held:
            os.close(self._held.pop())

    def close(self) -> None:
        while self._held:
            os.close(self._held.pop())

    def handle(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """What a loop does about trouble nobody awaits: a connection that could not be taken in is, a moment later."""
        error = context.get("exception")
        if "socket" in context and isinstance(error, OSError) and is_shortage(error):
            self.yield_one()
        loop.default_exception_handler(context)
