"""Containers that an earlier supervisor left are given up, kept or taken over, as they are found."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

from vmsandbox.supervisor.service import Service

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ID = "ab" * 32


class Container:
    def __init__(self, status: str, *, disks: bool) -> None:
        self.id = ID
        self.status = status
        self.disks = disks
        self.adopted = self.given_back = False

    def has_devices(self, _sandbox: object) -> bool:
        return self.disks

    def adopt(self, _sandbox: object) -> None:
        self.adopted = True

    async def release(self) -> None:
        assert self.adopted
        self.given_back = True


class Agent:
    async def containers(self) -> list[Any]:
        return []


class Sandbox:
    agent = Agent()


@asynccontextmanager
async def service_with(container: Container) -> AsyncIterator[Service]:
    async with asyncio.TaskGroup() as tasks:
        service = Service(cast("Any", None), tasks)
        service.containers[ID] = cast("Any", container)
        service._inherited.append(cast("Any", container))
        yield service


async def test_the_last_life_of_a_container_that_is_started_again_meanwhile_gives_back_its_disks() -> None:
    old, fresh = Container("stopped", disks=True), Container("creating", disks=False)
    async with service_with(old) as service:
        service.containers[ID] = cast("Any", fresh)
        await service.take_over(cast("Any", Sandbox()))
    assert old.given_back
    assert not fresh.adopted
    assert service.containers == {ID: fresh}


async def test_a_container_that_has_stopped_and_has_nothing_in_the_machine_is_left_alone() -> None:
    old = Container("stopped", disks=False)
    async with service_with(old) as service:
        await service.take_over(cast("Any", Sandbox()))
    assert not old.adopted
    assert service.containers == {ID: old}
