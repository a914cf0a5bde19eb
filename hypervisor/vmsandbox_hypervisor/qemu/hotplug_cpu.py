"""vCPUs that come and, where that is safe, go.

Under TCG QEMU corrupts its heap when a vCPU is unplugged, so there they only ever come; the guest takes the surplus
offline.  Which properties a new vCPU needs, QEMU says itself.
"""

from __future__ import annotations

import asyncio
import os
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from vmsandbox_hypervisor.api import CpuState
from vmsandbox_hypervisor.errors import DeviceError, NoSlotError
from vmsandbox_hypervisor.qemu.monitor import CommandError, integer, record, records

if TYPE_CHECKING:
    from vmsandbox_hypervisor.api import Event
    from vmsandbox_hypervisor.qemu.monitor import Monitor

PERIPHERAL = "/machine/peripheral/"
#: QEMU names them so with debug-threads=on
_VCPU = re.compile(r"CPU \d+/")


def vcpu_threads(pid: int) -> list[int]:
    """The threads of a QEMU that run vCPUs, by their names: a fork would tell its parent's numbers."""
    found = []
    for thread in os.listdir(f"/proc/{pid}/task"):
        with suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/task/{thread}/comm") as file:
            if _VCPU.match(file.read()):
                found.append(int(thread))
    return found


class Cpus:
    """The vCPUs of one VM."""

    def __init__(self, monitor: Monitor, *, unpluggable: bool) -> None:
        self._monitor = monitor
        self._unpluggable = unpluggable
        self._changing = asyncio.Lock()

    async def state(self) -> CpuState:
        sockets = await self._sockets()
        return CpuState(present=sum("qom-path" in one for one in sockets), maximum=len(sockets))

    async def change(self, count: int, *, timeout: float) -> CpuState:
        """Come as near to `count` as possible; too many is `NoSlotError`, and nothing is plugged."""
        if count < 1:
            raise DeviceError(f"cannot have {count} vCPUs: a virtual machine has at least one")
        async with self._changing:
            sockets = await self._sockets()
            if count > len(sockets):
                raise NoSlotError(f"cannot have {count} vCPUs: this VM can have at most {len(sockets)}")
            free = [one for one in sockets if "qom-path" not in one]
            present = len(sockets) - len(free)
            if count > present:
                await self._plug(free[: count - present])
            elif self._unpluggable:
                plugged = [path for one in sockets if (path := str(one.get("qom-path", ""))).startswith(PERIPHERAL)]
                await self._unplug(plugged[::-1][: present - count], timeout)
            state = await self.state()
            return CpuState(present=state.present, maximum=state.maximum, surplus=max(0, state.present - count))

    async def _plug(self, sockets: list[dict[str, Any]]) -> None:
        added: list[str] = []
        for one in sockets:
            props = record(one.get("props"), "query-hotpluggable-cpus")
            name = "cpu-" + "-".join(str(value) for value in props.values())
            try:
                await self._monitor.execute("device_add", {"driver": str(one.get("type")), "id": name, **props})
            except CommandError as error:
                # Those already there stay: taking them back is what is not safe.
                raise DeviceError(
                    f"cannot add a vCPU after {len(added)}: {error.reason}", reason=error.reason
                ) from error
            added.append(name)

    async def _unplug(self, paths: list[str], timeout: float) -> None:
        """Ask the guest to give up vCPUs, one after another, and stop at the first it keeps."""
        try:
            async with asyncio.timeout(timeout):
                for path in paths:
                    if not await self._unplugged(path):
                        return
        except TimeoutError:
            return  # what is left is reported as surplus

    async def _unplugged(self, path: str) -> bool:
        # Of a vCPU the event names the path only.
        def about(event: Event) -> bool:
            return event.data.get("path") == path or event.data.get("device") == path.removeprefix(PERIPHERAL)

        with self._monitor.expected(lambda event: about(event) and event.name in OUTCOMES) as answer:
            try:
                await self._monitor.execute("device_del", {"id": path.removeprefix(PERIPHERAL)})
            except CommandError:
                return False
            return (await answer).name == "DEVICE_DELETED"

    async def _sockets(self) -> list[dict[str, Any]]:
        """One entry per possible vCPU, the first to be used first; a plugged one has a ``qom-path``."""
        answer = records(await self._monitor.execute("query-hotpluggable-cpus"), "query-hotpluggable-cpus")
        keys = ("socket-id", "die-id", "core-id", "thread-id")

        def order(one: dict[str, Any]) -> list[int]:
            props = record(one.get("props"), "query-hotpluggable-cpus")
            return [integer(props, key) if key in props else 0 for key in keys]

        return sorted(answer, key=order)


OUTCOMES = ("DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR")
