"""Tasks that belong together."""

from __future__ import annotations

import asyncio
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

T = TypeVar("T")


async def together(*work: Coroutine[Any, Any, object]) -> None:
    """Do things at the same time; the first error ends the others."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def unless(ending: Coroutine[Any, Any, object], work: Coroutine[Any, Any, T]) -> T:
    """Do `work`, which is given up with its error when `ending` comes first."""
    working, other = asyncio.create_task(work), asyncio.create_task(ending)
    try:
        await asyncio.wait({working, other}, return_when=asyncio.FIRST_COMPLETED)
        if other.done():
            other.result()
        return await working
    finally:
        for task in (working, other):
            task.cancel()
        await asyncio.gather(working, other, return_exceptions=True)


@contextmanager
def told_to_end() -> Iterator[asyncio.Future[None]]:
    """What is done when this process is told to end, for the block."""
    loop = asyncio.get_running_loop()
    told: asyncio.Future[None] = loop.create_future()
    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, _tell, told)
    try:
        yield told
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
        told.cancel()


def _tell(told: asyncio.Future[None]) -> None:
    if not told.done():
        told.set_result(None)
