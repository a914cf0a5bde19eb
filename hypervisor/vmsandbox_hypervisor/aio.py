"""Cleanup that cancellation cannot skip, tasks that end with their block, and waiting for a descriptor.

The only module that catches `asyncio.CancelledError`.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Coroutine


async def finish(cleanup: Coroutine[Any, Any, object], *, seconds: float = 10.0) -> None:
    """Run `cleanup` to its end although the caller may be cancelled, even repeatedly, meanwhile.

    A cancellation that arrived is raised afterwards.  After `seconds` the cleanup itself is cancelled and
    `TimeoutError` is raised.
    """
    loop = asyncio.get_running_loop()
    task = loop.create_task(cleanup, name="finish")
    end = loop.time() + seconds
    cancelled: asyncio.CancelledError | None = None
    overdue = False
    while not task.done():
        try:
            await asyncio.wait({task}, timeout=None if overdue else max(0.0, end - loop.time()))
        except asyncio.CancelledError as error:
            cancelled = error
            continue
        if not task.done() and not overdue:
            overdue = True
            task.cancel()
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # retrieved: the cancellation is what the caller has to see
        raise cancelled
    if overdue and task.cancelled():
        raise TimeoutError(f"cleanup took longer than {seconds} s")
    task.result()


async def readable(source: int | socket.socket) -> None:
    """Wait until a descriptor polls readable."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(source, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(source)


@asynccontextmanager
async def background(work: Coroutine[Any, Any, None], name: str) -> AsyncIterator[asyncio.Task[None]]:
    """Run `work` beside the block, and end it with the block.  `work` must not raise."""
    task = asyncio.get_running_loop().create_task(work, name=name)
    try:
        yield task
    finally:
        task.cancel()
        await finish(_ended(task))


async def _ended(task: asyncio.Task[None]) -> None:
    await asyncio.wait({task})
