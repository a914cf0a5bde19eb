"""One container's life in the pod: what it was given, in which order, and how it is given back.

Everything acquired for a container is pushed on its exit stack as it is acquired, so undoing a failed creation
and deleting a finished container are the same code, in reverse order, every step attempted.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmsandbox import records
from vmsandbox.errors import NotFoundError, SandboxError
from vmsandbox.oci.compose import add_devices
from vmsandbox.oci.options import Device
from vmsandbox.resources import scratch
from vmsandbox.resources.images.store import ImageStore
from vmsandbox.supervisor import processors, shares, slots, store
from vmsandbox.supervisor.aio import together
from vmsandbox.supervisor.giving import Given
from vmsandbox.supervisor.lifecycle import Status, advance
from vmsandbox.supervisor.process import Exit, Process
from vmsandbox.supervisor.sandbox import Demand
from vmsandbox.supervisor.storages import ROOTFS, STORAGE, overlay_storages
from vmsandbox_protocol import agent_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vmsandbox.oci import texts
    from vmsandbox.oci.compose import Composed
    from vmsandbox.oci.options import RunOptions
    from vmsandbox.resources.images.store import Image
    from vmsandbox.supervisor.sandbox import Sandbox, Surroundings

log = logging.getLogger(__name__)

#: nodes of the disks of the host that containers are given
DEVICES = "/run/vmsandbox/devices"
#: ids of the host's disks begin with this
HOST_DISK = "host-"
#: seconds the creation of a container may take in the guest
CREATE_TIMEOUT = 120.0


class Container:
    """A container of this pod, from the request to create it until it is forgotten."""

    def __init__(self, around: Surroundings, document: dict[str, Any], shared: shares.Plan | None = None) -> None:
        self.around = around
        self.id: str = document["id"]
        self.document = document
        self.shared = shared or shares.Plan()
        if self.shared:
            # Noted before anything is mounted.
            document["shares"] = self.shared.document()
        self.lock = asyncio.Lock()
        self.init = Process(
            self.id,
            "",
            terminal=bool(document.get("terminal")),
            standin=document.get("standin"),
        )
        self.execs: dict[str, Process] = {}
        self.stack = Given()
        #: another life of it is being made: its document says "stopped" until it runs
        self.starting = False
        #: it has ended, and what it had in the machine is given back
        self.released = asyncio.Event()
        #: processes that the guest's kernel has killed for want of memory, and what says that there are more
        self.oom_kills = 0
        self._oom_or_end = asyncio.Event()

    def __str__(self) -> str:
        return f"container '{self.document.get('name') or self.id[:12]}'"

    @property
    def short(self) -> str:
        """What names disks and places of the container in the machine."""
        return self.id[:12]

    # ------------------------------------------------------------ state

    @property
    def status(self) -> Status:
        return self.document["status"]  # type: ignore[no-any-return]

    @property
    def autoremove(self) -> bool:
        return bool(self.document.get("autoremove"))

    def advance(self, verb: str) -> None:
        """Change the state as `verb` does, or raise `InvalidStateError`; writes the document."""
        self.document["status"] = advance(str(self), self.status, verb)
        self.save()

    def require(self, verb: str) -> None:
        """Raise `InvalidStateError` unless `verb` makes sense now."""
        advance(str(self), self.status, verb)

    def save(self) -> None:
        store.save_container(self.around.paths, self.id, self.document)

    def note(self) -> None:
        """Write down what has happened already: a full disk does not undo it, and is no reason to end the pod."""
        try:
            self.save()
        except OSError as error:
            log.warning("the document of %s is out of date: %s", self, error)

    def add_exec(self, exec_id: str, *, terminal: bool = False, standin: dict[str, Any] | None = None) -> Process:
        """Know another process; its stand-in is noted so that a later supervisor can judge by it."""
        process = Process(self.id, exec_id, terminal=terminal, standin=standin)
        self.execs[exec_id] = process
        self.document.setdefault("execs", {})[exec_id] = {"terminal": terminal, "standin": standin}
        try:
            self.save()
        except BaseException:
            del self.execs[exec_id], self.document["execs"][exec_id]
            raise
        return process

    def drop_exec(self, process: Process) -> None:
        self.execs.pop(process.exec_id, None)
        if self.document.get("execs", {}).pop(process.exec_id, None) is not None and self.status != "stopped":
            self.note()

    def restore_processes(self) -> None:
        """Know again what an earlier supervisor noted."""
        if "exit" in self.document:
            self.init.finish(Exit.of(self.document["exit"]))
            if not self.init.has_standin():
                self.init.delivered.set()
        for exec_id, noted in (self.document.get("execs") or {}).items():
            process = Process(self.id, exec_id, terminal=bool(noted.get("terminal")), standin=noted.get("standin"))
            process.settled.set()
            self.execs[exec_id] = process

    def process(self, exec_id: str) -> Process:
        if not exec_id:
            return self.init
        try:
            return self.execs[exec_id]
        except KeyError:
            raise NotFoundError(f"no such exec in {self}: '{exec_id}'") from None

    def oom_kills_are(self, count: int) -> None:
        """Note how many processes have been killed; a guest may say so any number of times."""
        if count <= self.oom_kills:
            return
        self.oom_kills = count
        self._oom_or_end.set()
        if not self.document.get("oom_killed"):
            self.document["oom_killed"] = True
            self.note()

    async def oom_or_end(self, seen: int) -> None:
        """Return once more than `seen` processes have been killed, or the container has ended."""
        while self.oom_kills <= seen and self.status != "stopped":
            self._oom_or_end.clear()
            await self._oom_or_end.wait()

    def ended(self, status: Exit) -> None:
        """Record that the init process has ended; its execs ended with it."""
        self._oom_or_end.set()
        if self.status == "stopped":
            return
        self.document["exit"] = status.document()
        self.document["finished"] = time.time()
        self.document["status"] = "stopped"
        self.note()

    # ------------------------------------------------------------ creation

    async def create(
        self,
        sandbox_ready: asyncio.Future[Sandbox],
        image: Image,
        composed: Composed,
        options: RunOptions,
        *,
        start: bool,
        in_slot: bool = False,
    ) -> None:
        """Give the container what it needs and create it in the guest; undone completely if it fails.

        With `in_slot` its layer is that of the machine's slot.
        """
        try:
            layer = await self._prepare(image, options, in_slot=in_slot)
            sandbox = await asyncio.shield(sandbox_ready)
            await self._give(sandbox, image, layer, composed, options.disks, start=start)
        except BaseException:
            await self.release()
            raise

    async def _prepare(self, image: Image, options: RunOptions, *, in_slot: bool) -> Path | None:
        """What needs no virtual machine, done while it boots; a layer `in_slot` comes with the machine."""
        self.hold(image)
        if self.shared:
            shared_dir = self.around.paths.shared_dir
            await shares.bind(shared_dir, self.shared)
            self.stack.push_async_callback(shares.unbind, shared_dir, self.shared.names)
        if options.read_only:
            return None
        if not in_slot and not self.layer.exists():
            await asyncio.to_thread(scratch.create, self.layer, self.layer_mib, self.around.roots.data / "cache")
        return self.layer

    def hold(self, image: Image) -> None:
        """Have a directory for what outlives the machine, and keep the image from being removed."""
        roots = self.around.roots
        directory = self.layer.parent
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Several run roots may share a data root: what belongs to which is said beside it.
        (directory / "owner").write_text(roots.run_dir)
        ImageStore(roots).hold(image.id, self.id)

    @property
    def layer(self) -> Path:
        """The file of the writable layer, if it has one."""
        return self.around.roots.data / "containers" / self.id / "scratch.img"

    @property
    def layer_mib(self) -> int:
        return int(self.document.get("scratch_mib") or self.around.settings.container.scratch_size_mib)

    async def _give(
        self,
        sandbox: Sandbox,
        image: Image,
        layer: Path | None,
        composed: Composed,
        disks: Sequence[texts.Disk],
        *,
        start: bool,
    ) -> None:
        began = time.monotonic()
        stack = self.stack
        stack.push_async_callback(sandbox.take_back, self.id)
        demand = self.demand()
        if demand != Demand() or self._cpuset():
            await sandbox.give(self.id, demand)
            settings = sandbox.around.settings.sandbox
            processors.require_set(self._cpuset(), online=sandbox.wanted_cpus(), settings=settings)
        self.document["disks"] = {}
        image_disk = f"image-{image.id.removeprefix('sha256:')[:12]}"
        image_address = await self._image_address(sandbox, image, image_disk)
        layer_point, layer_address = await self._layer_place(sandbox, layer)
        self.save()
        if disks:
            add_devices(composed.spec, await self._give_disks(sandbox, disks))
        if self.shared:
            await sandbox.shares.attach(self.shared.shared_fs, user=self.id)
            stack.push_async_callback(sandbox.shares.detach, self.shared.shared_fs, user=self.id)
        request = pb.CreateContainerRequest(
            container_id=self.id,
            spec_json=json.dumps(composed.spec).encode(),
            storages=[
                *overlay_storages(image_disk, image_address, layer_point, layer_address, self.rootfs),
                *self.shared.storages(),
            ],
            stdio=self.stdio(),
            start=start,
            user=composed.user,
            default_home=composed.default_home,
            make_cwd=composed.make_cwd,
        )
        await self._create_in_guest(sandbox, request, demand, began=began)

    async def _create_in_guest(
        self, sandbox: Sandbox, request: pb.CreateContainerRequest, demand: Demand, *, began: float
    ) -> None:
        """Have the agent create it, whose disks and shares were begun to be attached at `began`.

        What a container without limits may use beyond the machine's base is there before it can ask for it.
        """
        attached = time.monotonic()
        creating = self._asked_for(sandbox, request)
        if demand == Demand():
            await together(sandbox.give(self.id, demand), creating)
        else:
            await creating
        self.document["phases"] |= {
            "attach": round(attached - began, 4),
            "create": round(time.monotonic() - attached, 4),
        }

    async def _asked_for(self, sandbox: Sandbox, request: pb.CreateContainerRequest) -> None:
        answer = await sandbox.agent.create_container(request, timeout=CREATE_TIMEOUT)
        self.stack.push_async_callback(self._remove_in_guest, sandbox)
        self.document["phases"] = {f"guest_{phase}": micros / 1e6 for phase, micros in answer.phases_us.items()}

    async def _image_address(self, sandbox: Sandbox, image: Image, disk_id: str) -> str:
        """Where the guest has the image: in the machine's slot, or hot-plugged for all containers that use it."""
        if sandbox.spec.image == str(image.erofs):
            return slots.address(sandbox.vm.config, slots.IMAGE)
        address = await sandbox.share_disk(disk_id, image.erofs, user=self.id)
        self.stack.push_async_callback(sandbox.unshare_disk, disk_id, user=self.id)
        self.document["disks"]["image"] = [disk_id, address]
        return address

    async def _layer_place(self, sandbox: Sandbox, layer: Path | None) -> tuple[str, str | None]:
        """Where the writable layer is mounted in the guest, and the address of its disk, if it has one."""
        own = f"{STORAGE}/{self.id[:12]}"
        if layer is None:
            return own, None
        if sandbox.spec.layer == str(layer):
            # A clone has had it mounted from the start, which somebody has to undo as well.
            self.document["in_slot"] = True
            self.stack.push_async_callback(self._forget_in_guest, sandbox, [slots.LAYER_POINT])
            return slots.LAYER_POINT, slots.address(sandbox.vm.config, slots.LAYER)
        disk_id = f"scratch-{self.id[:12]}"
        address = await sandbox.attach_disk(disk_id, layer, read_only=False)
        self.stack.push_async_callback(sandbox.detach_disk, disk_id)
        self.document["disks"]["scratch"] = [disk_id, address]
        return own, address

    async def _give_disks(self, sandbox: Sandbox, disks: Sequence[texts.Disk]) -> list[Device]:
        """Hot-plug the host's disks; answers what the container is to see."""
        storages = []
        for number, disk in enumerate(disks):
            disk_id = f"dev-{self.id[:12]}-{number}"
            # Noted before it is there, so that whoever takes over finds it.
            self.document["disks"][f"device-{number}"] = [disk_id, ""]
            self.save()
            address = await sandbox.attach_disk(disk_id, Path(disk.source), read_only=disk.read_only)
            self.stack.push_async_callback(sandbox.detach_disk, disk_id)
            storages.append(
                pb.Storage(
                    driver=pb.Storage.DRIVER_BLOCK_DEVICE,
                    mount_point=self.point(number),
                    pci_path=address,
                    mode=0o660,
                )
            )
        found = await sandbox.agent.add_storages(storages)
        points = [storage.mount_point for storage in storages]
        self.stack.push_async_callback(self._forget_in_guest, sandbox, points)
        return [
            Device(
                path=disk.path,
                type="b",
                major=found[point].major,
                minor=found[point].minor,
                access=disk.access,
            )
            for disk, point in zip(disks, points, strict=True)
        ]

    def point(self, number: int | str) -> str:
        """Where the node of the container's disk with this number is in the guest."""
        return f"{DEVICES}/{self.short}-{number}"

    async def _forget_in_guest(self, sandbox: Sandbox, points: Sequence[str]) -> None:
        try:
            await sandbox.agent.remove_storages(points)
        except NotFoundError:
            return

    async def before_start(self, sandbox: Sandbox) -> None:
        """What has to be done when a created container is let run."""

    def demand(self) -> Demand:
        resources = self.document.get("resources") or {}
        return Demand(
            cpus=float(resources.get("cpus") or 0),
            memory_mib=-(-int(resources.get("memory") or 0) >> 20),
            host_cpus=frozenset(resources.get("host_cpus") or ()),
        )

    def _cpuset(self) -> str:
        return str((self.document.get("options") or {}).get("cpuset_cpus") or "")

    def stdio(self) -> pb.Stdio:
        size = self.document.get("size") or [0, 0]
        return pb.Stdio(
            terminal=self.init.terminal,
            columns=size[0],
            rows=size[1],
            stdin=bool(self.document.get("stdin")),
            stdout=True,
            stderr=not self.init.terminal,
        )

    @property
    def rootfs(self) -> str:
        return f"{ROOTFS}/{self.id}"

    # ------------------------------------------------------------ giving back

    async def _remove_in_guest(self, sandbox: Sandbox) -> None:
        try:
            await sandbox.agent.remove_container(self.id, force=True)
        except NotFoundError:
            return

    def outlived(self) -> bool:
        """Whether a file system that the machine has mounted for it goes on when the machine has ended."""
        return not self.autoremove

    async def release_in_guest(self, sandbox: Sandbox) -> None:
        """Unmount what outlives the machine (the writable layer), just before the machine is ended."""
        try:
            await self._remove_in_guest(sandbox)
            if self.document.get("in_slot"):
                await self._forget_in_guest(sandbox, [slots.LAYER_POINT])
        except SandboxError as error:
            log.warning("%s: its writable layer was not unmounted: %s", self, error)

    def has_devices(self, sandbox: Sandbox) -> bool:
        """Whether the machine still has a disk that was this container's alone."""
        present = sandbox.vm.devices()
        disks = self.document.get("disks") or {}
        return any(f"disk-{disk[0]}" in present for kind, disk in disks.items() if not is_shared(kind, disk[0]))

    def adopt(self, sandbox: Sandbox) -> None:
        """Rebuild the exit stack of a container that an earlier supervisor made."""
        present = sandbox.vm.devices()
        disks: Mapping[str, list[str]] = self.document.get("disks") or {}
        shared = self.document.get("shares") or {}
        if shared:
            self.stack.push_async_callback(shares.unbind, self.around.paths.shared_dir, shared["names"])
        self.stack.push_async_callback(sandbox.take_back, self.id)
        sandbox.remember_demand(self.id, self.demand())
        for disk_id, address in [disk for kind, disk in disks.items() if is_shared(kind, disk[0])]:
            if f"disk-{disk_id}" in present:
                sandbox.remember_shared_disk(disk_id, address, user=self.id)
                self.stack.push_async_callback(sandbox.unshare_disk, disk_id, user=self.id)
        own = {kind: disk[0] for kind, disk in disks.items() if not is_shared(kind, disk[0])}
        for disk_id in own.values():
            if f"disk-{disk_id}" in present:
                self.stack.push_async_callback(sandbox.detach_disk, disk_id)
        if self.document.get("in_slot"):
            self.stack.push_async_callback(self._forget_in_guest, sandbox, [slots.LAYER_POINT])
        points = [self.point(kind.removeprefix("device-")) for kind in disks if kind.startswith("device-")]
        if points:
            self.stack.push_async_callback(self._forget_in_guest, sandbox, points)
        if shared:
            sandbox.shares.remember(user=self.id)
            self.stack.push_async_callback(sandbox.shares.detach, shared["fs"], user=self.id)
        self.stack.push_async_callback(self._remove_in_guest, sandbox)

    async def release(self) -> None:
        """Give everything in the VM back, in reverse order; every step is attempted, and what failed is logged."""
        if failed := await self.stack.give_back():
            log.warning("%s was not released cleanly: %s", self, "; ".join(map(str, failed)))

    def forget(self) -> None:
        """Remove what is on disk.  The virtual machine has given everything back, or is gone."""
        records.forget_container(
            self.around.roots,
            self.id,
            name=str(self.document.get("name") or ""),
            image_id=str((self.document.get("image") or {}).get("id") or ""),
        )


def is_shared(kind: str, disk_id: str) -> bool:
    """Whether a disk of a container's document may be plugged for others of its pod as well."""
    return kind == "image" or disk_id.startswith(HOST_DISK)
