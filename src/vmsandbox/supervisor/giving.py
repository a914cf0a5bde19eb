"""What was acquired and how it is given back: in reverse order, every step attempted, whatever fails."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from vmsandbox.errors import SandboxError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class Given(AsyncExitStack):
    """An exit stack of which no step keeps the next from being attempted, and no failure hides another."""

    def __init__(self) -> None:
        super().__init__()
        self._failed: list[Exception] = []

    def push_async_callback(  # type: ignore[override]
        self, step: Callable[..., Awaitable[object]], /, *args: object, **kwargs: object
    ) -> None:
        super().push_async_callback(self._attempt, step, *args, **kwargs)

    async def _attempt(self, step: Callable[..., Awaitable[object]], /, *args: object, **kwargs: object) -> None:
        try:
            await step(*args, **kwargs)
        except (SandboxError, OSError) as error:
            self._failed.append(error)

    async def give_back(self) -> list[Exception]:
        """Give everything back, once; answers what failed, the first of it first."""
        await self.aclose()
        failed, self._failed = self._failed, []
        return failed
