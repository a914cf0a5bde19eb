"""PCI devices that come and go: disks, network cards, shares.

Every one takes a root port, which is reserved before anything is attached and free again only when the device and
what is behind it are gone.  The guest decides when a device goes, and may also give one back unasked; both arrive as
the event DEVICE_DELETED.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import stat
from typing import TYPE_CHECKING

from vmsandbox_hypervisor import virtiofsd
from vmsandbox_hypervisor.aio import finish
from vmsandbox_hypervisor.api import PrivateMemory
from vmsandbox_hypervisor.errors import DeviceError, ExitedError, MonitorError, NoSlotError
from vmsandbox_hypervisor.qemu.argv import (
    blockdev,
    disk_device,
    hotplug_address,
    nic_device,
    ninep_device,
    node_name,
    tap_netdev,
)
from vmsandbox_hypervisor.qemu.hotplug_rules import check_balloon, check_slot_id
from vmsandbox_hypervisor.qemu.monitor import CommandError, LinkError, record, records

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from vmsandbox_hypervisor.api import Disk, Event, Nic, NinePShare, PciAddress, VirtiofsShare, VmConfig
    from vmsandbox_hypervisor.qemu.monitor import Monitor

#: seconds a device that was attached by mistake gets to go again
UNDO_TIMEOUT = 5.0
_ROOT_PORT = re.compile(r"rp([0-9]{1,3})")


class Devices:
    """The root ports of one VM and what is in them."""

    def __init__(
        self, config: VmConfig, monitor: Monitor, *, stderr: int, helper_ended: Callable[[virtiofsd.Daemon], None]
    ) -> None:
        self._config = config
        self._monitor = monitor
        self._stderr = stderr
        self._helper_ended = helper_ended
        self._ports = {f"nic-{nic.id}": port for port, nic in enumerate(config.nics)}
        self._leaving: set[str] = set()
        self._inherited: set[str] = set()
        self._gone: set[str] = set()
        #: what was put behind the disks that are there from the start, by disk
        self._below: dict[str, str] = {}
        self.daemons: dict[str, virtiofsd.Daemon] = {}

    def addresses(self) -> dict[str, PciAddress]:
        """What is attached, by device id, and where the guest has it."""
        return {name: hotplug_address(port) for name, port in self._ports.items() if name not in self._gone}

    async def load(self) -> None:
        """Learn from QEMU what is attached: another process attached it."""
        self._ports.clear()
        buses = records(await self._monitor.execute("query-pci"), "query-pci")
        for bridge in (device for bus in buses for device in records(bus.get("devices", []), "query-pci")):
            port = _ROOT_PORT.fullmatch(str(bridge.get("qdev_id", "")))
            if port is None or "pci_bridge" not in bridge:
                continue
            behind = records(record(bridge["pci_bridge"], "query-pci").get("devices", []), "query-pci")
            for device in behind:
                name = str(device.get("qdev_id"))
                self._ports[name] = int(port[1])
                self._inherited.add(name)
        for daemon in virtiofsd.adopted(self._config.directory):
            self._watch(daemon)
            daemon.wanted = True

    def observe(self, event: Event) -> None:
        """Note what the guest has let go; called for every event, before anybody else sees it."""
        name = event.data.get("device")
        if event.name == "DEVICE_DELETED" and isinstance(name, str) and name in self._ports:
            self._gone.add(name)
            if name.startswith("fs-") and (daemon := self.daemons.get(name.removeprefix("fs-"))):
                daemon.wanted = False

    async def attach_disk(self, disk: Disk) -> PciAddress:
        check_slot_id("disk", disk.id)
        if any(disk.id == there.id for there in self._config.disks):
            raise DeviceError(f"disk '{disk.id}' is attached already: it is there from the start")
        with _opened(disk) as (fd, block_device):
            async with self._plugging(f"disk-{disk.id}") as port:
                async with self._lent(fd) as fdset:
                    node = blockdev(disk.id, fdset=fdset, read_only=disk.read_only, block_device=block_device)
                    await self._monitor.execute("blockdev-add", node)
                await self._monitor.execute("device_add", disk_device(disk.id, bus=f"rp{port}", addr="0"))
        return hotplug_address(port)

    async def replace_disk(self, disk: Disk) -> None:
        """See `Vm.replace_disk`: the disk's node gets another one below it, and QEMU closes what was there."""
        if not any(disk.id == there.id and disk.read_only == there.read_only for there in self._config.disks):
            raise DeviceError(f"cannot replace disk '{disk.id}': no such disk is there from the start")
        with _opened(disk) as (fd, block_device):
            async with self._lent(fd) as fdset:
                node = blockdev(disk.id, fdset=fdset, read_only=disk.read_only, block_device=block_device)
                # Another process, or a fork's parent, may have put something there before.
                name = node_name(f"file{os.urandom(4).hex()}", disk.id)
                below = {**record(node["file"], "blockdev"), "node-name": name}
                try:
                    await self._monitor.execute("blockdev-add", below)
                    await self._monitor.execute("blockdev-reopen", {"options": [{**node, "file": name}]})
                except CommandError as error:
                    await self._try("blockdev-del", {"node-name": name})
                    raise DeviceError(
                        f"cannot replace disk '{disk.id}': {error.reason}", reason=error.reason
                    ) from error
        before, self._below[disk.id] = self._below.get(disk.id), name
        if before is not None:
            await self._try("blockdev-del", {"node-name": before})

    @contextlib.asynccontextmanager
    async def _lent(self, fd: int) -> AsyncIterator[int]:
        """The number of a descriptor set for the block: a node has its own duplicate."""
        fdset = await self._monitor.add_fd(fd)
        try:
            yield fdset
        finally:
            await finish(self._try("remove-fd", {"fdset-id": fdset}))

    async def attach_nic(self, nic: Nic) -> PciAddress:
        check_slot_id("nic", nic.id)
        name = f"nic-{nic.id}"
        async with self._plugging(name) as port:
            await self._monitor.getfd(name, nic.tap_fd)
            vhost = ""
            if nic.vhost_fd is not None:
                vhost = f"vhost-{nic.id}"
                await self._monitor.getfd(vhost, nic.vhost_fd)
            await self._monitor.execute("netdev_add", tap_netdev(nic.id, fd=name, vhost_fd=vhost))
            await self._monitor.execute("device_add", nic_device(nic, port=port))
        return hotplug_address(port)

    async def attach_virtiofs(self, share: VirtiofsShare) -> PciAddress:
        check_slot_id("share", share.tag)
        if isinstance(self._config.memory.backing, PrivateMemory):
            raise DeviceError(f"cannot attach share '{share.tag}': virtio-fs needs memory that is mapped shared")
        if not share.path.is_dir():
            raise DeviceError(f"cannot share '{share.path}': no such directory")
        name = f"fs-{share.tag}"
        async with self._plugging(name) as port:
            try:
                daemon, connection = virtiofsd.start(
                    share,
                    program=self._config.virtiofsd,
                    directory=self._config.directory,
                    stderr=self._stderr,
                    selinux=self._config.labels.selinux,
                )
            except OSError as error:
                raise DeviceError(f"cannot start virtiofsd for '{share.tag}': {error}", reason=str(error)) from error
            self._watch(daemon)
            with connection:
                await self._monitor.getfd(name, connection.fileno())
            address = {"type": "fd", "data": {"str": name}}
            backend = {"type": "socket", "data": {"addr": address, "server": False}}
            await self._monitor.execute("chardev-add", {"id": f"char-{share.tag}", "backend": backend})
            await self._monitor.execute(
                "device_add",
                {
                    "driver": "vhost-user-fs-pci",
                    "id": name,
                    "chardev": f"char-{share.tag}",
                    "tag": share.tag,
                    "queue-size": 1024,
                    "bus": f"rp{port}",
                    "addr": "0",
                },
            )
            daemon.wanted = True
            if daemon.child.exited.done():
                # The guest may have the device already, so this is the end of a daemon that serves.
                self._helper_ended(daemon)
                raise LinkError(f"virtiofsd of share '{share.tag}' ended")
        return hotplug_address(port)

    async def attach_9p(self, share: NinePShare) -> PciAddress:
        if share not in self._config.shares:
            raise DeviceError(
                f"cannot attach share '{share.tag}': QEMU takes 9p exports only at its start, declare it in the "
                "configuration"
            )
        if share.plugged:
            raise DeviceError(f"share '{share.tag}' is attached already: it is there from the start")
        async with self._plugging(f"ninep-{share.tag}") as port:
            await self._monitor.execute("device_add", ninep_device(share.tag, bus=f"rp{port}", addr="0"))
        return hotplug_address(port)

    async def attach_balloon(self) -> PciAddress:
        check_balloon(self._config)
        async with self._plugging("balloon") as port:
            await self._monitor.execute(
                "device_add",
                {
                    "driver": "virtio-balloon-pci",
                    "id": "balloon",
                    "free-page-reporting": True,
                    "bus": f"rp{port}",
                    "addr": "0",
                },
            )
        return hotplug_address(port)

    async def detach(self, name: str, *, timeout: float) -> None:
        """Unplug and wait until the guest has let go, then remove what was behind the device.

        `DeviceError` if the guest does not within `timeout` seconds; the request stands, and its root port
        becomes free when the guest complies later.
        """
        if name not in self._ports:
            raise DeviceError(f"cannot detach '{name}': no such device is attached")
        with self._monitor.expected(lambda event: _about(event, name)) as answer:
            if name not in self._gone and await self._requested(name):
                try:
                    async with asyncio.timeout(timeout):
                        event = await answer
                except TimeoutError as error:
                    raise DeviceError(
                        f"cannot detach '{name}': the guest did not release it within {timeout:g} s"
                    ) from error
                if event.name != "DEVICE_DELETED":
                    self._leaving.discard(name)
                    raise DeviceError(f"cannot detach '{name}': the guest refused", reason=event.name)
        await finish(self._settle(name))

    async def _requested(self, name: str) -> bool:
        """Ask for the unplug, unless that was done and not answered yet; False if the device is gone."""
        if name in self._leaving:
            return True
        try:
            await self._monitor.execute("device_del", {"id": name})
        except CommandError as error:
            if not await self._exists(name):
                return False
            # An earlier owner of the VM may have asked already, and QEMU refuses to ask twice.
            if name not in self._inherited:
                raise DeviceError(f"cannot detach '{name}': {error.reason}", reason=error.reason) from error
        self._leaving.add(name)
        return True

    async def _exists(self, name: str) -> bool:
        listing = records(await self._monitor.execute("qom-list", {"path": "/machine/peripheral"}), "qom-list")
        return any(item.get("name") == name for item in listing)

    @contextlib.asynccontextmanager
    async def _plugging(self, name: str) -> AsyncIterator[int]:
        """Reserve a root port for the block; if that fails, everything is as before."""
        await self._sweep()
        if name in self._ports:
            raise DeviceError(f"'{name}' is attached already")
        used = set(self._ports.values())
        port = next((index for index in range(self._config.root_ports) if index not in used), None)
        if port is None:
            raise NoSlotError(f"cannot attach '{name}': all {self._config.root_ports} root ports are in use")
        self._ports[name] = port
        try:
            yield port
        except CommandError as error:
            await finish(self._undo(name))
            raise DeviceError(f"cannot attach '{name}': {error.reason}", reason=error.reason) from error
        except BaseException:
            await finish(self._undo(name))
            raise

    async def _undo(self, name: str) -> None:
        """Take away whatever part of an attachment came about."""
        try:
            if name.startswith("fs-") and (daemon := self.daemons.get(name.removeprefix("fs-"))):
                # First, because QEMU may be waiting for its answer.
                await daemon.kill()
            if await self._exists(name):
                with contextlib.suppress(DeviceError):
                    await self.detach(name, timeout=UNDO_TIMEOUT)
            else:
                await self._settle(name)
        except (MonitorError, ExitedError):
            # The VM is gone with all of it; whoever tried is told so, or was cancelled.
            self._ports.pop(name, None)

    async def _settle(self, name: str) -> None:
        """Remove what was behind a device that is gone, and give its root port free."""
        kind, _, identifier = name.partition("-")
        if kind == "disk":
            await self._try("blockdev-del", {"node-name": node_name("disk", identifier)})
        elif kind == "nic":
            await self._try("netdev_del", {"id": f"net-{identifier}"})
            await self._try("closefd", {"fdname": name})
            await self._try("closefd", {"fdname": f"vhost-{identifier}"})
        elif kind == "fs":
            await self._try("chardev-remove", {"id": f"char-{identifier}"})
            await self._try("closefd", {"fdname": name})
            if daemon := self.daemons.pop(identifier, None):
                await daemon.stop()
        self._ports.pop(name, None)
        for names in (self._gone, self._leaving, self._inherited):
            names.discard(name)

    async def _sweep(self) -> None:
        """Settle what the guest gave back after we had stopped waiting, or unasked."""
        for name in sorted(self._gone):
            await finish(self._settle(name))

    async def _try(self, command: str, arguments: dict[str, object]) -> None:
        with contextlib.suppress(CommandError):
            await self._monitor.execute(command, arguments)

    def _watch(self, daemon: virtiofsd.Daemon) -> None:
        self.daemons[daemon.tag] = daemon

        def ended(_: object) -> None:
            if daemon.wanted:
                self._helper_ended(daemon)

        daemon.child.exited.add_done_callback(ended)


@contextlib.contextmanager
def _opened(disk: Disk) -> Iterator[tuple[int, bool]]:
    """A descriptor of what is to be a disk, for the block, and whether it is a block device."""
    try:
        # Without blocking: what turns out to be a FIFO must not wait for its other end.
        fd = os.open(disk.path, (os.O_RDONLY if disk.read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise DeviceError(f"cannot open disk '{disk.path}': {error.strerror}", reason=str(error)) from error
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise DeviceError(f"cannot attach '{disk.path}': neither a file nor a block device")
        os.set_blocking(fd, True)
        yield fd, stat.S_ISBLK(mode)
    finally:
        os.close(fd)


def _about(event: Event, name: str) -> bool:
    return event.data.get("device") == name and event.name in ("DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR")
