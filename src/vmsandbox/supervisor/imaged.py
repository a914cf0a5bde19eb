"""A container of an image while it exists: its disks, and how it is made in the guest."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from vmsandbox.oci.compose import add_devices
from vmsandbox.oci.options import Device
from vmsandbox.resources import scratch
from vmsandbox.resources.images.store import ImageStore
from vmsandbox.supervisor import processors, shares, slots
from vmsandbox.supervisor.container import Container
from vmsandbox.supervisor.sandbox import Demand
from vmsandbox.supervisor.storages import ROOTFS, STORAGE, overlay_storages
from vmsandbox_protocol import agent_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmsandbox.oci import texts
    from vmsandbox.oci.compose import Composed
    from vmsandbox.oci.options import RunOptions
    from vmsandbox.resources.images.document import Image
    from vmsandbox.supervisor.sandbox import Sandbox


class ImageContainer(Container):
    """A container whose root is an image below a writable layer."""

    @property
    def layer(self) -> Path:
        """The file of the writable layer, if it has one."""
        return self.around.roots.data / "containers" / self.id / "scratch.img"

    @property
    def layer_mib(self) -> int:
        return int(self.document.get("scratch_mib") or self.around.settings.container.scratch_size_mib)

    @property
    def rootfs(self) -> str:
        return f"{ROOTFS}/{self.id}"

    def hold(self, image: Image) -> None:
        """Have a directory for what outlives the machine, and keep the image from being removed."""
        roots = self.around.roots
        directory = self.layer.parent
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Several run roots may share a data root: what belongs to which is said beside it.
        (directory / "owner").write_text(roots.run_dir)
        ImageStore(roots).hold(image.id, self.id)

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

    def _cpuset(self) -> str:
        return str((self.document.get("options") or {}).get("cpuset_cpus") or "")
