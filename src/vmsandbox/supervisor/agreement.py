"""A container's state as the guest has it, where it is not known what became of a request.

Between the agent's doing and its answer a connection may break, and a supervisor may die before it has written
down what it was answered.  Then the guest alone knows, and is asked.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Literal, cast

from vmsandbox.errors import SandboxError, TimedOutError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from vmsandbox.guest.client import AgentClient
    from vmsandbox.supervisor.container import Container
    from vmsandbox.supervisor.lifecycle import Status
    from vmsandbox_protocol import agent_pb2 as pb

log = logging.getLogger(__name__)

#: states between which requests lead, and the guest goes back and forth by them alone
LIVING = frozenset({"created", "running", "paused"})


def was_started(row: pb.ContainerRow) -> bool:
    """Whether the container's program was let run, be it still there or not."""
    return any(process.started for process in row.processes if not process.exec_id)


def take(container: Container, row: pb.ContainerRow) -> None:
    """Have the document say what the guest does; that a container has ended, its stand-in tells."""
    document = container.document
    before = dict(document)
    if was_started(row):
        document.setdefault("started", time.time())
    if container.status in LIVING and row.status in LIVING:
        document["status"] = cast("Status", row.status)
    if document != before:
        log.info("%s is %s in the guest", container, row.status)
        container.note()


async def changed(
    agent: AgentClient,
    container: Container,
    change: Callable[[], Awaitable[None]],
    *,
    into: Literal["started", "running", "paused"],
) -> None:
    """Have the agent make a change.

    Where the connection breaks the guest says whether it was made, and if not it is asked once more.
    """
    try:
        await change()
    except UnavailableError as error:
        if await _is(agent, container, into, error):
            return
        if isinstance(error, TimedOutError):
            raise  # it may still be at it
        await change()


async def _is(agent: AgentClient, container: Container, wanted: str, error: SandboxError) -> bool:
    """Whether the guest has a container in a state; who cannot find out raises the `error` that made it ask."""
    try:
        rows = [row for row in await agent.containers() if row.container_id == container.id]
    except SandboxError:
        raise error from None
    return any(was_started(row) if wanted == "started" else row.status == wanted for row in rows)
