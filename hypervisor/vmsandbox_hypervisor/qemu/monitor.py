"""The link to QEMU's monitor: commands, descriptors, events.  The only importer of qemu.qmp.

That import costs as much as QEMU needs for its start; machine.py therefore imports this module after QEMU was
spawned.  What QEMU answers is checked for its shape: a guest that took QEMU over must not crash its manager.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

from qemu.qmp import EventListener, ExecInterruptedError, ExecuteError, QMPClient, QMPError, Runstate

from vmsandbox_hypervisor.api import Event
from vmsandbox_hypervisor.errors import MonitorError
from vmsandbox_hypervisor.subscription import Subscription

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping
    from pathlib import Path

    from qemu.qmp.message import Message

#: seconds QEMU's main loop may take for one command
COMMAND_TIMEOUT = 30.0

# Every failure becomes an error of ours, raised once; the library would print it as well.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)


class CommandError(MonitorError):
    """QEMU refused a command; `reason` is what it said."""

    def __init__(self, command: str, reason: str) -> None:
        super().__init__(f"QEMU refused '{command}': {reason}")
        self.reason = reason


class LinkError(MonitorError):
    """The link broke or QEMU does not answer."""


class Hub(EventListener):
    """Hands every event, as it comes in, to all who want it."""

    def __init__(self) -> None:
        super().__init__()
        self._observers: list[Callable[[Event], None]] = []
        self._subscriptions: weakref.WeakSet[Subscription] = weakref.WeakSet()
        self._waiters: dict[asyncio.Future[Event], Callable[[Event], bool]] = {}
        self._failure: Exception | None = None

    async def put(self, event: Message) -> None:
        data = event.get("data")
        time = moment(event.get("timestamp"))
        self.dispatch(Event(name=str(event.get("event")), data=data if isinstance(data, dict) else {}, time=time))

    def dispatch(self, event: Event) -> None:
        for observe in self._observers:
            observe(event)
        for future, wanted in list(self._waiters.items()):
            if not future.done() and wanted(event):
                future.set_result(event)
        for subscription in self._subscriptions:
            subscription.put(event)

    def observe(self, observer: Callable[[Event], None]) -> None:
        """Call `observer` with every event before anybody else gets it."""
        self._observers.append(observer)

    def subscribe(self) -> Subscription:
        subscription = Subscription()
        if self._failure is not None:
            subscription.end()
        else:
            self._subscriptions.add(subscription)
        return subscription

    @contextmanager
    def expected(self, wanted: Callable[[Event], bool]) -> Iterator[asyncio.Future[Event]]:
        """A future for the first event that fits, made before the command that causes it is sent."""
        future: asyncio.Future[Event] = asyncio.get_running_loop().create_future()
        if self._failure is not None:
            future.set_exception(self._failure)
        self._waiters[future] = wanted
        try:
            yield future
        finally:
            del self._waiters[future]
            if future.done() and not future.cancelled():
                future.exception()
            future.cancel()

    def fail(self, error: Exception) -> None:
        """The VM is gone: end every wait."""
        self._failure = error
        for future in self._waiters:
            if not future.done():
                future.set_exception(error)
        for subscription in self._subscriptions:
            subscription.end()


class Monitor:
    """A negotiated QMP session.  Obtain one from `connected`."""

    def __init__(self, client: QMPClient, hub: Hub) -> None:
        self._client = client
        self._hub = hub
        self._lock = asyncio.Lock()
        self.observe = hub.observe
        self.subscribe = hub.subscribe
        self.expected = hub.expected
        self.fail = hub.fail

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float = COMMAND_TIMEOUT
    ) -> object:
        """Run one command; `CommandError` if QEMU refuses it, `LinkError` if there is no answer."""
        async with self._lock:
            return await self._execute(command, arguments, timeout)

    async def _execute(self, command: str, arguments: Mapping[str, object] | None, timeout: float) -> object:
        try:
            async with asyncio.timeout(timeout):
                return await self._client.execute(command, arguments)
        except ExecuteError as error:
            raise CommandError(command, str(error)) from error
        except ExecInterruptedError as error:
            raise LinkError(f"QEMU ended during '{command}'") from error
        except TimeoutError as error:
            raise LinkError(f"QEMU did not answer '{command}' within {timeout:g} s") from error
        except QMPError as error:
            raise LinkError(f"no link to QEMU for '{command}': {error}") from error

    async def getfd(self, name: str, fd: int) -> None:
        """Give QEMU a descriptor that a later command refers to by `name`."""
        async with self._lock:
            self._send(fd)
            await self._execute("getfd", {"fdname": name}, COMMAND_TIMEOUT)

    async def add_fd(self, fd: int) -> int:
        """Give QEMU a descriptor that it opens as ``/dev/fdset/N``; returns N."""
        async with self._lock:
            self._send(fd)
            answer = await self._execute("add-fd", {"opaque": "vmsandbox"}, COMMAND_TIMEOUT)
        return integer(record(answer, "add-fd"), "fdset-id")

    def _send(self, fd: int) -> None:
        try:
            self._client.send_fd_scm(fd)
        except (QMPError, OSError) as error:
            raise LinkError(f"cannot pass a descriptor to QEMU: {error}") from error

    async def closed(self) -> None:
        """Return when the link has ended and all that came before has been handled."""
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()

    async def close(self) -> None:
        try:
            await self._client.disconnect()
        except (QMPError, OSError, EOFError, ValueError, RecursionError):
            return  # it ended by itself, or over something that is no QMP: closed is what was wanted


@asynccontextmanager
async def connected(path: Path, *, timeout: float) -> AsyncIterator[Monitor]:
    """A session on the monitor socket at `path`, for the duration of the block.

    `LinkError` if there is none within `timeout`: QEMU ended, or somebody else holds the monitor.
    """
    client = QMPClient()
    hub = Hub()
    client.register_listener(hub)
    # The built-in listener would keep every event for somebody who never comes: let it want none.
    client.events.names = {""}
    monitor = Monitor(client, hub)
    try:
        async with asyncio.timeout(timeout):
            await client.connect(str(path))
    except TimeoutError as error:
        raise LinkError(f"no greeting from QEMU's monitor within {timeout:g} s") from error
    except (QMPError, OSError) as error:
        # qemu.qmp's own words name the stage only; the system's are behind them.
        raise LinkError(f"cannot connect to QEMU's monitor: {error.__cause__ or error}") from error
    try:
        yield monitor
    finally:
        await monitor.close()


def record(value: object, what: str) -> dict[str, Any]:
    """`value` as a JSON object, or a `MonitorError`."""
    if not isinstance(value, dict):
        raise MonitorError(f"QEMU answered '{what}' with something unexpected")
    return value


def records(value: object, what: str) -> list[dict[str, Any]]:
    """`value` as a list of JSON objects, or a `MonitorError`."""
    if not isinstance(value, list):
        raise MonitorError(f"QEMU answered '{what}' with something unexpected")
    return [record(item, what) for item in value]


def moment(stamp: object) -> float:
    """What a time stamp of QEMU's says, in seconds; 0 if it says nothing."""
    try:
        return float(stamp["seconds"] + stamp["microseconds"] / 1e6)  # type: ignore[index]
    except (TypeError, KeyError, ArithmeticError):
        return 0.0


def integer(value: Mapping[str, object], key: str) -> int:
    number = value.get(key)
    if not isinstance(number, int):
        raise MonitorError(f"QEMU's answer has no number '{key}'")
    return number
