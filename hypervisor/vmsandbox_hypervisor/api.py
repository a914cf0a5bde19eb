"""The library's vocabulary: immutable descriptions, and the protocol every hypervisor fulfils.

Nothing here knows pods, containers or agents.  A `VmConfig` describes a machine completely; `Hypervisor.running`
turns it into a `Vm` for the duration of an ``async with`` block; the QEMU driver and the shipped
`testing.FakeHypervisor` implement the same protocols and pass the same contract tests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Collection, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from vmsandbox_hypervisor.errors import ExitedError

Accel = Literal["auto", "kvm", "tcg"]


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """What is booted: an ELF vmlinux (PVH) or a bzImage, and its command line in order.

    `emulated_cmdline` follows where the processor turns out to be emulated.
    """

    path: Path
    initrd: Path | None = None
    cmdline: tuple[str, ...] = ()
    emulated_cmdline: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SharedMemory:
    """Guest memory of its own, mapped shared: virtio-fs and discards are possible.

    `fd` is a memfd that holds the memory (a template's copy); without it QEMU makes a fresh one.  It may still be being
    filled while QEMU starts: the template's state is restored when `filled` is done.

    A fork has its `common` pieces, begin and end of each in bytes, from its parent, page by page until it writes to
    them.  Nobody else may look for them in its memory: they must be what devices outside of QEMU never use.
    """

    fd: int | None = None
    filled: Awaitable[None] | None = field(default=None, compare=False)
    common: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class PrivateMemory:
    """Copy-on-write of a sealed memfd (a template's memory): no virtio-fs, no discard."""

    fd: int


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Base memory, and how far virtio-mem can grow it (0: no virtio-mem device), in MiB.

    `dimm_slots` pc-dimms can be attached beside that, together at most `dimm_mib`.  With `free_page_reporting` the
    guest's free pages go back to the host; not with private memory, whose template a discard would damage.
    """

    size_mib: int
    hotplug_mib: int = 0
    dimm_slots: int = 0
    dimm_mib: int = 0
    free_page_reporting: bool = False
    backing: SharedMemory | PrivateMemory = field(default_factory=SharedMemory)


@dataclass(frozen=True, kw_only=True)
class Cpus:
    """vCPUs present at boot and the most there can ever be."""

    boot: int = 1
    maximum: int = 1


@dataclass(frozen=True, kw_only=True)
class Disk:
    """A raw file or block device as virtio-blk.

    `id` is stable and unique in the VM; letters, digits, ``-``, ``.`` and ``_``.  Its first 20 characters are
    the serial number that the guest sees.
    """

    id: str
    path: Path
    read_only: bool = False


@dataclass(frozen=True, kw_only=True)
class Nic:
    """virtio-net on an open tap descriptor; with `vhost_fd`, of /dev/vhost-net, frames go past QEMU.

    With an `mtu` of 0 the guest is not told of any, and may set what it likes.
    """

    id: str
    tap_fd: int
    mac: str
    mtu: int = 1500
    vhost_fd: int | None = None


@dataclass(frozen=True, kw_only=True)
class Port:
    """A virtio-serial port; the host end is the unix socket `Vm.port_path(name)`."""

    name: str


@dataclass(frozen=True, kw_only=True)
class NinePShare:
    """A 9p export.

    QEMU takes exports only on its command line, so every share that may ever be attached is in
    `VmConfig.shares`.  Its device is there from the start if `plugged`, else `Vm.attach_9p` makes it.
    """

    tag: str
    path: Path
    read_only: bool = False
    plugged: bool = False


@dataclass(frozen=True, kw_only=True)
class VirtiofsShare:
    """A directory exported by a virtiofsd of its own."""

    tag: str
    path: Path
    cache: Literal["auto", "none", "always"] = "auto"


@dataclass(frozen=True, kw_only=True)
class Confinement:
    """The identity QEMU runs under; `None` in `VmConfig.confinement` keeps the caller's."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SecurityLabels:
    """What the host's security modules put on the machine's processes when they are executed; empty: nothing.

    A context of SELinux is QEMU's and virtiofsd's.  A profile of AppArmor is QEMU's alone: profiles for containers deny
    mounts, without which virtiofsd cannot lock itself up.
    """

    apparmor: str = ""
    selinux: str = ""


@dataclass(frozen=True, kw_only=True)
class Parent:
    """A machine that stands still, to be forked: see `Vm.stand`.

    `disks` are the files behind its disks, by id; `memory` is its memory, of which a fork that is to have memory mapped
    shared needs a copy.
    """

    pid: int
    start_time: int
    name: str
    directory: Path
    disks: Mapping[str, Path]
    memory: Path


@dataclass(frozen=True, kw_only=True)
class VmConfig:
    """One machine, completely.

    `directory` is private to the VM: its sockets and logs are made there, and it must exist, be short enough
    for unix sockets (under 80 bytes) and be removed by the caller.

    `disks` are there from the start and stay; `nics` are there from the start, in the first root ports, and can be
    detached as any other.  `restore` is the device state of a saved template: instead of
    booting, the VM goes on from there, with the template's memory as backing.  `vsock_cid` 0 takes any free
    context id (`Vm.vsock_cid` says which).

    With a `parent` the VM is a fork of that machine and goes on from where it stands; it has to be configured as that,
    but for `directory`, the identity, a name of the same length, and what is behind disks and cards; `restore` says
    what the parent came from.  Memory that is mapped shared has to be a copy of the parent's.
    """

    name: str
    directory: Path
    kernel: Kernel
    memory: Memory
    cpus: Cpus = field(default_factory=Cpus)
    disks: tuple[Disk, ...] = ()
    nics: tuple[Nic, ...] = ()
    ports: tuple[Port, ...] = ()
    shares: tuple[NinePShare, ...] = ()
    root_ports: int = 16
    accel: Accel = "auto"
    confinement: Confinement | None = None
    labels: SecurityLabels = field(default_factory=SecurityLabels)
    binary: Path = Path("/usr/bin/qemu-system-x86_64")
    virtiofsd: Path = Path("/usr/lib/qemu/virtiofsd")
    boot_timeout: float = 60.0
    vsock_cid: int | None = None
    restore: Path | None = None
    parent: Parent | None = None


@dataclass(frozen=True, kw_only=True)
class AccelChoice:
    """Which acceleration is used, and why, in one sentence."""

    accel: Literal["kvm", "tcg"]
    reason: str


@dataclass(frozen=True, kw_only=True)
class PciAddress:
    """Where the guest finds a device: slots from the root complex down, e.g. ``02.3/00.0`` (hex)."""

    pci_path: str


@dataclass(frozen=True, kw_only=True)
class CpuState:
    """vCPUs plugged (present to the guest) and the maximum.

    Under TCG vCPUs are never unplugged; after scaling down `surplus` says how many the guest has to take
    offline itself.
    """

    present: int
    maximum: int
    surplus: int = 0


@dataclass(frozen=True, kw_only=True)
class MemoryState:
    """Base plus hot-plugged memory as the guest has accepted it, in MiB."""

    base_mib: int
    plugged_mib: int
    requested_mib: int


@dataclass(frozen=True, kw_only=True)
class Event:
    """A QMP event: its name, its data, and when QEMU sent it (seconds since the epoch)."""

    name: str
    data: Mapping[str, object]
    time: float


class Vm(Protocol):
    """A running machine.  Obtain one from `Hypervisor.running` or `Hypervisor.adopted`."""

    config: VmConfig
    accel: AccelChoice
    pid: int
    #: field 22 of /proc/PID/stat: with `pid` it identifies the process for `Hypervisor.adopted`
    start_time: int
    vsock_cid: int | None
    #: seconds since exec, by phase: "spawned" or "forked", "monitor", with a template "restored", "running"
    phases: dict[str, float]

    def port_path(self, name: str) -> Path: ...
    def console(self) -> str:
        """What the guest printed last, at most 64 KiB; still there after the VM's end."""
        ...

    def evidence(self) -> str:
        """The phases, QEMU's last stderr and the last console lines, for an error's detail; never empty."""
        ...

    def ended(self) -> ExitedError | None:
        """Why the VM is gone although nobody asked for it; None while it runs or was ended on purpose."""
        ...

    def devices(self) -> Mapping[str, PciAddress]:
        """What is attached now: ``disk-ID``, ``nic-ID``, ``fs-TAG`` or ``ninep-TAG`` and where the guest has it."""
        ...

    def helper_pids(self) -> Mapping[str, int]:
        """The virtiofsd of each attached share, by tag."""
        ...

    def events(self) -> AsyncIterator[Event]: ...
    async def attach_disk(self, disk: Disk) -> PciAddress: ...
    async def replace_disk(self, disk: Disk) -> None:
        """Put another file behind a disk that is there from the start, while nothing in the guest has it open.

        What the guest knows of its size stays.  `DeviceError` if there is no such disk, or QEMU cannot.
        """
        ...

    async def detach_disk(self, disk_id: str, *, timeout: float = 10.0) -> None: ...
    async def attach_nic(self, nic: Nic) -> PciAddress: ...
    async def detach_nic(self, nic_id: str, *, timeout: float = 10.0) -> None: ...
    async def attach_virtiofs(self, share: VirtiofsShare) -> PciAddress: ...
    async def detach_virtiofs(self, tag: str, *, timeout: float = 10.0) -> None: ...
    async def attach_9p(self, share: NinePShare) -> PciAddress: ...
    async def detach_9p(self, tag: str, *, timeout: float = 10.0) -> None: ...
    async def attach_balloon(self) -> PciAddress:
        """Have the guest's free memory go back to the host; `DeviceError` unless memory is mapped shared."""
        ...

    async def set_cpus(self, count: int, *, timeout: float = 10.0) -> CpuState: ...
    async def cpus(self) -> CpuState: ...
    async def bind_cpus(self, host_cpus: Collection[int]) -> None:
        """Let the vCPUs that there are now run on these of the host's processors only; `DeviceError` if they cannot."""
        ...

    async def set_memory(self, total_mib: int, *, timeout: float = 10.0) -> MemoryState:
        """Grow to `total_mib` or raise `DeviceError`; or shrink as far as the guest gives back in time."""
        ...

    async def memory(self) -> MemoryState: ...
    async def attach_dimm(self, dimm_id: str, size_mib: int) -> None: ...
    async def detach_dimm(self, dimm_id: str, *, timeout: float = 10.0) -> None: ...
    async def pause(self) -> None: ...
    async def resume(self) -> None: ...
    async def status(self) -> str: ...
    async def power_off(self, *, timeout: float = 10.0) -> None: ...
    async def kill(self) -> None: ...
    async def wait(self) -> int | None:
        """Return when QEMU has ended, with its exit status (None if unknown, after an adoption)."""
        ...

    async def save_state(self, fd: int) -> None:
        """Stop the VM and write its device state, without memory, to `fd`; `MonitorError` if that fails."""
        ...

    async def stand(self, *, bound: bool = True) -> Parent:
        """Stop the VM for good, so that others can be forked from it, and have it end when this thread does.

        One that is not `bound` goes on: another process may take it (`forking.fork.bind`).

        Nobody may be connected to its monitor, console or ports when it is forked: release it, and leave its block.
        Raises `ForkError` where that is not possible.
        """
        ...

    def release(self) -> None:
        """Leave the VM running when the block is left: somebody else will adopt it."""


class Hypervisor(Protocol):
    """A driver that makes virtual machines."""

    def running(self, config: VmConfig) -> AbstractAsyncContextManager[Vm]: ...
    def adopted(self, config: VmConfig, *, pid: int, start_time: int) -> AbstractAsyncContextManager[Vm]: ...
    async def destroy(self, config: VmConfig, *, pid: int, start_time: int) -> None:
        """End a machine that nobody holds, whether or not it answers, with its helpers and files; it may be gone."""
        ...

    async def probe_accel(self, accel: Accel) -> AccelChoice: ...
    def argv(self, config: VmConfig) -> Sequence[str]:
        """The command line `running` would use, descriptors numbered as there; starts nothing."""
        ...
