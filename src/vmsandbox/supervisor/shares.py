"""Bind mounts of the pod's containers: from a volume on the host to a path in the guest.

The pod has one shared directory.  With virtio-fs it is served by one virtiofsd, which runs only while a container
needs it, and every container gets a bind mount of it at a place of its own: unmounting that lets go of everything
below.  With 9p QEMU itself serves it, from its start on, and the guest mounts it once for all.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmsandbox.errors import UnsupportedError
from vmsandbox.resources import share
from vmsandbox.supervisor import leaving
from vmsandbox.supervisor.translation import translating
from vmsandbox_hypervisor.api import NinePShare, PrivateMemory, VirtiofsShare
from vmsandbox_protocol import agent_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmsandbox.oci.texts import Volume
    from vmsandbox_hypervisor.api import Vm

TAG = "shared"
GUEST = "/run/vmsandbox/shared"
#: where the guest mounts all of it; no container has such an id
WHOLE = ".all"
VIRTIO_FS, NINEP, NONE = "virtio-fs", "9p", "none"
#: A larger message costs nothing, and a program may map files writable.
NINEP_OPTIONS = ("trans=virtio", "version=9p2000.L", "msize=512000", "cache=mmap")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one container shares: how, and under which names below the shared directory."""

    shared_fs: str = NONE
    container_id: str = ""
    volumes: tuple[Volume, ...] = ()
    names: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.names)

    @property
    def mount_point(self) -> str:
        """Where the guest mounts the shared directory for this container."""
        return f"{GUEST}/{self.container_id}" if self.shared_fs == VIRTIO_FS else GUEST

    def sources(self) -> dict[str, str]:
        """Destination of each volume -> path of its source in the guest."""
        return {
            volume.destination: f"{self.mount_point}/{name}"
            for volume, name in zip(self.volumes, self.names, strict=True)
        }

    def storages(self) -> list[pb.Storage]:
        if not self:
            return []
        if self.shared_fs == VIRTIO_FS:
            # The kernel takes a second mount of a tag for one of what is mounted below the first.
            whole = f"{GUEST}/{WHOLE}"
            return [
                pb.Storage(driver=pb.Storage.DRIVER_VIRTIOFS, source=TAG, mount_point=whole),
                pb.Storage(driver=pb.Storage.DRIVER_BIND, source=whole, options=["bind"], mount_point=self.mount_point),
            ]
        return [
            pb.Storage(driver=pb.Storage.DRIVER_9P, source=TAG, options=NINEP_OPTIONS, mount_point=self.mount_point)
        ]

    def document(self) -> dict[str, Any]:
        return {"fs": self.shared_fs, "names": list(self.names)}


def planned(container_id: str, volumes: Sequence[Volume], shared_fs: str) -> Plan:
    """Check what a container wants to share and name it; nothing is done yet.  Blocks (it looks at the sources).

    Raises `UnsupportedError` where nothing can be shared, and whatever `share.check_source` finds.
    """
    if volumes and shared_fs == NONE:
        raise UnsupportedError(
            f"cannot share '{volumes[0].source}': sharing is switched off (shared_fs is 'none'); "
            "choose '--shared-fs virtio-fs' or '--shared-fs 9p'"
        )
    for volume in volumes:
        share.check_destination(volume.destination)
        share.check_source(volume.source, create=volume.create)
    return Plan(
        shared_fs=shared_fs,
        container_id=container_id,
        volumes=tuple(volumes),
        names=tuple(share.name_for(container_id, volume.source) for volume in volumes),
    )


async def bind(directory: str, plan: Plan) -> None:
    """Mount the plan's sources below the shared directory: all or none."""
    wanted = [
        (name, volume.source, volume.read_only, volume.create)
        for name, volume in zip(plan.names, plan.volumes, strict=True)
    ]
    await asyncio.to_thread(share.bind_all, directory, wanted)


async def unbind(directory: str, names: Sequence[str]) -> None:
    """Undo `bind`.  The guest should have let go before."""
    await asyncio.to_thread(share.unbind_all, directory, names)


def ninep_share(directory: str) -> NinePShare:
    """The export that a pod with 9p declares at its start; its device comes with the first user."""
    return NinePShare(tag=TAG, path=Path(directory))


class Shares:
    """The shared directory as a device of the machine, there while a container uses it."""

    def __init__(self, vm: Vm, directory: str) -> None:
        self._vm = vm
        self._directory = directory
        self._users: set[str] = set()
        self._lock = asyncio.Lock()

    async def attach(self, shared_fs: str, *, user: str) -> None:
        """Count a user; the first one brings the device.

        Raises `UnsupportedError` if the machine was started without the possibility.
        """
        async with self._lock:
            if not self._users:
                await self._plug(shared_fs)
            self._users.add(user)

    async def detach(self, shared_fs: str, *, user: str) -> None:
        """Forget a user; the last one takes the device, and its virtiofsd, along."""
        async with self._lock:
            if user not in self._users:
                return
            self._users.discard(user)
            if self._users:
                return
            with translating():
                if shared_fs == VIRTIO_FS:
                    await self._vm.detach_virtiofs(TAG)
                else:
                    await self._vm.detach_9p(TAG)

    def remember(self, *, user: str) -> None:
        """Count a container that an earlier supervisor gave the device, or was about to."""
        if not {f"fs-{TAG}", f"ninep-{TAG}"}.isdisjoint(self._vm.devices()):
            self._users.add(user)

    async def _plug(self, shared_fs: str) -> None:
        config = self._vm.config
        with translating():
            if shared_fs == VIRTIO_FS:
                if isinstance(config.memory.backing, PrivateMemory):
                    raise _unprepared()
                await leaving.gone(self._vm, f"fs-{TAG}", lambda: self._vm.detach_virtiofs(TAG))
                await self._vm.attach_virtiofs(VirtiofsShare(tag=TAG, path=Path(self._directory)))
                return
            export = next((export for export in config.shares if export.tag == TAG), None)
            if export is None:
                raise _unprepared()
            await leaving.gone(self._vm, f"ninep-{TAG}", lambda: self._vm.detach_9p(TAG))
            await self._vm.attach_9p(export)


def _unprepared() -> UnsupportedError:
    return UnsupportedError(
        "cannot share anything with this pod: its virtual machine was started without the possibility; "
        "start a new one with the volumes"
    )
