"""A container of a bundle while it exists: how it is made in the guest, known again, and given processes."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmsandbox import lent
from vmsandbox.errors import InvalidBundleError, UnsupportedError
from vmsandbox.oci import cpusets, translate
from vmsandbox.resources import disks
from vmsandbox.resources.network import names
from vmsandbox.supervisor import labels, shares
from vmsandbox.supervisor.container import HOST_DISK, Container
from vmsandbox.supervisor.imaged import ImageContainer
from vmsandbox.supervisor.sandbox import Demand
from vmsandbox.supervisor.storages import ROOTFS
from vmsandbox_protocol import agent_pb2 as pb

if TYPE_CHECKING:
    from vmsandbox.oci.nodes import Numbers
    from vmsandbox.oci.translate import Translated
    from vmsandbox.supervisor.sandbox import Sandbox, Surroundings

log = logging.getLogger(__name__)

#: options of an engine's mount that hold in the guest too
KEPT_OPTIONS = frozenset({"nosuid", "nodev", "noexec", "noatime", "nodiratime", "relatime", "strictatime", "sync"})
#: which nodes of the host have memory
MEMORY_NODES = Path("/sys/devices/system/node/has_memory")
#: in the documents of these containers
KIND = "bundle"


def demand_of(resources: dict[str, Any]) -> dict[str, Any]:
    """What LinuxResources ask of the machine, as documents say it; 0 is no limit."""
    cpu, memory = resources.get("cpu") or {}, resources.get("memory") or {}
    quota, period = int(cpu.get("quota") or 0), int(cpu.get("period") or 100_000)
    return {
        "cpus": quota / period if quota > 0 else 0,
        "memory": max(0, int(memory.get("limit") or 0)),
    }


def host_cpus(resources: dict[str, Any]) -> list[int]:
    """The processors of the host that LinuxResources name, checked against those that there are."""
    text = str((resources.get("cpu") or {}).get("cpus") or "")
    wanted = cpusets.parse(text, name="linux.resources.cpu.cpus")
    missing = sorted(wanted - os.sched_getaffinity(0))
    if missing:
        raise InvalidBundleError(
            f"'linux.resources.cpu.cpus' is '{text[:64]}': this host has no processor {missing[0]}"
        )
    return sorted(wanted)


def require_mems(resources: dict[str, Any], *, nodes: Path = MEMORY_NODES) -> None:
    """Refuse LinuxResources that name memory nodes of the host, unless they name all.

    They are the host's, as `cpu.cpus` is.  Which of them a virtual machine's memory is on is the kernel's choice.
    """
    text = str((resources.get("cpu") or {}).get("mems") or "")
    wanted = cpusets.parse(text, name="linux.resources.cpu.mems", of="memory nodes")
    if not wanted:
        return
    try:
        listed = nodes.read_text().strip()
    except FileNotFoundError:  # a kernel that knows of one only
        listed = "0"
    there = cpusets.parse(listed, name=str(nodes), of="memory nodes")
    missing = sorted(wanted - there)
    if missing:
        raise InvalidBundleError(
            f"'linux.resources.cpu.mems' is '{text[:64]}': this host has no memory node {missing[0]}"
        )
    if wanted != there:
        raise UnsupportedError(
            f"'linux.resources.cpu.mems' is '{text[:64]}', which is not supported: a virtual machine's memory is on "
            f"any of the host's nodes, so name all of them, '{listed}', or none"
        )


async def taken(
    around: Surroundings, container_id: str, root: dict[str, Any] | None, *, needed: bool
) -> dict[str, Any] | None:
    """Take the engine's mount of a container's root away; None where there is none, or somebody else uses it.

    Raises `NotAloneError` for the latter if it is `needed`.
    """
    if root is None:
        return None
    # A loop device must not go for want of a user; that it is open is no exclusive use.
    root["held"] = held = os.open(root["device"], os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        await asyncio.to_thread(lent.take, root, lent.record_of(around.paths, container_id))
    except lent.NotAloneError as error:
        os.close(held)
        if needed:
            raise
        log.warning("the root of container '%s' is shared instead of plugged: %s", container_id, error)
        return None
    return root


def _name_servers(parts: Translated) -> list[str]:
    """Those that the engine's resolv.conf has at the loopback of the pod's namespace."""
    for source in parts.sources:
        if source.destination == "/etc/resolv.conf":
            return names.loopback_servers(source.path)
    return []


class BundleContainer(Container):
    """A container whose root and mounts are the host's.

    With `root` its root is on a disk, which has been `taken`.
    """

    def __init__(
        self,
        around: Surroundings,
        document: dict[str, Any],
        shared: shares.Plan | None = None,
        *,
        root: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(around, document, shared)
        self._root = root
        if root is not None:
            self.stack.callback(os.close, root.pop("held"))
            document["lent"] = root["device"]
        elif document.get("lent"):
            self._hold(str(document["lent"]))
        if document.get("lent"):
            record = lent.record_of(around.paths, self.id)
            self.stack.push_async_callback(asyncio.to_thread, lent.give_back, record)

    @property
    def short(self) -> str:
        # Ids that engines choose may begin alike.
        return hashlib.sha256(self.id.encode()).hexdigest()[:12]

    def _hold(self, device: str) -> None:
        """Be a user of the root's disk, as the supervisor before was."""
        try:
            self.stack.callback(os.close, os.open(device, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        except OSError as error:
            log.warning("cannot hold '%s': %s", device, error)

    #: of the stand-in's network when the container was made; None: that was another supervisor's doing
    interfaces: frozenset[str] | None = None

    async def create_bundle(self, sandbox_ready: asyncio.Future[Sandbox], parts: Translated) -> None:
        """Make the container in the guest; on failure nothing of it is left."""
        try:
            shared_dir = self.around.paths.shared_dir
            if self.shared:
                await shares.bind(shared_dir, self.shared)
                self.stack.push_async_callback(shares.unbind, shared_dir, self.shared.names)
            sandbox = await asyncio.shield(sandbox_ready)
            began = time.monotonic()
            await sandbox.network.reach(_name_servers(parts))
            self.stack.push_async_callback(sandbox.take_back, self.id)
            demand = self.demand()
            if demand != Demand():
                await sandbox.give(self.id, demand)
            if self.shared:
                await sandbox.shares.attach(self.shared.shared_fs, user=self.id)
                self.stack.push_async_callback(sandbox.shares.detach, self.shared.shared_fs, user=self.id)
            storages = [*self.shared.storages(), *self._traversable(parts)]
            plugged = await self._plug_disks(sandbox, parts)
            if self._root is not None:
                storages.append(await self._plug_root(sandbox, self._root, plugged))
            self.document["numbers"] = [[*host, *guest] for host, guest in plugged.items()]
            request = pb.CreateContainerRequest(
                container_id=self.id,
                spec_json=json.dumps(parts.completed(self._place, plugged=plugged, node=self.point)).encode(),
                storages=storages,
                stdio=self.stdio(),
            )
            await self._create_in_guest(sandbox, request, demand, began=began)
            self.interfaces = self._interfaces()
        except BaseException:
            await self.release()
            raise

    def plugged(self) -> dict[Numbers, Numbers]:
        """The guest's numbers of the host's disks that it was given, by the host's."""
        return {(row[0], row[1]): (row[2], row[3]) for row in self.document.get("numbers") or []}

    def _place(self, source: int) -> str:
        """Where a source is in the guest; the first one is the root."""
        if source == 0 and (self._root is not None or self.document.get("mapped")):
            return f"{ROOTFS}/{self.short}"
        return f"{self.shared.mount_point}/{self.shared.names[source if self._root is None else source - 1]}"

    def _traversable(self, parts: Translated) -> list[pb.Storage]:
        """The root at a place that the root of a user namespace can reach; the shared directory is root's alone."""
        if self._root is not None or {"type": "user"} not in parts.document["linux"]["namespaces"]:
            return []
        self.document["mapped"] = True
        source = f"{self.shared.mount_point}/{self.shared.names[0]}"
        return [
            pb.Storage(
                driver=pb.Storage.DRIVER_BIND, source=source, options=["rbind"], mount_point=f"{ROOTFS}/{self.short}"
            )
        ]

    async def _plug_root(self, sandbox: Sandbox, root: dict[str, Any], plugged: dict[Numbers, Numbers]) -> pb.Storage:
        """Plug the disk that the root is on; its numbers are added to `plugged`."""
        disk_id, read_only = f"root-{self.short}", bool(root["read_only"] or self.document["root_readonly"])
        self._note("root", disk_id, "")
        address = await sandbox.attach_disk(disk_id, Path(root["device"]), read_only=read_only)
        self.stack.push_async_callback(sandbox.detach_disk, disk_id)
        point = self.point("root")
        found = await sandbox.agent.add_storages(
            [pb.Storage(driver=pb.Storage.DRIVER_BLOCK_DEVICE, mount_point=point, pci_path=address)]
        )
        self.stack.push_async_callback(self._forget_in_guest, sandbox, [point])
        plugged[(root["numbers"][0], root["numbers"][1])] = (found[point].major, found[point].minor)
        kept = [option for option in root["options"] if option in KEPT_OPTIONS]
        return pb.Storage(
            driver=pb.Storage.DRIVER_BLOCK,
            fstype=root["fstype"],
            options=["ro", *kept] if read_only else kept,
            mount_point=f"{ROOTFS}/{self.short}",
            pci_path=address,
        )

    async def _plug_disks(self, sandbox: Sandbox, parts: Translated) -> dict[Numbers, Numbers]:
        """Plug the host's disks, each once in the pod; answers their numbers in the guest by those on the host."""
        storages = []
        for number, disk in enumerate(parts.disks):
            path, read_only = await asyncio.to_thread(
                disks.find, disk.numbers, member=disk.member, read_only=disk.read_only
            )
            disk_id = f"{HOST_DISK}{disk.numbers[0]}-{disk.numbers[1]}{'-ro' if read_only else ''}"
            self._note(f"device-{number}", disk_id, "")
            address = await sandbox.share_disk(disk_id, Path(path), user=self.id, read_only=read_only)
            self.stack.push_async_callback(sandbox.unshare_disk, disk_id, user=self.id)
            self._note(f"device-{number}", disk_id, address)
            storages.append(
                pb.Storage(
                    driver=pb.Storage.DRIVER_BLOCK_DEVICE,
                    mount_point=self.point(number),
                    pci_path=address,
                    mode=disk.mode,
                    uid=disk.uid,
                    gid=disk.gid,
                )
            )
        if not storages:
            return {}
        found = await sandbox.agent.add_storages(storages)
        points = [storage.mount_point for storage in storages]
        self.stack.push_async_callback(self._forget_in_guest, sandbox, points)
        return {
            disk.numbers: (found[point].major, found[point].minor)
            for disk, point in zip(parts.disks, points, strict=True)
        }

    def _note(self, kind: str, disk_id: str, address: str) -> None:
        """Write down what is about to be plugged, so that whoever takes over finds it."""
        self.document.setdefault("disks", {})[kind] = [disk_id, address]
        self.save()

    def outlived(self) -> bool:
        """Whether its root is on a disk; what is shared is the host's, and written there when the guest writes it."""
        return bool(self.document.get("lent"))

    async def before_start(self, sandbox: Sandbox) -> None:
        """Give the guest the interfaces that the engine has put into the network between create and start."""
        if self.interfaces is not None and self._interfaces() - self.interfaces:
            await sandbox.network.refresh(sandbox.vm, sandbox.agent)

    def _interfaces(self) -> frozenset[str]:
        """The names of the interfaces that the stand-in sees."""
        pid = (self.document.get("standin") or {}).get("pid")
        try:
            with open(f"/proc/{pid}/net/dev", encoding="utf-8", errors="replace") as file:
                return frozenset(line.partition(":")[0].strip() for line in file.readlines()[2:])
        except OSError:
            return frozenset()


def container_of(around: Surroundings, document: dict[str, Any]) -> Container:
    """The container of a document that an earlier supervisor wrote."""
    return (BundleContainer if document.get("kind") == KIND else ImageContainer)(around, document)


def exec_request(request: dict[str, Any], document: dict[str, Any]) -> pb.ExecRequest:
    """What the agent is asked for when an engine adds a process that it describes completely."""
    given = request["process"]
    # Late, because pods that no engine makes have nothing for pydantic to check.
    from vmsandbox.oci.document import checked
    from vmsandbox.oci.spec import Process

    process = checked(Process, json.dumps(given).encode(), name="process")
    if not process.args:
        raise InvalidBundleError("process is not valid: 'args' is empty: there is no program to run")
    labels.require_known(process, name="")
    columns, rows = request.get("size") or (0, 0)
    return pb.ExecRequest(
        container_id=document["id"],
        exec_id=str(request.get("exec")),
        process_json=json.dumps(translate.guest_process(process, given)).encode(),
        stdio=pb.Stdio(
            terminal=process.terminal,
            columns=columns,
            rows=rows,
            stdin=True,
            stdout=True,
            stderr=not process.terminal,
        ),
        ignore_paused=bool(request.get("ignore_paused")),
    )
