"""Device state out of a machine and into another one, through descriptors.

Memory stays where it is: with x-ignore-shared QEMU leaves out what is mapped shared, and a clone has the template's
memory already.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from vmsandbox_hypervisor.errors import MonitorError
from vmsandbox_hypervisor.qemu.monitor import record

if TYPE_CHECKING:
    from vmsandbox_hypervisor.api import Event
    from vmsandbox_hypervisor.qemu.monitor import Monitor

CAPABILITIES = [{"capability": name, "state": True} for name in ("x-ignore-shared", "events")]
#: seconds for some hundred KiB of state
TIMEOUT = 20.0
NAME = "state"


async def saved(link: Monitor, fd: int) -> None:
    """Stop the machine and write its device state to `fd`.  `MonitorError` says why if that fails."""
    await link.execute("stop")
    await link.execute("migrate-set-capabilities", {"capabilities": CAPABILITIES})
    await link.getfd(NAME, fd)
    await _finished(link, "migrate")


async def restored(link: Monitor, fd: int) -> None:
    """Read the device state from `fd` into a machine that waits for it, and let it go on."""
    await link.execute("migrate-set-capabilities", {"capabilities": CAPABILITIES})
    # Nobody has to be told where the machine is now: it is another one.  Without any round QEMU 7.2 crashes.
    await link.execute("migrate-set-parameters", {"announce-rounds": 1})
    await link.getfd(NAME, fd)
    await _finished(link, "migrate-incoming")
    await link.execute("cont")


async def _finished(link: Monitor, command: str) -> None:
    with link.expected(_over) as outcome:
        await link.execute(command, {"uri": f"fd:{NAME}"})
        try:
            async with asyncio.timeout(TIMEOUT):
                event = await outcome
        except TimeoutError as error:
            raise MonitorError(f"QEMU did not finish '{command}' within {TIMEOUT:g} s") from error
    if event.data.get("status") != "completed":
        answer = record(await link.execute("query-migrate"), "query-migrate")
        raise MonitorError(f"'{command}' failed: {answer.get('error-desc', 'QEMU does not say why')}")


def _over(event: Event) -> bool:
    return event.name == "MIGRATION" and event.data.get("status") in ("completed", "failed", "cancelled")
