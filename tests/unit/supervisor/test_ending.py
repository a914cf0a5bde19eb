"""Containers that are ended while their machine goes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import pytest

from vmsandbox.errors import NotFoundError, TimedOutError, UnavailableError
from vmsandbox.supervisor import ending

if TYPE_CHECKING:
    from collections.abc import Callable

CLOSED = UnavailableError("the connection to the agent was closed")


class Init:
    def __init__(self) -> None:
        self.failed = False
        self.exited = asyncio.Event()
        self.delivered = asyncio.Event()


class Container:
    """One that runs, and ends in the middle of whatever is asked of the agent."""

    def __init__(self) -> None:
        self.id = "aa"
        self.status = "running"
        self.starting = False
        self.init = Init()
        self.lock = asyncio.Lock()
        self.document: dict[str, Any] = {}
        self.released = asyncio.Event()

    def end(self) -> None:
        self.status = "stopped"
        self.init.exited.set()

    async def release(self) -> None:
        pass

    def forget(self) -> None:
        pass


class Agent:
    """Its connection is closed under every call; `when` is what else happens then."""

    def __init__(self, when: Callable[[], object]) -> None:
        self.when = when

    async def signal(self, *_: object, **__: object) -> None:
        self.when()
        raise CLOSED


class Service:
    def __init__(self, container: Container, when: Callable[[], object]) -> None:
        self._container = container
        self.agent = Agent(when)
        self.vm = self
        self.pid = 1
        self.reason = None
        self.containers = {container.id: container}
        self.wanted: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self.wanted.set_result(self)
        self.sandbox: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self.sandbox.set_result(self)

    def container(self, _request: object) -> Container:
        return self._container

    async def running_sandbox(self) -> object:
        return self

    def implicit(self) -> bool:
        return True

    def end_if_idle(self) -> None:
        pass

    def ending(self) -> bool:
        return False


async def delete(service: Service) -> None:
    await ending.delete(cast("Any", service), {"container": "aa", "force": True})


async def test_what_ended_by_itself_with_its_machine_is_removed_without_an_error() -> None:
    container = Container()
    service = Service(container, container.end)
    await delete(service)
    assert container.released.is_set()
    assert service.containers == {}


async def test_what_is_told_to_have_ended_only_after_its_machine_s_end_is_waited_for() -> None:
    container = Container()
    service = Service(container, lambda: asyncio.get_running_loop().call_soon(container.end))
    await delete(service)
    assert service.containers == {}


async def test_an_agent_that_is_gone_while_the_container_runs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "KILL_TIMEOUT", 0.01)
    with pytest.raises(TimedOutError, match="ends its virtual machine"):
        await delete(Service(Container(), lambda: None))


class TakingOver(Service):
    """The machine of a container that has stopped is being taken over."""

    def __init__(self) -> None:
        container = Container()
        container.end()
        super().__init__(container, lambda: None)
        self.sandbox = asyncio.get_running_loop().create_future()

    async def running_sandbox(self) -> object:
        return await asyncio.shield(self.sandbox)


async def test_what_has_stopped_is_removed_once_its_machine_is_taken_over() -> None:
    service = TakingOver()
    removing = asyncio.create_task(delete(service))
    await asyncio.sleep(0)
    assert not removing.done()
    service.sandbox.set_result(service)
    await removing
    assert service.containers == {}


async def test_what_has_stopped_goes_with_its_machine_where_that_is_lost() -> None:
    service = TakingOver()
    removing = asyncio.create_task(delete(service))
    await asyncio.sleep(0)
    service.sandbox.set_exception(UnavailableError("the machine is gone"))
    service.ending = lambda: True  # type: ignore[method-assign]
    await removing
    container = service.container({})
    assert container.document["autoremove"]
    assert container.init.delivered.is_set()


async def test_what_has_stopped_is_no_reason_to_bring_a_machine_up() -> None:
    service = TakingOver()
    service.wanted = asyncio.get_running_loop().create_future()
    await delete(service)
    assert service.container({}).document["autoremove"]


class Unfinished(Service):
    """An earlier supervisor died while it made the container; it is not known yet what became of the machine."""

    def __init__(self) -> None:
        container = Container()
        container.status = "creating"
        container.init.failed = True
        super().__init__(container, lambda: None)
        self.sandbox = asyncio.get_running_loop().create_future()

    async def running_sandbox(self) -> object:
        return await asyncio.shield(self.sandbox)


@pytest.mark.parametrize("lost", [False, True])
async def test_what_an_earlier_supervisor_did_not_finish_goes_when_its_machine_is_taken_over_or_lost(
    lost: bool,
) -> None:
    service = Unfinished()
    removing = asyncio.create_task(delete(service))
    stopping = asyncio.create_task(ending.stop(cast("Any", service), {"container": "aa"}))
    await asyncio.sleep(0)
    assert not removing.done()
    assert not stopping.done()
    if lost:
        service.sandbox.set_exception(UnavailableError("the machine is gone"))
    else:
        service.sandbox.set_result(service)
    await removing
    with pytest.raises(NotFoundError, match="never made"):
        await stopping
