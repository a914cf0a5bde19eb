"""Every setting there is, as frozen dataclasses.

Plain dataclasses on purpose: a validated configuration is read back from a cache without importing pydantic
(`load.py`), and code that uses settings needs nothing but this module.  Constraints are carried by markers that
pydantic asks for a schema, so this module does not import it either.

`configs/default.toml` shows each of these settings with its default; a test keeps the two the same.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

#: QEMU starts measurably slower with more possible vCPUs than this
MOST_CPUS = 32


@dataclass(frozen=True)
class Between:
    """A number's inclusive bounds."""

    low: float
    high: float

    def __get_pydantic_core_schema__(self, source: object, handler: Any) -> Any:  # noqa: ANN401
        return {**handler(source), "ge": self.low, "le": self.high}


@dataclass(frozen=True)
class Matching:
    """A pattern the whole text has to match."""

    pattern: str

    def __get_pydantic_core_schema__(self, source: object, handler: Any) -> Any:  # noqa: ANN401
        return {**handler(source), "pattern": self.pattern}


AbsolutePath = Annotated[str, Matching("^/[^\\x00]*$")]

#: unknown settings and values of another type are errors
STRICT = {"extra": "forbid", "strict": True}


@dataclass(frozen=True, kw_only=True)
class HypervisorSettings:
    """How virtual machines are run."""

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    #: `auto` takes KVM where it is proved to work
    accel: Literal["auto", "kvm", "tcg"] = "auto"
    binary: AbsolutePath = "/usr/bin/qemu-system-x86_64"
    virtiofsd: AbsolutePath = "/usr/lib/qemu/virtiofsd"
    #: how many devices can be hot-plugged at one time
    root_ports: Annotated[int, Between(4, 30)] = 16
    #: the same for a pod that `vmsandbox pod create` makes, for all of its containers
    pod_root_ports: Annotated[int, Between(4, 64)] = 48
    #: seconds until the agent has to answer
    boot_timeout: Annotated[float, Between(1, 3600)] = 60.0
    #: QEMU gets a uid of its own and a seccomp filter
    confine: bool = True
    #: the uids (and gids) QEMU processes get, one per pod
    uid_base: Annotated[int, Between(1, 2**31)] = 1_900_000_000
    uid_count: Annotated[int, Between(2, 1_000_000)] = 4096


@dataclass(frozen=True, kw_only=True)
class SandboxSettings:
    """What a pod gets."""

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    #: vCPUs of a pod whose containers have no CPU limit
    base_cpus: Annotated[int, Between(1, MOST_CPUS)] = 1
    #: vCPUs a pod can grow to; 0: as many as the host has
    max_cpus: Annotated[int, Between(0, MOST_CPUS)] = 0
    #: memory for the guest's kernel and agent
    base_memory_mib: Annotated[int, Between(96, 1024 * 1024)] = 256
    #: memory the guest gets for each container that has no limit of its own
    default_container_memory_mib: Annotated[int, Between(16, 1024 * 1024)] = 512
    #: memory a pod can grow to; 0: as much as the host has
    max_memory_mib: Annotated[int, Between(0, 16 * 1024 * 1024)] = 0
    shared_fs: Literal["virtio-fs", "9p", "none"] = "virtio-fs"
    #: share root file systems that engines mounted from disks, instead of plugging the disks
    disable_block_device_use: bool = False
    template: Literal["auto", "require", "off"] = "auto"
    #: keep a machine that pods are forked from, while they keep coming
    forks: bool = True
    #: machines that are kept ready for whoever asks next
    spares: Annotated[int, Between(0, 64)] = 0
    #: seconds between the stop signal and SIGKILL
    grace_seconds: Annotated[float, Between(0, 86400)] = 10.0

    def __post_init__(self) -> None:
        if self.max_cpus and self.base_cpus > self.max_cpus:
            raise ValueError(f"base_cpus '{self.base_cpus}' is more than max_cpus '{self.max_cpus}'")
        if self.max_memory_mib and self.base_memory_mib > self.max_memory_mib:
            raise ValueError(
                f"base_memory_mib '{self.base_memory_mib}' is more than max_memory_mib '{self.max_memory_mib}'"
            )

    def cpu_ceiling(self) -> int:
        """The most vCPUs a pod can have on this host, at least the base."""
        host = len(os.sched_getaffinity(0))
        return max(self.base_cpus, min(self.max_cpus or host, host, MOST_CPUS))

    def memory_ceiling_mib(self) -> int:
        """The most memory a pod can have on this host in MiB, at least the base."""
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (1024 * 1024)
        return max(self.base_memory_mib, min(self.max_memory_mib or host, host))


@dataclass(frozen=True, kw_only=True)
class GuestSettings:
    """What is booted."""

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    #: a kernel that `vmsandbox guest build` made, or the path of any other
    kernel: Annotated[str, Matching("^(packaged|tuned|/[^\\x00]+)$")] = "packaged"
    #: path of a guest image; empty: the one that `vmsandbox guest build` made
    image: Annotated[str, Matching("^(/[^\\x00]+)?$")] = ""


@dataclass(frozen=True, kw_only=True)
class ContainerSettings:
    """What a container gets when its options do not say otherwise."""

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    #: size of the sparse disk that takes a container's writes
    scratch_size_mib: Annotated[int, Between(16, 16 * 1024 * 1024)] = 10240
    #: processes; 0: no limit
    pids_limit: Annotated[int, Between(0, 4_194_304)] = 2048
    shm_size_mib: Annotated[int, Between(1, 1024 * 1024)] = 64
    #: `default`, `unconfined`, or the path of a profile in docker's format
    seccomp: Annotated[str, Matching("^(default|unconfined|/[^\\x00]+)$")] = "default"
    no_new_privileges: bool = False
    #: a log file is rotated at this size
    log_max_size_mib: Annotated[int, Between(1, 1024 * 1024)] = 16
    #: files kept for each container, the current one included
    log_max_files: Annotated[int, Between(1, 100)] = 3


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """The networks of pods."""

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    #: of a pod for which none is named
    default: Literal["default", "none"] = "default"
    #: IPv4 addresses of the default network; empty: a private range that the host does not use
    subnet: Annotated[str, Matching(r"^([0-9.]+/[0-9]+)?$")] = ""
    #: the default network has IPv6 addresses too
    ipv6: bool = False
    #: directories of CNI plugins, separated by colons
    plugins: Annotated[str, Matching("^/[^\\x00:]*(:/[^\\x00:]*)*$")] = "/usr/lib/cni:/opt/cni/bin"
    #: pods can only send with their own addresses
    source_check: bool = True
    #: name servers for pods, separated by blanks, where the host's cannot be reached from outside of it
    dns_fallback: Annotated[str, Matching("^[0-9a-fA-F:. ]*$")] = "1.1.1.1 8.8.8.8"


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """Bounds of what an image may contain, against hostile archives."""

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    max_entries: Annotated[int, Between(1, 100_000_000)] = 1_000_000
    #: unpacked
    max_size_mib: Annotated[int, Between(1, 16 * 1024 * 1024)] = 65536


@dataclass(frozen=True, kw_only=True)
class LogSettings:
    """What the supervisor writes to its log."""

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    level: Literal["debug", "info", "warning", "error"] = "info"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The whole configuration; obtain one from `load.load`."""

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    hypervisor: HypervisorSettings = field(default_factory=HypervisorSettings)
    sandbox: SandboxSettings = field(default_factory=SandboxSettings)
    guest: GuestSettings = field(default_factory=GuestSettings)
    container: ContainerSettings = field(default_factory=ContainerSettings)
    network: NetworkSettings = field(default_factory=NetworkSettings)
    image: ImageSettings = field(default_factory=ImageSettings)
    log: LogSettings = field(default_factory=LogSettings)


#: section name -> its class
SECTIONS: dict[str, type] = {
    "hypervisor": HypervisorSettings,
    "sandbox": SandboxSettings,
    "guest": GuestSettings,
    "container": ContainerSettings,
    "network": NetworkSettings,
    "image": ImageSettings,
    "log": LogSettings,
}
