"""Containers that an earlier supervisor left are given up, kept or taken over, as they are found."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from vmsandbox import documents
from vmsandbox.errors import UnavailableError
from vmsandbox.paths import SandboxPaths
from vmsandbox.supervisor import bringup, main
from vmsandbox.supervisor.service import Service

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import pytest

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


async def test_what_is_made_anew_waits_until_what_an_earlier_machine_left_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with service_with(Container("stopped", disks=False)) as service:
        seen = []

        async def swept(*_: object) -> None:
            seen.append(service.tidy.is_set())
            raise UnavailableError("it cannot be removed")

        monkeypatch.setattr(bringup, "swept", swept)
        around = SimpleNamespace(paths=SandboxPaths(tmp_path))
        documents.write(around.paths.document_file, {"id": ID, "status": "stopped"})
        monkeypatch.setattr(service, "restore", lambda _spec: service.containers.clear())
        revived = main.Start(known=True, revive=True)
        await main._hold_pod(cast("Any", around), service, cast("Any", None), start=revived)
        # Whoever waits goes on, and hears of the error.
        assert (seen, service.tidy.is_set(), str(service.reason)) == ([False], True, "it cannot be removed")


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
