"""Streams that carry much, through a port of their own that cuts, delays and loses bytes when it breaks."""

from __future__ import annotations

import asyncio
import random
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from tests.agent import harness
from tests.agent.fake_port import FakePort
from tests.agent.hearing import hear
from vmsandbox_protocol import link

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.deadline(120)

MIB = 1 << 20


@asynccontextmanager
async def agent(tmp_path: Path, *, seed: int | None = None) -> AsyncIterator[tuple[harness.HostAgent, FakePort]]:
    async with (
        FakePort.opened(tmp_path / "bulk", seed=seed) as port,
        harness.running(tmp_path / "a", bulk=port) as running,
    ):
        yield running, port


@pytest.mark.parametrize("seed", [None, 3])
async def test_much_goes_both_ways_through_the_port_and_arrives_in_order(tmp_path: Path, seed: int | None) -> None:
    data = random.Random(7).randbytes(3 * MIB) + link.MARK + bytes(MIB) + link.MARK + b"end"
    async with agent(tmp_path, seed=seed) as (running, port):
        await running.create("web", ["cat"])
        async with running.client.attach("web", "") as attachment:
            hearing = asyncio.create_task(hear(attachment))
            await attachment.send_input(0, data, eof=True)
            heard = await hearing
        assert heard.stdout == data
        assert heard.exit is not None
        assert heard.accepted == len(data)
        assert port.connections == 1
        assert port.to_host > MIB
        assert port.to_guest > MIB
