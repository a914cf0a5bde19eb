"""Exits and OOM kills, told to everybody who watches."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vmsandbox_agent.process import Ending

#: events a watcher may be behind before it is told to come again
_BEHIND = 4096


class Exited(NamedTuple):
    """A process of a container has ended."""

    container_id: str
    exec_id: str
    ending: Ending


class OomKilled(NamedTuple):
    """The kernel killed something in a container for want of memory."""

    container_id: str
    kills: int


Event = Exited | OomKilled


class Events:
    """Fans events out to watchers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watchers: set[Watcher] = set()

    def publish(self, event: Event) -> None:
        with self._lock:
            for watcher in self._watchers:
                watcher.offer(event)

    def watch(self, before: Callable[[], list[Event]]) -> Watcher:
        """Begin to watch; `before` answers what has happened already and is told first.

        An event of the very moment may be told twice.
        """
        watcher = Watcher(self)
        with self._lock:
            self._watchers.add(watcher)
        watcher.first = before()
        return watcher

    def forget(self, watcher: Watcher) -> None:
        with self._lock:
            self._watchers.discard(watcher)


class Watcher:
    """One who watches; iterate over it, and `close` it from any thread."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._queue: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._left_behind = False
        self.first: list[Event] = []

    def offer(self, event: Event) -> None:
        """Tell of an event; who is too far behind is told of no more."""
        if self._left_behind:
            return
        self._left_behind = self._queue.qsize() >= _BEHIND
        self._queue.put(None if self._left_behind else event)

    def close(self) -> None:
        self._queue.put(None)

    def __iter__(self) -> Iterator[Event]:
        try:
            yield from self.first
            while (event := self._queue.get()) is not None:
                yield event
        finally:
            self._events.forget(self)
