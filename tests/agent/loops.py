"""An event loop for what outlives a test."""

from __future__ import annotations

import asyncio
import threading
import traceback
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator
    from contextlib import AbstractAsyncContextManager

T = TypeVar("T")


class Loop:
    """A loop in a thread, as a context manager."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="shared-loop")

    def __enter__(self) -> Loop:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float = 120) -> T:
        """Run something in the loop and wait for it; it is cancelled after `timeout` seconds."""

        async def bounded() -> T:
            try:
                async with asyncio.timeout(timeout):
                    return await coroutine
            except TimeoutError:
                traceback.print_exc()  # where it waited is not told to the other thread
                raise

        return asyncio.run_coroutine_threadsafe(bounded(), self._loop).result()

    @contextmanager
    def entered(self, manager: AbstractAsyncContextManager[T]) -> Iterator[T]:
        """Be inside of a context manager that lives in the loop; one task enters and leaves it."""
        leave = asyncio.Event()
        entered: asyncio.Future[T] = self.run(_future())

        async def stay() -> None:
            try:
                async with manager as value:
                    entered.set_result(value)
                    await leave.wait()
            except BaseException as error:
                if entered.done():
                    raise
                entered.set_exception(error)

        staying = asyncio.run_coroutine_threadsafe(stay(), self._loop)

        async def value() -> T:
            return await entered

        try:
            yield self.run(value())
        finally:
            self._loop.call_soon_threadsafe(leave.set)
            staying.result(120)


async def _future() -> asyncio.Future[Any]:
    return asyncio.get_running_loop().create_future()
