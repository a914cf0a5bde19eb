"""Memory that grows and shrinks: one virtio-mem device, and pc-dimms with their traps.

virtio-mem is exact to 2 MiB and gives back what the guest can spare.  A pc-dimm is all or nothing, and two mistakes
that QEMU accepts hurt the guest: a size that is no multiple of the guest's memory block is silently lost, and
one that is large against what the guest has leaves no room for the pages that describe it.  Both are refused here.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from vmsandbox_hypervisor.aio import finish
from vmsandbox_hypervisor.api import MemoryState
from vmsandbox_hypervisor.errors import DeviceError
from vmsandbox_hypervisor.qemu.hotplug_rules import check_dimm, memory_target
from vmsandbox_hypervisor.qemu.monitor import CommandError, Monitor, integer, record, records

if TYPE_CHECKING:
    from typing import Any

    from vmsandbox_hypervisor.api import VmConfig

MIB = 1024 * 1024
VIRTIO_MEM_PATH = "/machine/peripheral/vmem0"
#: seconds between looks, at first and at last
LOOK_FIRST, LOOK_LAST = 0.004, 0.1
#: seconds without progress after which a guest has given what it can: its driver tries again only much later
STALLED = 2.0
OUTCOMES = ("DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR", "MEM_UNPLUG_ERROR")


class Memory:
    """The memory of one VM."""

    def __init__(self, config: VmConfig, monitor: Monitor) -> None:
        self._config = config.memory
        self._monitor = monitor
        self._changing = asyncio.Lock()

    async def state(self) -> MemoryState:
        plugged = requested = 0
        for kind, data in await self._devices():
            if kind == "virtio-mem":
                plugged += integer(data, "size")
                requested += integer(data, "requested-size")
            else:
                plugged += integer(data, "size")
                requested += integer(data, "size")
        return MemoryState(base_mib=self._config.size_mib, plugged_mib=plugged // MIB, requested_mib=requested // MIB)

    async def change(self, total_mib: int, *, timeout: float) -> MemoryState:
        """Grow to `total_mib` (rounded up to 2 MiB), or shrink as far as the guest gives back in time.

        What it does not give back at once stays asked for, and is not waited for.  `NoSlotError` beyond the
        configured maximum; `DeviceError` if the guest does not take more within `timeout`, in which case the request
        is withdrawn.
        """
        async with self._changing:
            dimms = sum(integer(data, "size") for kind, data in await self._devices() if kind == "dimm") // MIB
            wanted = memory_target(self._config, total_mib, dimms_mib=dimms)
            if not self._config.hotplug_mib:
                return await self.state()
            before = await self._virtio_mem()
            if before == (wanted, wanted):
                return await self.state()
            await self._request(wanted)
            try:
                reached = await self._reached(wanted, timeout, patience=timeout if wanted > before[0] else STALLED)
            except BaseException:
                await finish(self._withdraw(before[1]))
                raise
            if not reached and wanted > before[0]:
                await self._withdraw(before[1])
                raise DeviceError(
                    f"cannot grow memory to {total_mib} MiB: the guest did not take it within {timeout:g} s"
                )
            return await self.state()

    async def _reached(self, wanted: int, timeout: float, *, patience: float) -> bool:
        """Wait for a size; False after `timeout` seconds, or `patience` without progress."""
        # QEMU sends at most one MEMORY_DEVICE_SIZE_CHANGE a second, so the last one may come a second late.
        loop = asyncio.get_running_loop()
        seen, since, pause = -1, loop.time(), LOOK_FIRST
        try:
            async with asyncio.timeout(timeout):
                while (size := (await self._virtio_mem())[0]) != wanted:
                    if size != seen:
                        seen, since = size, loop.time()
                    elif loop.time() - since >= patience:
                        return False
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, LOOK_LAST)
        except TimeoutError:
            return False
        return True

    async def _request(self, mib: int) -> None:
        try:
            await self._monitor.execute(
                "qom-set", {"path": VIRTIO_MEM_PATH, "property": "requested-size", "value": mib * MIB}
            )
        except CommandError as error:
            raise DeviceError(f"cannot resize memory: {error.reason}", reason=error.reason) from error

    async def _withdraw(self, mib: int) -> None:
        with contextlib.suppress(DeviceError):
            await self._request(mib)

    async def _virtio_mem(self) -> tuple[int, int]:
        """What the guest has taken and what it was offered, in MiB."""
        for kind, data in await self._devices():
            if kind == "virtio-mem":
                return integer(data, "size") // MIB, integer(data, "requested-size") // MIB
        raise DeviceError("cannot resize memory: this VM has no virtio-mem device")

    async def _devices(self) -> list[tuple[str, dict[str, Any]]]:
        answer = records(await self._monitor.execute("query-memory-devices"), "query-memory-devices")
        return [(str(one.get("type")), record(one.get("data"), "query-memory-devices")) for one in answer]

    async def attach_dimm(self, dimm_id: str, size_mib: int) -> None:
        """`DeviceError` for a size the guest would suffer from, `NoSlotError` when there is no room."""
        async with self._changing:
            state = await self.state()
            dimms = [data for kind, data in await self._devices() if kind == "dimm"]
            check_dimm(
                self._config,
                dimm_id,
                size_mib,
                present_mib=state.base_mib + state.plugged_mib,
                dimms_mib={str(one.get("id")).removeprefix("dimm-"): integer(one, "size") // MIB for one in dimms},
            )
            await self._plug_dimm(dimm_id, size_mib)

    async def _plug_dimm(self, dimm_id: str, size_mib: int) -> None:
        backend = {
            "qom-type": "memory-backend-memfd",
            "id": f"dimm-{dimm_id}-backend",
            "size": size_mib * MIB,
            "share": True,
        }
        try:
            await self._monitor.execute("object-add", backend)
            await self._monitor.execute(
                "device_add", {"driver": "pc-dimm", "id": f"dimm-{dimm_id}", "memdev": backend["id"]}
            )
        except CommandError as error:
            await finish(self._drop_backend(dimm_id))
            raise DeviceError(f"cannot attach dimm '{dimm_id}': {error.reason}", reason=error.reason) from error

    async def detach_dimm(self, dimm_id: str, *, timeout: float) -> None:
        """`DeviceError` if the guest cannot empty it: it goes on using it."""
        name = f"dimm-{dimm_id}"
        async with self._changing:
            with self._monitor.expected(
                lambda event: event.data.get("device") == name and event.name in OUTCOMES
            ) as answer:
                try:
                    await self._monitor.execute("device_del", {"id": name})
                    async with asyncio.timeout(timeout):
                        outcome = (await answer).name
                except CommandError as error:
                    raise DeviceError(f"cannot detach dimm '{dimm_id}': {error.reason}", reason=error.reason) from error
                except TimeoutError as error:
                    raise DeviceError(
                        f"cannot detach dimm '{dimm_id}': the guest did not release it within {timeout:g} s"
                    ) from error
            if outcome != "DEVICE_DELETED":
                raise DeviceError(f"cannot detach dimm '{dimm_id}': the guest cannot empty it", reason=outcome)
            await finish(self._drop_backend(dimm_id))

    async def _drop_backend(self, dimm_id: str) -> None:
        with contextlib.suppress(CommandError):
            await self._monitor.execute("object-del", {"id": f"dimm-{dimm_id}-backend"})
