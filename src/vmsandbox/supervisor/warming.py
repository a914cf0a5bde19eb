"""What a machine goes through before anybody uses it: a container, so that all code on that path is in its memory.

Templates are saved after it, and with them what is loaded; in a spare the emulator has translated it besides.
"""

from __future__ import annotations

import asyncio
import json
import logging
import tempfile
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmsandbox.errors import UnsupportedError
from vmsandbox.oci import compose, options
from vmsandbox.resources import scratch
from vmsandbox.supervisor import shares
from vmsandbox.supervisor.storages import ROOTFS, STORAGE, overlay_storages
from vmsandbox_hypervisor.api import Disk, SharedMemory, VirtiofsShare
from vmsandbox_hypervisor.errors import DeviceError
from vmsandbox_protocol import agent_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmsandbox.guest.attachment import Attachment
    from vmsandbox.guest.client import AgentClient
    from vmsandbox.supervisor.sandbox import Surroundings
    from vmsandbox_hypervisor.api import Vm

log = logging.getLogger(__name__)

#: seconds the container may take
TIMEOUT = 120.0
DISK_MIB = 16
#: what the guest's image has for programs of containers
BUSYBOX = "/usr/bin/busybox"


async def clear(agent: AgentClient, *, caches: bool = False) -> None:
    """Have the guest's free memory hold nothing; with `caches`, free what it has read and does not use first."""
    with suppress(UnsupportedError):  # a guest that was built before there was this: its template is larger
        await agent.clear_memory(caches=caches)


async def rehearse(around: Surroundings, vm: Vm, agent: AgentClient, *, files: Mapping[str, str] | None = None) -> None:
    """Run a container on disks that are plugged in for it, and share a directory; then nothing of it is plugged.

    `files` is as for `warm`.
    """
    with tempfile.TemporaryDirectory(prefix="warm-", dir=vm.config.directory) as scratch_dir:
        disk = Path(scratch_dir, "layer.img")
        await asyncio.to_thread(scratch.create, disk, DISK_MIB, around.roots.data / "cache")
        async with AsyncExitStack() as stack:
            image = await vm.attach_disk(Disk(id="warm-image", path=vm.config.disks[0].path, read_only=True))
            stack.push_async_callback(vm.detach_disk, "warm-image")
            writable = await vm.attach_disk(Disk(id="warm-scratch", path=disk))
            stack.push_async_callback(vm.detach_disk, "warm-scratch")
            await warm(around, agent, image.pci_path, writable.pci_path, files=files)
            if isinstance(vm.config.memory.backing, SharedMemory):
                await warm_share(vm, agent, Path(scratch_dir, "share"))


async def warm(
    around: Surroundings,
    agent: AgentClient,
    image: str,
    writable: str | None,
    *,
    files: Mapping[str, str] | None = None,
) -> None:
    """Run one container the way pods run theirs, and another process in it.

    `image` and `writable` are addresses of disks nothing else uses.  Without `writable` the container's layer is in
    memory.  `files` are the guest's that the container has, by path in it: none has been written before a guest has
    had an identity.
    """
    container_id = "warm"
    rootfs = f"{ROOTFS}/{container_id}"
    chosen = options.run_options({"args": [BUSYBOX, "cat"]})
    composed = compose.compose(
        {},
        chosen,
        rootfs=rootfs,
        container_id=container_id,
        pod_files=files or {},
        cache=around.roots.run / "cache",
    )
    request = pb.CreateContainerRequest(
        container_id=container_id,
        spec_json=json.dumps(composed.spec).encode(),
        storages=overlay_storages("warm-image", image, f"{STORAGE}/{container_id}", writable, rootfs),
        stdio=pb.Stdio(stdin=True, stdout=True, stderr=True),
        start=True,
        user=composed.user,
        default_home=composed.default_home,
        make_cwd=composed.make_cwd,
    )
    await agent.create_container(request, timeout=TIMEOUT)
    async with agent.attach(container_id, "") as attachment:
        await attachment.receive()  # what was accepted so far; input may follow
        await _exec(agent, composed.spec, container_id)
        await attachment.send_input(0, b"warm", eof=True)
        await _ended(attachment)
    await agent.remove_container(container_id, force=True)


async def _exec(agent: AgentClient, spec: dict[str, Any], container_id: str) -> None:
    added = compose.compose_exec(options.exec_options({"args": [BUSYBOX, "true"]}), spec)
    request = pb.ExecRequest(
        container_id=container_id,
        exec_id=container_id,
        process_json=json.dumps(added.process).encode(),
        stdio=pb.Stdio(stdout=True, stderr=True),
        user=added.user,
        default_home=added.default_home,
        inherit=True,
    )
    await agent.exec(request, timeout=TIMEOUT)
    async with agent.attach(container_id, container_id) as attachment:
        await _ended(attachment)
    await agent.acknowledge(container_id, container_id)


async def _ended(attachment: Attachment) -> None:
    while (answer := await attachment.receive()) is not None:
        if answer.WhichOneof("what") == "exited":
            return


async def warm_share(vm: Vm, agent: AgentClient, directory: Path) -> None:
    """Have the guest load what a shared directory needs; a machine that cannot share has pods without any."""
    directory.mkdir(mode=0o755)
    plan = shares.Plan(shared_fs=shares.VIRTIO_FS, container_id="warm", names=("none",))
    try:
        await vm.attach_virtiofs(VirtiofsShare(tag=shares.TAG, path=directory))
    except DeviceError as error:
        log.info("the template has never had a shared directory: %s", error)
        return
    storages = plan.storages()
    await agent.add_storages(storages)
    await agent.remove_storages([storage.mount_point for storage in storages])
    await vm.detach_virtiofs(shares.TAG)
