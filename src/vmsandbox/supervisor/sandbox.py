"""A pod: one virtual machine, its agent, and what they have been given; and what is asked of it.

`bringup` makes one; there is no half-built sandbox.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from vmsandbox import documents
from vmsandbox.errors import ExhaustedError, SandboxError
from vmsandbox.supervisor import answering, leaving, shares, store
from vmsandbox.supervisor.translation import translating
from vmsandbox_hypervisor.api import Disk, PrivateMemory

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from vmsandbox.config.model import SandboxSettings, Settings
    from vmsandbox.guest.client import AgentClient
    from vmsandbox.paths import Roots, SandboxPaths
    from vmsandbox.supervisor.network import Connection
    from vmsandbox_hypervisor.api import Accel, Hypervisor, Vm, VmConfig
    from vmsandbox_protocol import agent_pb2 as pb

log = logging.getLogger(__name__)

#: the device by which free memory goes back to the host
BALLOON = "balloon"
RETURN_AFTER = 3.0
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
    #: of the host's security modules, which the machine's processes are executed under; empty: the supervisor's own
    apparmor: str = ""
    selinux: str = ""
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
            "apparmor": self.apparmor,
            "selinux": self.selinux,
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
            raise documents.DamagedDocumentError("the pod's document has no id; 'vmsandbox gc' removes it")
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


def memory_of(settings: SandboxSettings, demands: Iterable[Demand]) -> int:
    """The MiB of a machine with containers that ask for this."""
    total = settings.base_memory_mib + sum(
        demand.memory_mib or settings.default_container_memory_mib for demand in demands
    )
    return total + total % 2


def _boot_of(config: VmConfig) -> str:
    """How a new machine comes up."""
    if config.parent is not None:
        return "fork"
    return "cold" if config.restore is None else "template"


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
        #: how the machine came up, where an earlier supervisor knew that
        self.boot: str | None = None
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
            "boot": self.boot or _boot_of(self.vm.config),
            "phases": {key: round(value, 4) for key, value in self.phases.items()},
            "vm": store.vm_document(self.vm.config, pid=self.vm.pid, start_time=self.vm.start_time),
        }

    def save(self, status: str) -> None:
        store.save_sandbox(self.around.paths, self.document(status))

    def note(self, status: str) -> None:
        """As `save`, where a disk that takes no more is no reason to give the machine up."""
        try:
            self.save(status)
        except OSError as error:
            log.warning("the pod's document is out of date: %s", error)

    async def watch_vm(self) -> None:
        """Turn the VM's death, which nobody asked for, into an error for everybody."""
        await answering.death(self.vm)

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
        return memory_of(self.around.settings.sandbox, self._demands.values())

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
                    await self.vm.set_memory(max(memory, state.base_mib), timeout=RPC_TIMEOUT)
                # Under TCG vCPUs are taken offline instead of out, so what is present says too little.
                changing = cpus != self.cpus_online
                if changing:
                    plugged = await self.vm.set_cpus(cpus, timeout=RPC_TIMEOUT)
                    await self.agent.online_cpus(plugged.present - plugged.surplus, timeout=RPC_TIMEOUT)
                    self.cpus_online = cpus
                await self._bind(anew=changing)

    async def return_memory(self) -> None:
        """Have what the guest frees go back to the host from some seconds after its start on, where that is possible.

        Memory that clones have in common cannot: a page less for one would be one less for all.
        """
        if isinstance(self.vm.config.memory.backing, PrivateMemory) or BALLOON in self.vm.devices():
            return
        await asyncio.sleep(RETURN_AFTER)  # not beside the start of its first container
        try:
            with translating():
                await self.vm.attach_balloon()
        except SandboxError as error:
            log.info("what the guest frees stays with it: %s", error)

    # ------------------------------------------------------------ disks

    async def attach_disk(self, disk_id: str, path: Path, *, read_only: bool) -> str:
        """Hot-plug a disk that the machine has not, and return its address in the guest."""
        await leaving.gone(self.vm, f"disk-{disk_id}", lambda: self.vm.detach_disk(disk_id))
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
