"""What tests do with an agent, wherever it runs."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from tests.agent.hearing import Heard, hear
from vmsandbox_protocol import agent_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.agent.loops import Loop
    from vmsandbox.guest.client import AgentClient

#: seconds for an answer of a guest that is being mistreated, under emulation on a busy machine
SLOW = 60.0


class Served:
    """An agent and a client of it; `loop` is where they live, if tests share them."""

    def __init__(self, client: AgentClient) -> None:
        self.client = client
        self.loop: Loop | None = None

    async def create(
        self,
        container_id: str,
        argv: Sequence[str],
        *,
        stdio: pb.Stdio | None = None,
        resources: dict[str, Any] | None = None,
        start: bool = True,
    ) -> pb.CreateContainerResponse:
        """Create a container of busybox."""
        raise NotImplementedError

    async def exec(self, container_id: str, exec_id: str, argv: Sequence[str], **fields: Any) -> Heard:
        """Run another process in a container, and hear all of it."""
        await self.start_exec(container_id, exec_id, argv, **fields)
        async with asyncio.timeout(SLOW), self.client.attach(container_id, exec_id) as attachment:
            heard = await hear(attachment)
        await self.client.acknowledge(container_id, exec_id, timeout=SLOW)
        return heard

    async def start_exec(self, container_id: str, exec_id: str, argv: Sequence[str], **fields: Any) -> None:
        request = pb.ExecRequest(
            container_id=container_id,
            exec_id=exec_id,
            process_json=json.dumps({"args": [*argv]}).encode(),
            inherit=True,
            stdio=pb.Stdio(stdout=True, stderr=True),
            **fields,
        )
        await self.client.exec(request, timeout=SLOW)
