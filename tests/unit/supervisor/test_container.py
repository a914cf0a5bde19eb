"""What a container was given is given back in reverse order, whatever fails."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

from vmsandbox.errors import UnavailableError
from vmsandbox.supervisor.container import Container

if TYPE_CHECKING:
    import pytest


async def test_a11_every_step_is_attempted_in_reverse_order_and_the_first_error_is_told_with_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    container = Container(cast("Any", None), {"id": "ab" * 32, "name": "web", "status": "stopped"})
    done = []

    async def step(name: str, error: Exception | None = None) -> None:
        done.append(name)
        if error is not None:
            raise error

    container.stack.push_async_callback(step, "share", OSError(16, "the share is busy"))
    container.stack.push_async_callback(step, "memory")
    container.stack.push_async_callback(step, "disk", UnavailableError("the disk stays"))
    container.stack.push_async_callback(step, "guest", UnavailableError("the guest does not answer"))
    with caplog.at_level(logging.WARNING):
        await container.release()
    assert done == ["guest", "disk", "memory", "share"]
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith("container 'web' was not released cleanly: the guest does not answer")
    assert "the disk stays" in said
    assert "the share is busy" in said
    await container.release()
    assert len(done) == 4
