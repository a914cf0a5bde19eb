"""Pods whose machine is found to be lost by whoever wants to end them."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vmsandbox.errors import SandboxError, UnavailableError
from vmsandbox.supervisor import podding


class Service:
    """One that has taken a pod over, or tries to."""

    def __init__(self, *, lost: bool) -> None:
        self.spec = SimpleNamespace(implicit=False, name="shop", id="aa")
        self.containers: dict[str, Any] = {}
        self.reason: SandboxError | None = None
        self.removing = False
        self.wanted: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self.wanted.set_result(self.spec)
        self.is_lost = lost

    async def running_sandbox(self) -> object:
        error = UnavailableError("cannot adopt the virtual machine: Connection refused")
        if self.is_lost:
            self.reason = error
        raise error


async def test_a_pod_whose_machine_is_lost_is_removed() -> None:
    service = Service(lost=True)
    assert await podding.remove(cast("Any", service), {"force": True}) == {}
    assert service.removing


async def test_a_pod_whose_machine_is_lost_is_stopped() -> None:
    assert await podding.stop(cast("Any", Service(lost=True)), {}) == {}


@pytest.mark.parametrize("verb", [podding.stop, podding.remove])
async def test_a_machine_that_may_still_be_there_is_not_given_up(verb: Any) -> None:
    with pytest.raises(UnavailableError):
        await verb(cast("Any", Service(lost=False)), {"force": True})
