"""What the agent says about its own start, from which the host tells where a boot's time went."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from tests.agent import harness

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.deadline(60)


async def test_every_answer_tells_how_old_the_machine_was_and_what_came_before(directory: Path) -> None:
    async with harness.running(directory) as agent:
        before = time.clock_gettime(time.CLOCK_BOOTTIME)
        details = await agent.client.details(timeout=10)
        after = time.clock_gettime(time.CLOCK_BOOTTIME)
    milestones = {name: micros / 1e6 for name, micros in details.boot_phases_us.items()}
    assert milestones["kernel"] <= milestones["agent"] <= milestones["serving"] <= milestones["answered"]
    assert before <= milestones["answered"] <= after
