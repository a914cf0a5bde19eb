"""A hypervisor without machines, for tests of whatever uses one.  Contract tests hold it to what the real one does.

`FakeHypervisor.journal` tells what was asked, in order.  A test plays the other side through the extra methods of
`FakeVm`: it lets the VM die, print, emit events, or the guest refuse to cooperate.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vmsandbox_hypervisor.api import AccelChoice, CpuState, Event, MemoryState, Parent, PciAddress, PrivateMemory
from vmsandbox_hypervisor.children import described
from vmsandbox_hypervisor.errors import BootError, DeviceError, ExitedError, ForkError, HypervisorError, NoSlotError
from vmsandbox_hypervisor.qemu import argv as qemu_argv
from vmsandbox_hypervisor.qemu import forked
from vmsandbox_hypervisor.qemu.hotplug_rules import check_balloon, check_dimm, check_slot_id, memory_target
from vmsandbox_hypervisor.subscription import Subscription

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Mapping, Sequence

    from vmsandbox_hypervisor.api import Accel, Disk, Nic, NinePShare, VirtiofsShare, VmConfig

#: above the highest pid a kernel gives, so that nobody can signal anything by mistake
FIRST_PID = 1 << 22


class FakeVm:
    """A machine that exists only here."""

    def __init__(self, config: VmConfig, journal: list[str], pid: int) -> None:
        self.config = config
        self.accel = AccelChoice(accel="kvm" if config.accel == "kvm" else "tcg", reason="it is a fake")
        self.pid = pid
        self.start_time = pid * 10
        self.vsock_cid = config.vsock_cid
        self.phases = {"spawned" if config.parent is None else "forked": 0.001, "monitor": 0.02, "running": 0.021}
        self.released = False
        #: what the guest does when a device is to go, or memory to come
        self.guest_cooperates = True
        #: devices that the guest refuses to let go when it is asked the next time
        self.refuses: set[str] = set()
        self._journal = journal
        self._console = ""
        self._status = "running"
        self._ports = {f"nic-{nic.id}": port for port, nic in enumerate(config.nics)}
        self._helpers: dict[str, int] = {}
        self._dimms: dict[str, int] = {}
        self._cpus = config.cpus.boot
        self._virtio_mem = 0
        self._subscriptions: list[Subscription] = []
        self._end: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self._gone: ExitedError | None = None
        self._expected_end = False

    # ------------------------------------------------------------ what a test does to it

    def print(self, text: str) -> None:
        """The guest prints `text`."""
        self._console = (self._console + text)[-64 * 1024 :]

    def emit(self, name: str, **data: object) -> None:
        """QEMU sends an event."""
        for subscription in self._subscriptions:
            subscription.put(Event(name=name, data=data, time=time.time()))

    def die(self, status: int | None = -9, reason: str = "") -> None:
        """QEMU ends although nobody asked for it."""
        message = f"virtual machine '{self.config.name}' {described(status)}"
        self._finish(status, f"{message}: {reason}" if reason else message)

    def guest_powers_off(self) -> None:
        """The guest switches itself off."""
        self.emit("SHUTDOWN", guest=True, reason="guest-shutdown")
        self._expected_end = True
        self.die(0)

    def lose_helper(self, tag: str) -> None:
        """The virtiofsd of a share ends, and with it the VM."""
        self.die(-9, f"because virtiofsd of share '{tag}' was killed by SIGKILL")

    def rebind(self) -> None:
        """Go on in the running event loop: a test adopts in another one than it started in."""
        if not self._end.done():
            self._end = asyncio.get_running_loop().create_future()
        self.released = False

    def _finish(self, status: int | None, message: str) -> None:
        if self._end.done():
            return
        self._gone = ExitedError(message, status=status, evidence=self.evidence())
        self._end.set_result(status)
        for subscription in self._subscriptions:
            subscription.end()

    # ------------------------------------------------------------ the protocol

    def port_path(self, name: str) -> Path:
        if all(port.name != name for port in self.config.ports):
            raise KeyError(name)
        return self.config.directory / qemu_argv.port_socket(name)

    def console(self) -> str:
        return self._console

    def evidence(self) -> str:
        return "\n".join(self._console.splitlines()[-20:]) or "the console is empty"

    def ended(self) -> ExitedError | None:
        return None if self._expected_end else self._gone

    def devices(self) -> Mapping[str, PciAddress]:
        return {name: qemu_argv.hotplug_address(port) for name, port in self._ports.items()}

    def helper_pids(self) -> Mapping[str, int]:
        return dict(self._helpers)

    def events(self) -> AsyncIterator[Event]:
        subscription = Subscription()
        if self._gone is not None:
            subscription.end()
        self._subscriptions.append(subscription)
        return subscription

    def _did(self, what: str) -> None:
        if self._gone is not None:
            raise self._gone
        self._journal.append(f"{what} of {self.config.name}")

    def _plug(self, name: str) -> PciAddress:
        if name in self._ports:
            raise DeviceError(f"'{name}' is attached already")
        used = set(self._ports.values())
        port = next((index for index in range(self.config.root_ports) if index not in used), None)
        if port is None:
            raise NoSlotError(f"cannot attach '{name}': all {self.config.root_ports} root ports are in use")
        self._ports[name] = port
        return qemu_argv.hotplug_address(port)

    async def _unplug(self, name: str, timeout: float) -> None:
        if name not in self._ports:
            raise DeviceError(f"cannot detach '{name}': no such device is attached")
        if name in self.refuses:
            self.refuses.discard(name)
            raise DeviceError(f"cannot detach '{name}': the guest refused", reason="DEVICE_UNPLUG_GUEST_ERROR")
        if not self.guest_cooperates:
            await asyncio.wait({self._end}, timeout=timeout)
            if self._gone is not None:
                raise self._gone
            raise DeviceError(f"cannot detach '{name}': the guest did not release it within {timeout:g} s")
        del self._ports[name]
        self.emit("DEVICE_DELETED", device=name, path=f"/machine/peripheral/{name}")

    async def attach_disk(self, disk: Disk) -> PciAddress:
        self._did(f"attach disk {disk.id}")
        check_slot_id("disk", disk.id)
        if any(disk.id == there.id for there in self.config.disks):
            raise DeviceError(f"disk '{disk.id}' is attached already: it is there from the start")
        self._check_disk(disk)
        return self._plug(f"disk-{disk.id}")

    @staticmethod
    def _check_disk(disk: Disk) -> None:
        if not disk.path.is_file() and not disk.path.is_block_device():
            raise DeviceError(f"cannot open disk '{disk.path}': neither a file nor a block device")

    async def replace_disk(self, disk: Disk) -> None:
        self._did(f"replace disk {disk.id}")
        if not any(disk.id == there.id and disk.read_only == there.read_only for there in self.config.disks):
            raise DeviceError(f"cannot replace disk '{disk.id}': no such disk is there from the start")
        self._check_disk(disk)
        disks = tuple(disk if there.id == disk.id else there for there in self.config.disks)
        self.config = replace(self.config, disks=disks)

    async def detach_disk(self, disk_id: str, *, timeout: float = 10.0) -> None:
        self._did(f"detach disk {disk_id}")
        await self._unplug(f"disk-{disk_id}", timeout)

    async def attach_nic(self, nic: Nic) -> PciAddress:
        self._did(f"attach nic {nic.id}")
        check_slot_id("nic", nic.id)
        return self._plug(f"nic-{nic.id}")

    async def detach_nic(self, nic_id: str, *, timeout: float = 10.0) -> None:
        self._did(f"detach nic {nic_id}")
        await self._unplug(f"nic-{nic_id}", timeout)

    async def attach_virtiofs(self, share: VirtiofsShare) -> PciAddress:
        self._did(f"attach virtiofs {share.tag}")
        check_slot_id("share", share.tag)
        if isinstance(self.config.memory.backing, PrivateMemory):
            raise DeviceError(f"cannot attach share '{share.tag}': virtio-fs needs memory that is mapped shared")
        if not share.path.is_dir():
            raise DeviceError(f"cannot share '{share.path}': no such directory")
        address = self._plug(f"fs-{share.tag}")
        self._helpers[share.tag] = self.pid + 1 + len(self._helpers)
        return address

    async def detach_virtiofs(self, tag: str, *, timeout: float = 10.0) -> None:
        self._did(f"detach virtiofs {tag}")
        await self._unplug(f"fs-{tag}", timeout)
        del self._helpers[tag]

    async def attach_balloon(self) -> PciAddress:
        self._did("attach balloon")
        check_balloon(self.config)
        return self._plug("balloon")

    async def attach_9p(self, share: NinePShare) -> PciAddress:
        self._did(f"attach 9p {share.tag}")
        if share not in self.config.shares:
            raise DeviceError(f"cannot attach share '{share.tag}': declare it in the configuration")
        if share.plugged:
            raise DeviceError(f"share '{share.tag}' is attached already: it is there from the start")
        return self._plug(f"ninep-{share.tag}")

    async def detach_9p(self, tag: str, *, timeout: float = 10.0) -> None:
        self._did(f"detach 9p {tag}")
        await self._unplug(f"ninep-{tag}", timeout)

    async def set_cpus(self, count: int, *, timeout: float = 10.0) -> CpuState:
        self._did(f"set cpus {count}")
        maximum = self.config.cpus.maximum
        if count < 1:
            raise DeviceError(f"cannot have {count} vCPUs: a virtual machine has at least one")
        if count > maximum:
            raise NoSlotError(f"cannot have {count} vCPUs: this VM can have at most {maximum}")
        lowest = self.config.cpus.boot if self.accel.accel == "kvm" and self.guest_cooperates else self._cpus
        self._cpus = max(count, lowest)
        return CpuState(present=self._cpus, maximum=maximum, surplus=max(0, self._cpus - count))

    async def bind_cpus(self, host_cpus: Collection[int]) -> None:
        self._did(f"bind cpus {sorted(host_cpus)}")

    async def cpus(self) -> CpuState:
        self._did("cpus")
        return CpuState(present=self._cpus, maximum=self.config.cpus.maximum)

    async def set_memory(self, total_mib: int, *, timeout: float = 10.0) -> MemoryState:
        self._did(f"set memory {total_mib}")
        wanted = memory_target(self.config.memory, total_mib, dimms_mib=sum(self._dimms.values()))
        if not self.guest_cooperates:
            if wanted > self._virtio_mem:
                raise DeviceError(
                    f"cannot grow memory to {total_mib} MiB: the guest did not take it within {timeout:g} s"
                )
            return self._memory(requested=wanted)
        self._virtio_mem = wanted
        return self._memory(requested=wanted)

    async def memory(self) -> MemoryState:
        self._did("memory")
        return self._memory(requested=self._virtio_mem)

    def _memory(self, *, requested: int) -> MemoryState:
        dimms = sum(self._dimms.values())
        return MemoryState(
            base_mib=self.config.memory.size_mib,
            plugged_mib=self._virtio_mem + dimms,
            requested_mib=requested + dimms,
        )

    async def attach_dimm(self, dimm_id: str, size_mib: int) -> None:
        self._did(f"attach dimm {dimm_id}")
        state = self._memory(requested=self._virtio_mem)
        check_dimm(
            self.config.memory,
            dimm_id,
            size_mib,
            present_mib=state.base_mib + state.plugged_mib,
            dimms_mib=self._dimms,
        )
        self._dimms[dimm_id] = size_mib

    async def detach_dimm(self, dimm_id: str, *, timeout: float = 10.0) -> None:
        self._did(f"detach dimm {dimm_id}")
        if dimm_id not in self._dimms or not self.guest_cooperates:
            raise DeviceError(f"cannot detach dimm '{dimm_id}'")
        del self._dimms[dimm_id]

    async def pause(self) -> None:
        self._did("pause")
        self._status = "paused"
        self.emit("STOP")

    async def resume(self) -> None:
        self._did("resume")
        self._status = "running"
        self.emit("RESUME")

    async def status(self) -> str:
        self._did("status")
        return self._status

    async def power_off(self, *, timeout: float = 10.0) -> None:
        self._journal.append(f"power off of {self.config.name}")
        self._end_on_purpose(0)

    async def kill(self) -> None:
        self._journal.append(f"kill of {self.config.name}")
        self._end_on_purpose(-9)

    def _end_on_purpose(self, status: int) -> None:
        if self._gone is None:
            self._expected_end = True
            self._finish(status, f"virtual machine '{self.config.name}' {described(status)}")

    async def wait(self) -> int | None:
        return await asyncio.shield(self._end)

    async def save_state(self, fd: int) -> None:
        self._did("save state")
        self._status = "postmigrate"
        os.write(fd, b"the state of a fake")

    async def stand(self, *, bound: bool = True) -> Parent:
        self._did("stand")
        if self.accel.accel != "tcg":
            raise ForkError("a machine that the host's kernel runs cannot be forked")
        if self.config.memory.backing.fd is None:
            raise ForkError(f"cannot have '{self.config.name}' forked: its memory must be a memfd of ours")
        if set(self.devices()) != {f"nic-{nic.id}" for nic in self.config.nics}:
            raise ForkError(
                f"cannot have '{self.config.name}' forked: something was hot-plugged, which no fork would know of"
            )
        self._status = "paused"
        return Parent(
            pid=self.pid,
            start_time=self.start_time,
            name=self.config.name,
            directory=self.config.directory,
            disks={disk.id: disk.path for disk in self.config.disks},
            memory=Path(f"/proc/self/fd/{self.config.memory.backing.fd}"),
        )

    def release(self) -> None:
        self.released = True

    def close(self) -> None:
        """What leaving the block does."""
        if not self.released:
            self._end_on_purpose(-9)


class FakeHypervisor:
    """Makes `FakeVm`s; set `boot_failure` to let the next start fail."""

    def __init__(self) -> None:
        self.journal: list[str] = []
        self.boot_failure: HypervisorError | None = None
        self.machines: list[FakeVm] = []
        self._pids = itertools.count(FIRST_PID, 100)

    @asynccontextmanager
    async def running(self, config: VmConfig) -> AsyncIterator[FakeVm]:
        if self.boot_failure is not None:
            raise self.boot_failure
        try:
            qemu_argv.validate(config)
        except ValueError as error:
            message = f"cannot start virtual machine '{config.name}': {error}"
            raise BootError(message, phase="prepared") from error
        for path in (config.kernel.path, config.kernel.initrd, config.restore, *(disk.path for disk in config.disks)):
            if path is not None and not path.exists():
                message = f"cannot start virtual machine '{config.name}': cannot open '{path}'"
                raise BootError(message, phase="prepared")
        if config.parent is not None:
            forked.check(config, config.parent)
            original = next((vm for vm in self.machines if vm.pid == config.parent.pid), None)
            if original is None or original._gone is not None or original._status != "paused":
                raise ForkError(f"'{config.parent.name}' has ended")
        self.journal.append(f"{'boot' if config.parent is None else 'fork'} of {config.name}")
        vm = FakeVm(config, self.journal, next(self._pids))
        self.machines.append(vm)
        try:
            yield vm
        finally:
            vm.close()
            self.journal.append(f"{'release' if vm.released else 'end'} of {config.name}")

    @asynccontextmanager
    async def adopted(self, config: VmConfig, *, pid: int, start_time: int) -> AsyncIterator[FakeVm]:
        vm = next((vm for vm in self.machines if (vm.pid, vm.start_time) == (pid, start_time)), None)
        if vm is None or vm._gone is not None:
            raise ExitedError(f"virtual machine '{config.name}' is gone", status=None)
        self.journal.append(f"adoption of {config.name}")
        vm.rebind()
        vm.phases = {"monitor": 0.005, "running": 0.006}
        try:
            yield vm
        finally:
            vm.close()
            self.journal.append(f"{'release' if vm.released else 'end'} of {config.name}")

    async def destroy(self, config: VmConfig, *, pid: int, start_time: int) -> None:
        self.journal.append(f"destruction of {config.name}")
        for vm in self.machines:
            if (vm.pid, vm.start_time) == (pid, start_time):
                vm.die()

    async def probe_accel(self, accel: Accel) -> AccelChoice:
        return AccelChoice(accel="kvm" if accel == "kvm" else "tcg", reason="it is a fake")

    def argv(self, config: VmConfig) -> Sequence[str]:
        return qemu_argv.argv(config, "kvm" if config.accel == "kvm" else "tcg")
