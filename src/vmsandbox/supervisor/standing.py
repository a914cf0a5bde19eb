"""How a parent comes to be: a clone of the template goes through what pods do, and is stopped where nothing is left.

A process of its own does that, and ends with it, so that whoever keeps the parent (`keeping`) keeps nothing of what it
takes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import time
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vmsandbox.errors import SandboxError, UnavailableError
from vmsandbox.guest import replies
from vmsandbox.oci.mounts import POD_FILES
from vmsandbox.supervisor import bringup, cards, clock, slots, template, warming
from vmsandbox.supervisor.aio import told_to_end
from vmsandbox.supervisor.answering import first_answer
from vmsandbox.supervisor.sandbox import RPC_TIMEOUT, Demand, SandboxSpec, Surroundings, memory_of
from vmsandbox.supervisor.translation import translating
from vmsandbox.title import set_title
from vmsandbox_hypervisor.aio import readable
from vmsandbox_hypervisor.api import Disk, PrivateMemory, SharedMemory
from vmsandbox_hypervisor.qemu.template import copied_memory, release_replaced, release_zeros

if TYPE_CHECKING:
    import socket

    from vmsandbox.guest.client import AgentClient
    from vmsandbox.paths import Roots, SandboxPaths
    from vmsandbox.supervisor.parents import Wish
    from vmsandbox_hypervisor.api import Parent, Vm, VmConfig

log = logging.getLogger(__name__)

#: how much it leaves the processors to others, for the parent too
NICENESS = 5
#: the agent's protocol that has them first
_REHEARSES_IDENTITIES = 2
#: of nobody's: they are for examples (RFC 5737, RFC 3849)
_ADDRESSES = (("192.0.2.2", 24), ("2001:db8::2", 64))
#: after the second a third finds next to nothing left to translate
REHEARSALS = 2


def make(roots: Roots, paths: SandboxPaths, wanted: Wish, keeper: socket.socket) -> dict[str, Any] | None:
    """Make the parent, and answer what its keeper has to know; nothing is left where that fails.

    It is given up once the keeper has gone, which is seen by its end of the connection.
    """
    set_title(f"vmsandbox rehearsal {paths.directory.name}")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
    try:
        parent = asyncio.run(_unless_alone(roots, paths, wanted, keeper))
    except (SandboxError, OSError) as error:
        log.warning("no machine is kept to be forked: %s", error)
        return None
    except Exception:
        log.exception("no machine is kept to be forked")
        return None
    if parent is None:
        return None
    return {
        "pid": parent.pid,
        "start_time": parent.start_time,
        "name": parent.name,
        "memory": str(parent.memory),
        "disks": [{"id": name, "path": str(path)} for name, path in parent.disks.items()],
    }


async def _unless_alone(roots: Roots, paths: SandboxPaths, wanted: Wish, keeper: socket.socket) -> Parent | None:
    from vmsandbox.config.load import load
    from vmsandbox_hypervisor.qemu.machine import QemuHypervisor

    around = Surroundings(
        roots=roots,
        paths=paths,
        settings=load(roots, config_file=wanted.config_file),
        hypervisor=QemuHypervisor(accel_cache=roots.run / "accel"),
        config_file=wanted.config_file,
    )
    with told_to_end() as told:
        making = asyncio.create_task(_made(around, wanted), name="make a parent")
        alone = asyncio.create_task(readable(keeper), name="wait for the keeper's end")
        either: set[asyncio.Future[Any]] = {making, alone, told}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        alone.cancel()
        making.cancel()
        with suppress(asyncio.CancelledError):
            return await making
    return None


async def _made(around: Surroundings, wanted: Wish) -> Parent:
    spec = SandboxSpec(
        id=around.paths.directory.name,
        implicit=wanted.implicit,
        shareable=wanted.shareable,
        shared_fs=wanted.shared_fs,
        accel=wanted.accel,
    )
    # It has the rights to become whoever a fork is to be.  Nobody's code runs in it.
    config = replace(bringup.vm_config_for(around, spec), confinement=None)
    around.paths.vm.mkdir(mode=0o700)
    async with AsyncExitStack() as stack:
        if await template.key_for(around, config) != wanted.key:
            raise UnavailableError("the configuration has changed since the pod was made that wished for it")
        origin = template.clone_of(around, config, wanted.key, shareable=spec.shareable, mode="require")
        clone = stack.enter_context(origin)
        assert clone is not None
        if slots.has(clone):
            assert clone.restore is not None
            clone = await asyncio.to_thread(slots.for_clone, clone, spec, clone.restore.with_name(template.LAYER))
        clone = await stack.enter_async_context(cards.idle(clone))
        if isinstance(clone.memory.backing, PrivateMemory):
            # Other clones need all of it.
            own = await asyncio.to_thread(copied_memory, clone.memory.backing.fd)
            stack.callback(os.close, own)
            clone = replace(clone, memory=replace(clone.memory, backing=PrivateMemory(fd=own)))
        with translating():
            async with around.hypervisor.running(clone) as vm:
                parent = await _stopped(around, vm)
                vm.release()
                return parent


async def _stopped(around: Surroundings, vm: Vm) -> Parent:
    """Have a machine go through what pods do, and stop it where nothing is left of that."""
    config = vm.config
    async with bringup.agent_of(vm, config.directory) as agent:
        details = await first_answer(vm, agent.details(timeout=config.boot_timeout))
        rehearses = details.protocol_version >= _REHEARSES_IDENTITIES
        files = POD_FILES if rehearses else None  # which come with an identity
        async with asyncio.timeout(warming.TIMEOUT):
            for _ in range(REHEARSALS):
                if rehearses:
                    await _rehearse_identity(around, config, agent)
                await warming.rehearse(around, vm, agent, files=files)
            if slots.has(config):
                await warming.warm(around, agent, slots.address(config, slots.IMAGE), None, files=files)
            if isinstance(config.memory.backing, SharedMemory):
                await warming.clear(agent)
    if slots.has(config):
        await vm.replace_disk(Disk(id=slots.IMAGE, path=slots.empty_image(config.directory), read_only=True))
    if config.memory.hotplug_mib:
        # What most pods get; the kernel's description of it is a part of what forks share then.
        await vm.set_memory(memory_of(around.settings.sandbox, [Demand()]), timeout=RPC_TIMEOUT)
    parent = await vm.stand(bound=False)
    backing = config.memory.backing
    if isinstance(backing, PrivateMemory):
        await asyncio.to_thread(release_replaced, backing.fd, parent.pid)
    elif backing.fd is not None:
        await asyncio.to_thread(release_zeros, backing.fd)
    return parent


async def _rehearse_identity(around: Surroundings, config: VmConfig, agent: AgentClient) -> None:
    """Have a guest go through becoming somebody in a network, and somebody without; it is nobody then as before."""
    from vmsandbox_protocol import agent_pb2 as pb

    for networked in (True, False) if cards.has(config) else (False,):
        request = bringup.identity_of(SandboxSpec(id=config.name), around.settings)
        request.rehearsal = True
        request.hosts = b"127.0.0.1\tlocalhost\n"
        if networked:
            addresses = [pb.IpAddress(address=each, prefix=prefix, no_prefix_route=True) for each, prefix in _ADDRESSES]
            request.interfaces.add(
                name="eth0",
                mac="02:00:00:00:00:02",
                mtu=1500,
                pci_path=cards.address(config),
                up=True,
                addresses=addresses,
                sysctls={"ipv6/addr_gen_mode": "1"},
            )
            request.routes.add(destination="192.0.2.0/24", interface="eth0", scope="link", source="192.0.2.2")
            request.routes.add(gateway="192.0.2.1", interface="eth0")
            request.dns.servers.append("192.0.2.1")
        request.time_ns = time.time_ns()
        details = await agent.create_sandbox(request, timeout=RPC_TIMEOUT)
        await clock.settle(agent, clock.after_setting(replies.moment(details.time_ns), lead=0))
