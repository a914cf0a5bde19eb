"""Bring-up and take-down of a pod: one virtual machine, its agent, and what they have been given.

`opened` boots a new one, `adopted` takes over one whose supervisor died.  Either way the block holds the pod; leaving
it ends the machine and everything that belongs to it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging
import math
import os
import time
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from vmsandbox import lent, records
from vmsandbox.errors import ExhaustedError, SandboxError, TimedOutError, UnavailableError
from vmsandbox.guest import replies
from vmsandbox.guest.client import AgentClient
from vmsandbox.guestbuild.choice import chosen
from vmsandbox.guestbuild.cmdline import EMULATED
from vmsandbox.resources import identities, share
from vmsandbox.supervisor import clock, shares, slots, store, template
from vmsandbox.supervisor.network import Connection, connected, resumed
from vmsandbox.supervisor.translation import translated, translating
from vmsandbox_hypervisor.api import Confinement, Cpus, Disk, Kernel, Memory, Port, VmConfig
from vmsandbox_hypervisor.errors import HypervisorError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Coroutine
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from vmsandbox.config.model import Settings
    from vmsandbox.paths import Roots, SandboxPaths
    from vmsandbox_hypervisor.api import Accel, Hypervisor, Vm
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
#: seconds an RPC may take that only touches the guest's kernel
RPC_TIMEOUT = 30.0


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What every part of a supervisor needs to know of the world outside the pod."""

    roots: Roots
    paths: SandboxPaths
    settings: Settings
    hypervisor: Hypervisor
    #: what the settings were read from, if not the usual places
    config_file: str | None = None


@dataclass(frozen=True, kw_only=True)
class SandboxSpec:
    """What is asked of a pod.  An implicit one belongs to a single container and ends with it."""

    id: str
    name: str = ""
    implicit: bool = True
    hostname: str = ""
    accel: Accel | None = None
    #: its containers may share directories with the host, so its memory must be its own: known before the start
    shareable: bool = False
    #: how, if not as configured: "virtio-fs", "9p" or "none"
    shared_fs: str | None = None
    #: overrides the setting
    template: str = ""
    #: a document of `NetworkOptions`
    network: dict[str, Any] = field(default_factory=lambda: {"kind": "none"})
    #: what other pods know it by, beside hostname and id
    aliases: tuple[str, ...] = ()
    #: of the network, which all containers share
    sysctls: dict[str, str] = field(default_factory=dict)
    #: what its containers share beside the network: "ipc", "uts", "pid"
    share: tuple[str, ...] = ()
    #: size of a shared /dev/shm; 0: as configured for a container's own
    shm_bytes: int = 0
    #: of the host, where everything of the machine is; empty: wherever its supervisor is
    cgroups: tuple[str, ...] = ()
    #: files of what is in the machine's slots from the start: its first container's image, and an empty layer
    image: str = ""
    layer: str = ""
    layer_mib: int = 0
    #: a pod that was made on purpose has come up once: what fails later does not undo it
    established: bool = False
    created: float = field(default_factory=time.time)

    def document(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "name": self.name,
            "implicit": self.implicit,
            "hostname": self.hostname,
            "accel": self.accel,
            "shareable": self.shareable,
            "shared_fs": self.shared_fs,
            "template": self.template,
            "network": self.network,
            "aliases": [*self.aliases],
            "sysctls": self.sysctls,
            "share": [*self.share],
            "shm_bytes": self.shm_bytes,
            "cgroups": [*self.cgroups],
            "image": self.image,
            "layer": self.layer,
            "layer_mib": self.layer_mib,
            "established": self.established,
            "created": self.created,
        }

    @classmethod
    def of(cls, document: dict[str, Any]) -> SandboxSpec:
        """Read one back; what an older version did not know has its default."""
        if not isinstance(document.get("id"), str):
            raise records.DamagedDocumentError("the pod's document has no id; 'vmsandbox gc' removes it")
        values = {field.name: document[field.name] for field in fields(cls) if field.name in document}
        for name in ("aliases", "share", "cgroups"):
            values[name] = tuple(values.get(name) or ())
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What one container asks of the machine; 0 is "no limit of its own"."""

    cpus: float = 0.0
    memory_mib: int = 0
    #: of the host's processors, those that the vCPUs may run on; empty: any
    host_cpus: frozenset[int] = frozenset()


class Sandbox:
    """The running pod.  Obtain one from `opened` or `adopted`; there is no half-built sandbox."""

    def __init__(
        self, around: Surroundings, spec: SandboxSpec, vm: Vm, agent: AgentClient, network: Connection
    ) -> None:
        self.around = around
        self.spec = spec
        self.vm = vm
        self.agent = agent
        self.network = network
        self.details: pb.GuestDetails | None = None
        #: nobody needs the pod any more
        self.ended = asyncio.Event()
        self.phases: dict[str, float] = {}
        #: of the template this pod is, or could have been, a clone of
        self.template_key = ""
        self._demands: dict[str, Demand] = {}
        self._sizing = asyncio.Lock()
        #: vCPUs the guest was last told to use; None after a take-over, which does not know
        self.cpus_online: int | None = None
        #: the host's processors that the vCPUs were last bound to; empty: any
        self._bound: frozenset[int] = frozenset()
        #: shared disks (images): id -> (pci path, users)
        self._shared_disks: dict[str, tuple[str, set[str]]] = {}
        self._disks_lock = asyncio.Lock()
        self.shares = shares.Shares(vm, around.paths.shared_dir)

    def document(self, status: str) -> dict[str, Any]:
        return {
            **self.spec.document(),
            "status": status,
            "supervisor": {"pid": os.getpid()},
            "accel_used": {"accel": self.vm.accel.accel, "reason": self.vm.accel.reason},
            "kernel": self.details.kernel_release if self.details else "",
            "boot": "template" if self.vm.config.restore else "cold",
            "phases": {key: round(value, 4) for key, value in self.phases.items()},
            "vm": store.vm_document(self.vm.config, pid=self.vm.pid, start_time=self.vm.start_time),
        }

    def save(self, status: str) -> None:
        store.save_sandbox(self.around.paths, self.document(status))

    async def watch_vm(self) -> None:
        """Turn the VM's death, which nobody asked for, into an error for everybody."""
        status = await self.vm.wait()
        error = self.vm.ended()
        if error is not None:
            raise translated(error) from error
        raise UnavailableError(f"the virtual machine ended (QEMU's exit status {status})", detail=self.vm.evidence())

    # ------------------------------------------------------------ size

    async def give(self, container_id: str, demand: Demand) -> None:
        """Make the machine large enough for one more container, or for another demand of a known one."""
        before = self._demands.get(container_id)
        self._demands[container_id] = demand
        try:
            await self._resize()
        except BaseException:
            if before is None:
                del self._demands[container_id]
            else:
                self._demands[container_id] = before
            raise

    async def take_back(self, container_id: str) -> None:
        """Shrink after a container went; what the guest does not give back stays counted as the VM's."""
        if self._demands.pop(container_id, None) is None:
            return
        try:
            await self._resize()
        except SandboxError as error:
            log.warning("the machine could not be shrunk: %s", error)

    def wanted_cpus(self) -> int:
        settings = self.around.settings.sandbox
        total = sum(demand.cpus or settings.base_cpus for demand in self._demands.values())
        return min(max(settings.base_cpus, math.ceil(total)), settings.cpu_ceiling())

    def wanted_memory_mib(self) -> int:
        settings = self.around.settings.sandbox
        total = settings.base_memory_mib + sum(
            demand.memory_mib or settings.default_container_memory_mib for demand in self._demands.values()
        )
        return total + total % 2

    def wanted_host_cpus(self) -> frozenset[int]:
        """All that any container names: what runs in the machine cannot be told apart from outside."""
        return frozenset().union(*(demand.host_cpus for demand in self._demands.values()))

    async def _bind(self, *, anew: bool) -> None:
        """Bind the vCPUs to the processors that are wanted; `anew` says that there may be others than before."""
        wanted = self.wanted_host_cpus()
        if wanted != self._bound or (anew and wanted):
            await self.vm.bind_cpus(wanted or os.sched_getaffinity(0))
            self._bound = wanted

    async def _resize(self) -> None:
        async with self._sizing:
            memory, cpus = self.wanted_memory_mib(), self.wanted_cpus()
            ceiling = self.around.settings.sandbox.memory_ceiling_mib()
            if memory > ceiling:
                raise ExhaustedError(
                    f"the pod would need {memory} MiB of memory and can have {ceiling}: "
                    "lower '--memory' or raise 'sandbox.max_memory_mib'"
                )
            with translating():
                state = await self.vm.memory()
                if state.base_mib + state.requested_mib != memory:
                    await self.vm.set_memory(max(memory, state.base_mib))
                # Under TCG vCPUs are taken offline instead of out, so what is present says too little.
                changing = cpus != self.cpus_online
                if changing:
                    plugged = await self.vm.set_cpus(cpus)
                    await self.agent.online_cpus(plugged.present - plugged.surplus, timeout=RPC_TIMEOUT)
                    self.cpus_online = cpus
                await self._bind(anew=changing)

    # ------------------------------------------------------------ disks

    async def attach_disk(self, disk_id: str, path: Path, *, read_only: bool) -> str:
        """Hot-plug a disk of one container and return its address in the guest."""
        with translating():
            return (await self.vm.attach_disk(Disk(id=disk_id, path=path, read_only=read_only))).pci_path

    async def detach_disk(self, disk_id: str) -> None:
        with translating():
            await self.vm.detach_disk(disk_id)

    async def share_disk(self, disk_id: str, path: Path, *, user: str, read_only: bool = True) -> str:
        """Hot-plug a disk once for all containers that use it."""
        async with self._disks_lock:
            known = self._shared_disks.get(disk_id)
            if known is None:
                known = (await self.attach_disk(disk_id, path, read_only=read_only), set())
                self._shared_disks[disk_id] = known
            known[1].add(user)
            return known[0]

    async def unshare_disk(self, disk_id: str, *, user: str) -> None:
        """Unplug a shared disk with its last user."""
        async with self._disks_lock:
            known = self._shared_disks.get(disk_id)
            if known is None:
                return
            known[1].discard(user)
            if not known[1]:
                del self._shared_disks[disk_id]
                await self.detach_disk(disk_id)

    def remember_demand(self, container_id: str, demand: Demand) -> None:
        """Count a container that an earlier supervisor gave its share."""
        self._demands[container_id] = demand
        self._bound = self.wanted_host_cpus()

    def remember_shared_disk(self, disk_id: str, pci_path: str, *, user: str) -> None:
        """Take a shared disk over from the supervisor before this one."""
        self._shared_disks.setdefault(disk_id, (pci_path, set()))[1].add(user)


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
        kernel=Kernel(path=guest.kernel, initrd=guest.initrd, cmdline=guest.cmdline, emulated_cmdline=EMULATED),
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
        binary=_path(settings.hypervisor.binary),
        virtiofsd=_path(settings.hypervisor.virtiofsd),
        boot_timeout=settings.hypervisor.boot_timeout,
    )
    return slots.reserved(config) if spec.implicit else config


def agent_of(vm: Vm, directory: Path) -> AbstractAsyncContextManager[AgentClient]:
    """Reach a machine's agent; a pod of an earlier version has no port for bulk stdio."""
    has_bulk = any(port.name == BULK_PORT for port in vm.config.ports)
    bulk_path = vm.port_path(BULK_PORT) if has_bulk else None
    return AgentClient.connected(vm.port_path(AGENT_PORT), directory=directory, bulk_path=bulk_path)


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
async def opened(around: Surroundings, spec: SandboxSpec) -> AsyncIterator[Sandbox]:
    """Bring a pod's machine up, as a clone of its template where there is one, and hold it for the block.

    Raises a `SandboxError` that names the phase the boot reached, with console and QEMU's stderr as detail.
    """
    around.paths.vm.mkdir(mode=0o711, exist_ok=True)
    config = vm_config_for(around, spec)
    mode = spec.template or around.settings.sandbox.template
    if config.shares:
        # QEMU opens it at its start: what is mounted on it later would stay hidden.
        await asyncio.to_thread(share.open_directory, around.paths.shared_dir)
    async with connected(around, spec) as network, AsyncExitStack() as stack:
        config = await stack.enter_async_context(confined(around, spec, config))
        # A 9p export is part of the command line and the pod's own: no two pods are alike.
        origin = template.clone_of(around, config, shareable=spec.shareable, mode="off" if config.shares else mode)
        clone, key = await stack.enter_async_context(origin)
        sandbox = None
        if clone is not None:
            sandbox = await _cloned(around, spec, clone, network, stack, required=mode == "require")
        if sandbox is None:
            config = await asyncio.to_thread(slots.for_boot, config, spec, cache=around.roots.data / "cache")
            sandbox = await _booted(around, spec, config, network, stack)
        sandbox.template_key = key
        network.settle()
        yield sandbox


async def _cloned(
    around: Surroundings,
    spec: SandboxSpec,
    config: VmConfig,
    network: Connection,
    stack: AsyncExitStack,
    *,
    required: bool,
) -> Sandbox | None:
    """A pod out of a template; None, and a line in the log, where that fails and is not required."""
    try:
        async with AsyncExitStack() as attempt:
            if slots.has(config):
                assert config.restore is not None
                layer = config.restore.with_name(template.LAYER)
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
        log.warning("the template's clone failed, the pod boots cold: %s", error)
        return None


async def _booted(
    around: Surroundings, spec: SandboxSpec, config: VmConfig, network: Connection, stack: AsyncExitStack
) -> Sandbox:
    began = time.monotonic()
    # While QEMU starts.
    loading = asyncio.get_running_loop().run_in_executor(None, AgentClient.load)
    with translating():
        vm = await stack.enter_async_context(around.hypervisor.running(config))
        await loading
        agent = await stack.enter_async_context(agent_of(vm, around.paths.vm))
        sandbox = Sandbox(around, spec, vm, agent, network)
        sandbox.cpus_online = config.cpus.boot
        sandbox.phases["vm"] = time.monotonic() - began
        # Written before the agent answers, so that a pod whose supervisor dies now can still be found.
        sandbox.save("creating")
        sandbox.details = await _unless_vm_ends(sandbox, _introduce(sandbox, timeout=config.boot_timeout))
        sandbox.phases["agent"] = time.monotonic() - began
        if network.seconds:
            sandbox.phases["network"] = network.seconds
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
            sandbox.details = await _unless_vm_ends(sandbox, agent.details(timeout=config.boot_timeout))
            sandbox.save("ready")
            yield sandbox


async def swept(around: Surroundings, spec: SandboxSpec, document: dict[str, Any]) -> None:
    """Remove what is left of a pod's machine whose supervisor died before it could."""
    async with resumed(around, spec):  # which takes the network apart in the end
        known = document.get("vm")
        if known:
            vm = store.vm_config(known)
            with translating():
                await around.hypervisor.destroy(vm, pid=known["pid"], start_time=known["start_time"])
    await asyncio.to_thread(records.remove_tree, str(around.paths.vm))
    await asyncio.to_thread(records.close_shared, around.paths)
    for complaint in await asyncio.to_thread(lent.give_back_all, around.paths):
        log.warning("%s", complaint)


async def _introduce(sandbox: Sandbox, *, timeout: float) -> pb.GuestDetails:
    """Wait for the agent and give the guest its identity, with a clock that is not older than the call."""
    from vmsandbox_protocol import agent_pb2 as pb

    spec = sandbox.spec
    request = pb.CreateSandboxRequest(
        sandbox_id=spec.id,
        hostname=spec.hostname,
        entropy=os.urandom(64),
        machine_id=hashlib.sha256(spec.id.encode()).hexdigest()[:32],
        sysctls=GUEST_SYSCTLS | spec.sysctls,
        shared_pid_namespace="pid" in spec.share,
    )
    if "ipc" in spec.share:
        request.shm_bytes = spec.shm_bytes or sandbox.around.settings.container.shm_size_mib << 20
    plugging = sandbox.network.plug(sandbox.vm, request)
    if sandbox.vm.config.restore is None:
        # What is asked while the guest boots would tell it an old time.
        await together(plugging, sandbox.agent.details(timeout=timeout))
        timeout = RPC_TIMEOUT
    else:
        await plugging
    request.time_ns = time.time_ns()
    details = await sandbox.agent.create_sandbox(request, timeout=timeout)
    await clock.settle(sandbox.agent, clock.after_setting(replies.moment(details.time_ns)))
    return details


async def together(*work: Coroutine[Any, Any, object]) -> None:
    """Do things at the same time; the first error ends the others."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _unless_vm_ends(sandbox: Sandbox, call: Awaitable[pb.GuestDetails]) -> pb.GuestDetails:
    """Await the agent's first answer, or the VM's death, whichever comes first."""
    answering = asyncio.ensure_future(call)
    dying = asyncio.create_task(sandbox.watch_vm(), name="watch-vm during boot")
    try:
        await asyncio.wait({answering, dying}, return_when=asyncio.FIRST_COMPLETED)
        if dying.done():
            await dying
        return await answering
    except TimedOutError as error:
        raise TimedOutError(
            f"the guest's agent did not answer within {sandbox.vm.config.boot_timeout:g} s; "
            "'--debug' shows the console, 'hypervisor.boot_timeout' sets the limit",
            detail=sandbox.vm.evidence(),
        ) from error
    finally:
        for task in (answering, dying):
            task.cancel()
        await asyncio.gather(answering, dying, return_exceptions=True)


__all__ = [
    "Demand",
    "HypervisorError",
    "Sandbox",
    "SandboxSpec",
    "Surroundings",
    "adopted",
    "opened",
    "swept",
    "vm_config_for",
]
