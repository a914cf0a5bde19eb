"""A running QEMU as a `Vm`: what it can do, and what everybody learns when it ends.

One watcher task waits for the process' end.  Then, and only then, every pending operation, every wait for an event and
every later call fails with the same `ExitedError`; there is no second path.  The end of a virtiofsd that still
serves ends the VM too, because a guest never recovers from it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vmsandbox_hypervisor.aio import background, finish
from vmsandbox_hypervisor.api import AccelChoice, Parent, SharedMemory
from vmsandbox_hypervisor.children import described
from vmsandbox_hypervisor.errors import BootError, DeviceError, ExitedError, ForkError, HypervisorError, MonitorError
from vmsandbox_hypervisor.forking.fork import allow, bind
from vmsandbox_hypervisor.qemu import migration, monitor
from vmsandbox_hypervisor.qemu.argv import MONITOR_SOCKET, descriptors, port_socket
from vmsandbox_hypervisor.qemu.hotplug import Devices
from vmsandbox_hypervisor.qemu.hotplug_cpu import Cpus, vcpu_threads
from vmsandbox_hypervisor.qemu.hotplug_memory import Memory
from vmsandbox_hypervisor.qemu.monitor import LinkError, integer, record

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Mapping

    from vmsandbox_hypervisor.api import (
        CpuState,
        Disk,
        Event,
        MemoryState,
        Nic,
        NinePShare,
        PciAddress,
        VirtiofsShare,
        VmConfig,
    )
    from vmsandbox_hypervisor.children import Child
    from vmsandbox_hypervisor.evidence import Evidence
    from vmsandbox_hypervisor.qemu.monitor import Monitor
    from vmsandbox_hypervisor.virtiofsd import Daemon

#: seconds between the end of the link and the end of the process that explains it
EXIT_TIMEOUT = 2.0
CLOSE_TIMEOUT = 30.0
#: the file of stderr is emptied when it is larger than this, looked at every so many seconds
STDERR_FILE_MAX = 1024 * 1024
STDERR_CHECK_INTERVAL = 10.0
VSOCK_PATH = "/machine/peripheral/vsock0"


class QemuVm:
    """A machine whose monitor answers.  Obtain one from `opened`."""

    def __init__(
        self,
        config: VmConfig,
        *,
        accel: AccelChoice,
        child: Child,
        link: Monitor,
        evidence: Evidence,
        stderr: int,
        phases: dict[str, float],
    ) -> None:
        self.config = config
        self.accel = accel
        self.pid = child.pid
        self.start_time = child.start_time
        self.vsock_cid: int | None = None
        self.phases = phases
        self.released = False
        self._child = child
        self._monitor = link
        self._evidence = evidence
        self._stderr = stderr
        self._devices = Devices(config, link, stderr=stderr, helper_ended=self._helper_ended)
        self._cpus = Cpus(link, unpluggable=accel.accel == "kvm")
        self._memory = Memory(config, link)
        self._end = asyncio.get_running_loop().create_future()
        self._asked_to_end = False
        #: why QEMU ends, in its own word, once it said so
        self._shutdown = ""
        self._failed_helper: str | None = None
        self._gone: ExitedError | None = None

    def observe(self, event: Event) -> None:
        """See every event before anybody else does."""
        self._devices.observe(event)
        if event.name == "SHUTDOWN":
            self._shutdown = str(event.data.get("reason"))

    async def watch(self) -> None:
        """Turn the end of the process into an error for everybody who waits for something."""
        status = await self._child_s_end()
        try:
            # What QEMU said last, a SHUTDOWN event for example, is still on its way.
            async with asyncio.timeout(EXIT_TIMEOUT):
                await self._monitor.closed()
        except TimeoutError:
            pass
        self._evidence.console.drain()
        self._evidence.keep()
        message = f"virtual machine '{self.config.name}' {described(status)}"
        if self._failed_helper:
            cause = f"because {self._failed_helper}"
        elif self._shutdown == "guest-reset":
            # Which QEMU takes for a power-off, so it does not complain.
            cause = ": ".join(filter(None, ["its guest reset itself", self._evidence.panic()]))
        else:
            cause = self._evidence.reason()
        self._gone = ExitedError(f"{message}: {cause}" if cause else message, status=status, evidence=self.evidence())
        self._monitor.fail(self._gone)
        self._end.set_result(status)

    async def _child_s_end(self) -> int | None:
        while True:
            done, _ = await asyncio.wait({self._child.exited}, timeout=STDERR_CHECK_INTERVAL)
            if done:
                return self._child.exited.result()
            # QEMU complains about some of what a hostile guest does, as often as it does it.
            if os.fstat(self._stderr).st_size > STDERR_FILE_MAX:
                os.ftruncate(self._stderr, 0)

    def _helper_ended(self, daemon: Daemon) -> None:
        status = daemon.child.exited.result()
        self._failed_helper = f"virtiofsd of share '{daemon.tag}' {described(status)}"
        self._child.send_signal(signal.SIGKILL)

    @asynccontextmanager
    async def _operation(self) -> AsyncIterator[None]:
        """Give every operation the same errors: `ExitedError` if the VM is gone, else its own with evidence."""
        if self._gone is not None:
            raise self._gone
        try:
            yield
        except DeviceError as error:
            error.evidence = error.evidence or self.evidence()
            raise
        except MonitorError as error:
            if isinstance(error, LinkError):
                await asyncio.wait({self._end}, timeout=EXIT_TIMEOUT)
            if self._gone is not None:
                raise self._gone from error
            error.evidence = error.evidence or self.evidence()
            raise

    def port_path(self, name: str) -> Path:
        if all(port.name != name for port in self.config.ports):
            raise KeyError(name)
        return self.config.directory / port_socket(name)

    def console(self) -> str:
        return self._evidence.console.text()

    def evidence(self) -> str:
        return self._evidence.text()

    def ended(self) -> ExitedError | None:
        orderly = self._asked_to_end or (self._shutdown == "guest-shutdown" and self._failed_helper is None)
        return None if orderly else self._gone

    def devices(self) -> Mapping[str, PciAddress]:
        return self._devices.addresses()

    def helper_pids(self) -> Mapping[str, int]:
        return {tag: daemon.child.pid for tag, daemon in self._devices.daemons.items()}

    def events(self) -> AsyncIterator[Event]:
        return self._monitor.subscribe()

    async def attach_disk(self, disk: Disk) -> PciAddress:
        async with self._operation():
            return await self._devices.attach_disk(disk)

    async def replace_disk(self, disk: Disk) -> None:
        async with self._operation():
            await self._devices.replace_disk(disk)
        disks = tuple(disk if there.id == disk.id else there for there in self.config.disks)
        self.config = replace(self.config, disks=disks)

    async def detach_disk(self, disk_id: str, *, timeout: float = 10.0) -> None:
        async with self._operation():
            await self._devices.detach(f"disk-{disk_id}", timeout=timeout)

    async def attach_nic(self, nic: Nic) -> PciAddress:
        async with self._operation():
            return await self._devices.attach_nic(nic)

    async def detach_nic(self, nic_id: str, *, timeout: float = 10.0) -> None:
        async with self._operation():
            await self._devices.detach(f"nic-{nic_id}", timeout=timeout)

    async def attach_virtiofs(self, share: VirtiofsShare) -> PciAddress:
        async with self._operation():
            return await self._devices.attach_virtiofs(share)

    async def detach_virtiofs(self, tag: str, *, timeout: float = 10.0) -> None:
        async with self._operation():
            await self._devices.detach(f"fs-{tag}", timeout=timeout)

    async def attach_9p(self, share: NinePShare) -> PciAddress:
        async with self._operation():
            return await self._devices.attach_9p(share)

    async def detach_9p(self, tag: str, *, timeout: float = 10.0) -> None:
        async with self._operation():
            await self._devices.detach(f"ninep-{tag}", timeout=timeout)

    async def attach_balloon(self) -> PciAddress:
        async with self._operation():
            return await self._devices.attach_balloon()

    async def set_cpus(self, count: int, *, timeout: float = 10.0) -> CpuState:
        async with self._operation():
            return await self._cpus.change(count, timeout=timeout)

    async def cpus(self) -> CpuState:
        async with self._operation():
            return await self._cpus.state()

    async def bind_cpus(self, host_cpus: Collection[int]) -> None:
        async with self._operation():
            for thread in vcpu_threads(self.pid):
                try:
                    os.sched_setaffinity(thread, host_cpus)
                except OSError as error:
                    raise DeviceError(f"cannot bind vCPUs to processors: {error.strerror}") from error

    async def set_memory(self, total_mib: int, *, timeout: float = 10.0) -> MemoryState:
        async with self._operation():
            return await self._memory.change(total_mib, timeout=timeout)

    async def memory(self) -> MemoryState:
        async with self._operation():
            return await self._memory.state()

    async def attach_dimm(self, dimm_id: str, size_mib: int) -> None:
        async with self._operation():
            await self._memory.attach_dimm(dimm_id, size_mib)

    async def detach_dimm(self, dimm_id: str, *, timeout: float = 10.0) -> None:
        async with self._operation():
            await self._memory.detach_dimm(dimm_id, timeout=timeout)

    async def pause(self) -> None:
        async with self._operation():
            await self._monitor.execute("stop")

    async def resume(self) -> None:
        async with self._operation():
            await self._monitor.execute("cont")

    async def status(self) -> str:
        async with self._operation():
            return str(record(await self._monitor.execute("query-status"), "query-status").get("status"))

    async def power_off(self, *, timeout: float = 10.0) -> None:
        """Press the power button and wait; a guest that has not gone after `timeout` seconds is killed."""
        self._asked_to_end = True
        try:
            async with asyncio.timeout(timeout):
                await self._monitor.execute("cont")  # a paused guest cannot react
                await self._monitor.execute("system_powerdown")
                await self._child.wait()
        except (TimeoutError, MonitorError):
            await self._quit()
        await self.wait()

    async def _quit(self) -> None:
        """End QEMU in its own way, which writes out what it holds; if it does not answer, by force."""
        try:
            async with asyncio.timeout(EXIT_TIMEOUT):
                await self._monitor.execute("quit")
                await self._child.wait()
        except (TimeoutError, MonitorError):
            await self._child.stop()

    async def kill(self) -> None:
        self._asked_to_end = True
        self._child.send_signal(signal.SIGKILL)
        await self.wait()

    async def wait(self) -> int | None:
        status: int | None = await asyncio.shield(self._end)
        return status

    async def stand(self, *, bound: bool = True) -> Parent:
        if self.accel.accel != "tcg":
            raise ForkError("a machine that the host's kernel runs cannot be forked")
        memory = descriptors(self.config).get("memory")
        if memory is None:
            raise ForkError(f"cannot have '{self.config.name}' forked: its memory must be a memfd of ours")
        if set(self.devices()) != {f"nic-{nic.id}" for nic in self.config.nics}:
            raise ForkError(
                f"cannot have '{self.config.name}' forked: something was hot-plugged, which no fork would know of"
            )
        try:
            allow(self.pid)
            if bound:
                bind(self.pid)
        except OSError as error:
            raise ForkError(f"cannot have '{self.config.name}' forked: {error.strerror}") from error
        await self.pause()
        return Parent(
            pid=self.pid,
            start_time=self.start_time,
            name=self.config.name,
            directory=self.config.directory,
            disks={disk.id: disk.path for disk in self.config.disks},
            memory=Path(f"/proc/{self.pid}/fd/{memory}"),
        )

    def release(self) -> None:
        self.released = True

    async def save_state(self, fd: int) -> None:
        async with self._operation():
            await migration.saved(self._monitor, fd)

    async def restore(self, state: Path) -> None:
        """Go on from a template's device state instead of booting."""
        fd = os.open(state, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            await migration.restored(self._monitor, fd)
        finally:
            os.close(fd)

    async def load(self, *, attached: bool) -> None:
        """Learn what an adopted (`attached`) or a new VM is like; its status must be a sound one."""
        if attached:
            await self._devices.load()
            self.vsock_cid = await self._claimed_cid()
        state = await self.status()
        if state in ("internal-error", "io-error", "guest-panicked"):
            raise MonitorError(f"QEMU is in state '{state}'")

    async def _claimed_cid(self) -> int | None:
        if self.config.vsock_cid is None:
            return None
        answer = await self._monitor.execute("qom-get", {"path": VSOCK_PATH, "property": "guest-cid"})
        return integer({"guest-cid": answer}, "guest-cid")

    async def close(self) -> None:
        """End the VM and its helpers, or leave them all as they are if it was released."""
        daemons = list(self._devices.daemons.values())
        if self.released:
            for daemon in daemons:
                daemon.forget()
            return
        self._asked_to_end = self._asked_to_end or self._gone is None
        await self._child.stop()
        await self.wait()
        for daemon in daemons:
            await daemon.stop()


@asynccontextmanager
async def opened(
    config: VmConfig,
    *,
    accel: AccelChoice | None,
    child: Child,
    evidence: Evidence,
    stderr: int,
    started: float,
    phases: dict[str, float],
) -> AsyncIterator[QemuVm]:
    """Connect to a QEMU that was just spawned, or (without `accel`) to one that is being adopted.

    Raises `BootError` with the phase that was reached, on an adoption `ExitedError` or `MonitorError`.  `started` is
    the `time.perf_counter()` of QEMU's execution, and `phases` what is known so far.
    """
    adopting = accel is None
    evidence.phases = phases
    async with AsyncExitStack() as stack:
        try:
            link = await stack.enter_async_context(
                monitor.connected(config.directory / MONITOR_SOCKET, timeout=config.boot_timeout)
            )
            phases["monitor"] = time.perf_counter() - started
            accel = accel or await _accel_of(link)
            vm = QemuVm(config, accel=accel, child=child, link=link, evidence=evidence, stderr=stderr, phases=phases)
            link.observe(vm.observe)
            await stack.enter_async_context(background(vm.watch(), f"watch {config.name}"))
            if not adopting:
                await _going_on(vm, started)
            await vm.load(attached=adopting)
            phases["running"] = time.perf_counter() - started
        except (MonitorError, ExitedError, OSError) as error:
            if adopting:
                if isinstance(error, HypervisorError):
                    error.evidence = error.evidence or evidence.text()
                raise
            raise await _boot_error(config, child, evidence, cause=error) from error
        try:
            yield vm
        finally:
            await finish(vm.close(), seconds=CLOSE_TIMEOUT)


async def _going_on(vm: QemuVm, started: float) -> None:
    """Have a clone or a fork go on from where its origin was, once its memory is there."""
    config, backing = vm.config, vm.config.memory.backing
    if config.parent is None and config.restore is None:
        return
    if isinstance(backing, SharedMemory) and backing.filled is not None:
        await backing.filled
    if config.parent is not None:
        await vm.resume()
    elif config.restore is not None:
        await vm.restore(config.restore)
        vm.phases["restored"] = time.perf_counter() - started


async def _accel_of(link: Monitor) -> AccelChoice:
    answer = record(await link.execute("query-kvm"), "query-kvm")
    return AccelChoice(accel="kvm" if answer.get("enabled") else "tcg", reason="the virtual machine runs with it")


async def _boot_error(config: VmConfig, child: Child, evidence: Evidence, *, cause: Exception) -> BootError:
    """Say in one line why the VM did not come up: QEMU's own words if it ended, else what was waited for."""
    await asyncio.wait({child.exited}, timeout=EXIT_TIMEOUT)
    evidence.console.drain()
    message = f"cannot start virtual machine '{config.name}': "
    if child.exited.done():
        message += evidence.reason() or f"QEMU {described(child.exited.result())}"
    else:
        message += str(cause)
    phase, seconds = list(evidence.phases.items())[-1]
    return BootError(message, phase=phase, seconds=seconds, evidence=evidence.text())
