"""Bring-up and take-down of a pod's machine.

`opened` makes a new one, `adopted` takes over one whose supervisor died.  Either way the block holds the pod; leaving
it ends the machine and everything that belongs to it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging
import os
import time
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

from vmsandbox import lent, remains
from vmsandbox.errors import SandboxError, UnavailableError
from vmsandbox.guest import replies
from vmsandbox.guest.client import AgentClient
from vmsandbox.guestbuild.choice import chosen
from vmsandbox.guestbuild.cmdline import EMULATED
from vmsandbox.resources import identities, share
from vmsandbox.supervisor import cards, clock, labels, parents, shares, slots, store, template
from vmsandbox.supervisor.aio import together
from vmsandbox.supervisor.answering import first_answer
from vmsandbox.supervisor.network import Connection, connected, resumed
from vmsandbox.supervisor.sandbox import RPC_TIMEOUT, Sandbox, SandboxSpec, Surroundings
from vmsandbox.supervisor.translation import translating
from vmsandbox_hypervisor.api import Confinement, Cpus, Disk, Kernel, Memory, Port, SecurityLabels, VmConfig
from vmsandbox_hypervisor.frequency import host_khz
from vmsandbox_hypervisor.kernel import tsc_frequency

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from vmsandbox.config.model import Settings
    from vmsandbox.supervisor import spares
    from vmsandbox_hypervisor.api import Vm
    from vmsandbox_protocol import agent_pb2 as pb

log = logging.getLogger(__name__)

AGENT_PORT = "vmsandbox.agent"
BULK_PORT = "vmsandbox.bulk"
ROOT_DISK = "guest-root"
#: The kernel derives these from the small memory at boot; the pod's limits are the containers' own.
GUEST_SYSCTLS = {
    "kernel.pid_max": "4194304",
    "kernel.threads-max": "1000000",
    # As docker has it: in a network of its own, everybody may serve any port, and ping.
    "net.ipv4.ip_unprivileged_port_start": "0",
    "net.ipv4.ping_group_range": "0 2147483647",
}


def vm_config_for(around: Surroundings, spec: SandboxSpec) -> VmConfig:
    """The machine a pod starts as; pure but for looking up the guest that is in use."""
    settings = around.settings
    guest = chosen(around.roots, settings.guest.kernel, settings.guest.image)
    sandbox = settings.sandbox
    base = sandbox.base_memory_mib + sandbox.base_memory_mib % 2
    first = settings.hypervisor.uid_base
    serves_9p = spec.shareable and (spec.shared_fs or sandbox.shared_fs) == shares.NINEP
    config = VmConfig(
        name=f"vmsandbox-{spec.id[:12]}",
        directory=around.paths.vm,
        kernel=Kernel(path=guest.kernel, initrd=guest.initrd, cmdline=guest.cmdline, emulated_cmdline=_emulated()),
        memory=Memory(size_mib=base, hotplug_mib=max(0, sandbox.memory_ceiling_mib() - base) // 128 * 128),
        cpus=Cpus(boot=sandbox.base_cpus, maximum=sandbox.cpu_ceiling()),
        disks=(Disk(id=ROOT_DISK, path=guest.image, read_only=True),),
        ports=(Port(name=AGENT_PORT), Port(name=BULK_PORT)),
        shares=(shares.ninep_share(around.paths.shared_dir),) if serves_9p else (),
        root_ports=settings.hypervisor.root_ports if spec.implicit else settings.hypervisor.pod_root_ports,
        accel=spec.accel or settings.hypervisor.accel,
        # Only root can serve files with their owners and modes.
        # The first uid of the range is for machines without a user's code; each pod gets one of the others.
        confinement=None if serves_9p or not settings.hypervisor.confine else Confinement(uid=first, gid=first),
        labels=SecurityLabels(apparmor=spec.apparmor, selinux=spec.selinux),
        binary=_path(settings.hypervisor.binary),
        virtiofsd=_path(settings.hypervisor.virtiofsd),
        boot_timeout=settings.hypervisor.boot_timeout,
    )
    config = cards.reserved(config)
    return slots.reserved(config) if spec.implicit else config


def agent_of(vm: Vm, directory: Path) -> AbstractAsyncContextManager[AgentClient]:
    """Reach a machine's agent; a pod of an earlier version has no port for bulk stdio."""
    has_bulk = any(port.name == BULK_PORT for port in vm.config.ports)
    bulk_path = vm.port_path(BULK_PORT) if has_bulk else None
    return AgentClient.connected(vm.port_path(AGENT_PORT), directory=directory, bulk_path=bulk_path)


def _emulated() -> tuple[str, ...]:
    khz = host_khz()
    return (*EMULATED, tsc_frequency(khz)) if khz else EMULATED


def _path(text: str) -> Path:
    from pathlib import Path

    return Path(text)


@asynccontextmanager
async def confined(around: Surroundings, spec: SandboxSpec, config: VmConfig) -> AsyncIterator[VmConfig]:
    """The machine with a uid that no other pod has, for the block: it is left when the machine has ended."""
    if config.confinement is None:
        yield config
        return
    settings = around.settings.hypervisor
    identity = await asyncio.to_thread(
        identities.reserve, around.roots, spec.id, base=settings.uid_base + 1, count=settings.uid_count - 1
    )
    try:
        yield dataclasses.replace(config, confinement=Confinement(uid=identity, gid=identity))
    finally:
        identities.release(around.roots, spec.id)


@asynccontextmanager
async def opened(around: Surroundings, spec: SandboxSpec, spare: spares.Spare | None = None) -> AsyncIterator[Sandbox]:
    """Bring a pod's machine up and hold it for the block: a `spare` one, a fork, a clone of its template, or booted.

    A machine that does not come up is a `SandboxError` that names the phase its start reached, with all phases, the
    console and QEMU's stderr as detail.
    """
    around.paths.vm.mkdir(mode=0o711, exist_ok=True)
    spare = await _suiting(around, spec, spare)
    config = vm_config_for(around, spec)
    mode = spec.template or around.settings.sandbox.template
    if config.shares:
        # QEMU opens it at its start: what is mounted on it later would stay hidden.
        await asyncio.to_thread(share.open_directory, around.paths.shared_dir)
    if spare is not None:
        async with AsyncExitStack() as stack:
            sandbox = await spare.taken(spec, stack)
            await sandbox.network.settle()
            yield sandbox
        return
    async with connected(around, spec, config) as network, AsyncExitStack() as stack:
        config = await stack.enter_async_context(confined(around, spec, config))
        # A 9p export is part of the command line and the pod's own: no two pods are alike.
        yield await _made(around, spec, config, network, stack, mode="off" if config.shares else mode)


async def _made(
    around: Surroundings, spec: SandboxSpec, config: VmConfig, network: Connection, stack: AsyncExitStack, *, mode: str
) -> Sandbox:
    """The pod by the fastest way there is; one that fails, and is not required, leads to the next."""
    key = "" if mode == "off" else await template.key_for(around, config)
    made = None
    config = await network.card.put_into(config)
    if key and parents.is_wanted(around, config):
        fork = stack.enter_context(parents.forked(around, config, key, shareable=spec.shareable))
        if fork is not None and fork.parent is not None:
            made = await _cloned(around, spec, fork, network, stack, layer=fork.parent.disks.get(slots.LAYER))
    if made is None:
        clone = stack.enter_context(template.clone_of(around, config, key, shareable=spec.shareable, mode=mode))
        if clone is not None and clone.restore is not None:
            layer = clone.restore.with_name(template.LAYER)
            made = await _cloned(around, spec, clone, network, stack, layer=layer, required=mode == "require")
    if made is None:
        config = await asyncio.to_thread(slots.for_boot, config, spec, cache=around.roots.data / "cache")
        made = await _booted(around, spec, config, network, stack)
    made.template_key = key
    await network.settle()
    return made


async def _suiting(around: Surroundings, spec: SandboxSpec, spare: spares.Spare | None) -> spares.Spare | None:
    """The machine that was kept ready, if it is what a pod would get; else it is ended."""
    if spare is None:
        return None
    suits = False
    try:
        suits = spare.suits(spec, vm_config_for(around, spec))
        return spare if suits else None
    finally:
        if not suits:
            log.info("the machine that was kept ready is another than is asked for")
            await spare.close()


async def _cloned(
    around: Surroundings,
    spec: SandboxSpec,
    config: VmConfig,
    network: Connection,
    stack: AsyncExitStack,
    *,
    layer: Path | None,
    required: bool = False,
) -> Sandbox | None:
    """A pod that goes on from another machine, whose layer is that; None, and a line in the log, where that fails."""
    try:
        async with AsyncExitStack() as attempt:
            if layer is not None and slots.has(config):
                config = await asyncio.to_thread(slots.for_clone, config, spec, layer)
            sandbox = await _booted(around, spec, config, network, attempt)
            stack.push_async_exit(attempt.pop_all())
            return sandbox
    except SandboxError as error:
        if network.failed:
            raise
        if required:
            again = "'vmsandbox template build --force' makes the template again"
            raise UnavailableError(f"the template's clone failed: {error}: {again}", detail=error.detail) from error
        if config.parent is None:
            log.warning("the template's clone failed, the pod boots cold: %s", error)
        else:
            log.warning("the fork failed, the pod is cloned: %s", error)
        return None


async def _booted(
    around: Surroundings, spec: SandboxSpec, config: VmConfig, network: Connection, stack: AsyncExitStack
) -> Sandbox:
    began = time.monotonic()
    vm, agent = await started(around, config, stack)
    return await introduced(Sandbox(around, spec, vm, agent, network), began=began)


async def started(around: Surroundings, config: VmConfig, stack: AsyncExitStack) -> tuple[Vm, AgentClient]:
    """A machine that runs, and its agent, which may not answer yet; both are left with the `stack`."""
    # While QEMU starts.
    loading = asyncio.get_running_loop().run_in_executor(None, AgentClient.load)
    with labels.blamed(config.labels), translating():
        vm = await stack.enter_async_context(around.hypervisor.running(config))
        await loading
        return vm, await stack.enter_async_context(agent_of(vm, around.paths.vm))


async def introduced(sandbox: Sandbox, *, began: float) -> Sandbox:
    """The pod whose machine was started at `began`, when its guest knows who it is."""
    config = sandbox.vm.config
    with translating():
        sandbox.cpus_online = config.cpus.boot
        sandbox.phases["vm"] = time.monotonic() - began
        # Written before the agent answers, so that a pod whose supervisor dies now can still be found.
        sandbox.save("creating")
        sandbox.details = await first_answer(sandbox.vm, _introduce(sandbox, timeout=config.boot_timeout))
        sandbox.phases["agent"] = time.monotonic() - began
        if sandbox.network.seconds:
            sandbox.phases["network"] = sandbox.network.seconds
        if config.restore is None:
            for phase, micros in sandbox.details.boot_phases_us.items():
                sandbox.phases[f"guest_{phase}"] = micros / 1e6
        sandbox.save("ready")
    return sandbox


@asynccontextmanager
async def adopted(around: Surroundings, document: dict[str, Any]) -> AsyncIterator[Sandbox]:
    """Take over the machine of a supervisor that died; raises `UnavailableError` if the machine is gone too."""
    spec = SandboxSpec.of(document)
    known = document["vm"]
    config = store.vm_config(known)
    with translating():
        async with (
            resumed(around, spec) as network,
            confined(around, spec, config),
            around.hypervisor.adopted(config, pid=known["pid"], start_time=known["start_time"]) as vm,
            agent_of(vm, around.paths.vm) as agent,
        ):
            network.recognise(vm)
            sandbox = Sandbox(around, spec, vm, agent, network)
            sandbox.boot = document.get("boot")
            sandbox.details = await first_answer(vm, agent.details(timeout=config.boot_timeout))
            sandbox.note("ready")
            yield sandbox


async def swept(around: Surroundings, spec: SandboxSpec, document: dict[str, Any]) -> None:
    """Remove what is left of a pod's machine whose supervisor died before it could."""
    async with resumed(around, spec):  # which takes the network apart in the end
        known = document.get("vm")
        if known:
            vm = store.vm_config(known)
            with translating():
                await around.hypervisor.destroy(vm, pid=known["pid"], start_time=known["start_time"])
    await asyncio.to_thread(remains.remove_tree, str(around.paths.vm))
    await asyncio.to_thread(remains.close_shared, around.paths)
    for complaint in await asyncio.to_thread(lent.give_back_all, around.paths):
        log.warning("%s", complaint)


def identity_of(spec: SandboxSpec, settings: Settings) -> pb.CreateSandboxRequest:
    """Who a guest is, but for its network and the time."""
    from vmsandbox_protocol import agent_pb2 as pb

    request = pb.CreateSandboxRequest(
        sandbox_id=spec.id,
        hostname=spec.hostname,
        entropy=os.urandom(64),
        machine_id=hashlib.sha256(spec.id.encode()).hexdigest()[:32],
        sysctls=GUEST_SYSCTLS | spec.sysctls,
        shared_pid_namespace="pid" in spec.share,
    )
    if "ipc" in spec.share:
        request.shm_bytes = spec.shm_bytes or settings.container.shm_size_mib << 20
    return request


async def _introduce(sandbox: Sandbox, *, timeout: float) -> pb.GuestDetails:
    """Wait for the agent and give the guest its identity, with a clock that is not older than the call."""
    request = identity_of(sandbox.spec, sandbox.around.settings)
    if not sandbox.network.is_plugged_into(sandbox.vm):
        plugging = sandbox.network.plug(sandbox.vm)
        if sandbox.vm.config.restore is None:
            # What is asked while the guest boots would tell it an old time.
            await together(plugging, sandbox.agent.details(timeout=timeout))
            timeout = RPC_TIMEOUT
        else:
            await plugging
    # A time that waits for the connection would be too old to be believed without another look at the clock.
    await sandbox.agent.reached(timeout=timeout)
    sandbox.network.describe(request)
    lead = clock.LEAD_NS if sandbox.vm.accel.accel == "tcg" else 0
    request.time_ns = time.time_ns() + lead
    details = await sandbox.agent.create_sandbox(request, timeout=timeout)
    await clock.settle(sandbox.agent, clock.after_setting(replies.moment(details.time_ns), lead=lead))
    return details
