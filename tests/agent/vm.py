"""The agent as PID 1 of the built guest, in a virtual machine."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.agent.harness import make_rootfs, spec
from tests.agent.served import SLOW, Served
from vmsandbox.guest.client import AgentClient
from vmsandbox.guestbuild import store
from vmsandbox.paths import Roots
from vmsandbox_hypervisor.api import Cpus, Disk, Kernel, Memory, Port, VmConfig
from vmsandbox_hypervisor.qemu.machine import QemuHypervisor
from vmsandbox_protocol import agent_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from vmsandbox_hypervisor.api import Vm

BASE = "/run/vmsandbox"
PORT = "vmsandbox.agent"
BULK = "vmsandbox.bulk"


def config_for(directory: Path, *, memory_mib: int = 256) -> VmConfig:
    """A machine with the guest that this machine has built."""
    data = Path(os.environ.get("VMSANDBOX_DATA_ROOT", "/var/lib/vmsandbox"))
    guest = store.current(Roots(Path("/run/vmsandbox"), data), "packaged")
    return VmConfig(
        name="agent-test",
        directory=directory,
        kernel=Kernel(path=guest.kernel, initrd=guest.initrd, cmdline=guest.cmdline),
        memory=Memory(size_mib=memory_mib, hotplug_mib=1024),
        cpus=Cpus(boot=1, maximum=4),
        disks=(Disk(id="root", path=guest.image, read_only=True),),
        ports=(Port(name=PORT), Port(name=BULK)),
        root_ports=8,
    )


def make_image(path: Path, scratch: Path) -> None:
    """A busybox root as an erofs file."""
    make_rootfs(scratch)
    subprocess.run(["mkfs.erofs", "--quiet", path, scratch], check=True, stdout=subprocess.DEVNULL)


class VmAgent(Served):
    """A booted guest with an image plugged in."""

    def __init__(self, vm: Vm, client: AgentClient, directory: Path, image_path: str) -> None:
        super().__init__(client)
        self.vm = vm
        self.directory = directory
        self._image = pb.Storage(
            driver=pb.Storage.DRIVER_BLOCK,
            pci_path=image_path,
            fstype="erofs",
            options=["ro"],
            mount_point=f"{BASE}/image",
        )

    @classmethod
    @asynccontextmanager
    async def booted(cls, directory: Path, **options: Any) -> AsyncIterator[VmAgent]:
        """Boot a guest for the duration of the block."""
        machine = directory / "vm"
        machine.mkdir(mode=0o711)
        image = directory / "box.erofs"
        await asyncio.to_thread(make_image, image, directory / "rootfs")
        async with (
            QemuHypervisor().running(config_for(machine, **options)) as vm,
            AgentClient.connected(vm.port_path(PORT), directory=machine, bulk_path=vm.port_path(BULK)) as client,
        ):
            try:
                request = pb.CreateSandboxRequest(
                    sandbox_id="pod",
                    hostname="pod",
                    entropy=os.urandom(64),
                    time_ns=time.time_ns(),
                    machine_id="0123456789abcdef" * 2,
                )
                await client.create_sandbox(request, timeout=120)
                address = await vm.attach_disk(Disk(id="image", path=image, read_only=True))
                yield cls(vm, client, directory, address.pci_path)
            except BaseException:
                print(vm.console())
                raise

    def root_of(self, container_id: str, *, size: str = "64m") -> list[pb.Storage]:
        """The image under a layer in memory, as a container's root."""
        layer = f"{BASE}/layers/{container_id}"
        return [
            self._image,
            pb.Storage(driver=pb.Storage.DRIVER_TMPFS, mount_point=layer, options=[f"size={size}"]),
            pb.Storage(
                driver=pb.Storage.DRIVER_OVERLAY,
                mount_point=f"{BASE}/roots/{container_id}",
                lower=[f"{BASE}/image"],
                upper=f"{layer}/upper",
                work=f"{layer}/work",
            ),
        ]

    async def create(
        self,
        container_id: str,
        argv: Sequence[str],
        *,
        stdio: pb.Stdio | None = None,
        resources: dict[str, Any] | None = None,
        mounts: Sequence[dict[str, Any]] = (),
        own_pids: bool = True,
        size: str = "64m",
        start: bool = True,
        **fields: Any,
    ) -> pb.CreateContainerResponse:
        """Create a container of busybox whose writable layer is of `size`; without `own_pids` it sees the guest's."""
        document = spec(argv, Path(f"{BASE}/roots/{container_id}"))
        document["linux"]["resources"] = resources or {}
        document["linux"]["namespaces"].append({"type": "cgroup"})
        if not own_pids:
            document["linux"]["namespaces"].remove({"type": "pid"})
        document["mounts"] += mounts
        request = pb.CreateContainerRequest(
            container_id=container_id,
            spec_json=json.dumps(document).encode(),
            storages=self.root_of(container_id, size=size),
            stdio=stdio or pb.Stdio(stdin=True, stdout=True, stderr=True),
            start=start,
            **fields,
        )
        return await self.client.create_container(request, timeout=SLOW)
