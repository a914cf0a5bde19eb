"""The ``linux`` section of config.json: namespaces, devices, resources, seccomp and the rest."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from vmsandbox.oci.document import (
    MOST_ENTRIES,
    AbsolutePath,
    Int64,
    Many,
    Part,
    Text,
    TextMap,
    Texts,
    UInt16,
    UInt32,
    UInt64,
    unique,
)

#: that the kernel can number
MOST_PIDS = 2**22
#: those of which the guest's crun knows the system calls
SECCOMP_ARCHITECTURES = frozenset(
    f"SCMP_ARCH_{name}"
    for name in [
        *("X86", "X86_64", "X32", "ARM", "AARCH64", "MIPS", "MIPS64", "MIPS64N32", "MIPSEL", "MIPSEL64", "MIPSEL64N32"),
        *("PPC", "PPC64", "PPC64LE", "S390", "S390X", "PARISC", "PARISC64", "RISCV64"),
    ]
)
#: the highest number of an error that a filter can make a system call fail with
MOST_ERRNO = 4094


class IdMapping(Part):
    """A range of ids of a user namespace."""

    container_id: Annotated[UInt32, Field(alias="containerID")]
    host_id: Annotated[UInt32, Field(alias="hostID")]
    size: Annotated[UInt32, Field(ge=1)]


class Namespace(Part):
    """A namespace to make, or with a path to join."""

    type: Literal["pid", "network", "mount", "ipc", "uts", "user", "cgroup", "time"]
    path: Text = ""


class Device(Part):
    """A device node to make."""

    type: Literal["c", "b", "u", "p"]
    path: AbsolutePath
    major: Int64 | None = None
    minor: Int64 | None = None
    #: engines put the type in as well
    file_mode: Annotated[int, Field(ge=0, le=0o177777)] | None = None
    uid: UInt32 | None = None
    gid: UInt32 | None = None

    @model_validator(mode="after")
    def _has_numbers(self) -> Self:
        if self.type != "p" and (self.major is None or self.minor is None):
            raise ValueError(f"device '{self.path}' has no major or minor number")
        return self


class DeviceRule(Part):
    """An entry of the device cgroup's list; absent numbers stand for all."""

    allow: bool
    type: Literal["a", "c", "b", ""] = ""
    major: Int64 | None = None
    minor: Int64 | None = None
    access: Annotated[str, Field(pattern="^[rwm]{0,3}$")] = ""


class Memory(Part):
    """In bytes; -1 is no limit."""

    limit: Int64 | None = None
    reservation: Int64 | None = None
    swap: Int64 | None = None
    kernel: Int64 | None = None
    kernel_tcp: Annotated[Int64 | None, Field(alias="kernelTCP")] = None
    swappiness: UInt64 | None = None
    disable_oom_killer: Annotated[bool, Field(alias="disableOOMKiller")] = False
    use_hierarchy: bool = False
    check_before_update: bool = False

    @model_validator(mode="after")
    def _swap_has_room_for_memory(self) -> Self:
        if (self.swap or 0) > 0 and self.swap is not None and (self.limit or 0) > self.swap:
            raise ValueError(f"'swap' is {self.swap}, below 'limit', which is {self.limit}: it is both together")
        return self


class Cpu(Part):
    """Times are in microseconds."""

    shares: UInt64 | None = None
    quota: Int64 | None = None
    burst: UInt64 | None = None
    period: UInt64 | None = None
    realtime_runtime: Int64 | None = None
    realtime_period: UInt64 | None = None
    cpus: Annotated[str, Field(max_length=65_536, pattern=r"^[0-9,\- ]*$")] = ""
    mems: Annotated[str, Field(max_length=65_536, pattern=r"^[0-9,\- ]*$")] = ""
    idle: Annotated[int, Field(ge=0, le=1)] | None = None

    @model_validator(mode="after")
    def _is_what_the_kernel_takes(self) -> Self:
        """Of cgroup v2; 0 is nothing, and a negative quota none."""
        for name, low, high in (("shares", 2, 262_144), ("period", 1000, 1_000_000), ("quota", 1000, None)):
            value = getattr(self, name) or 0
            if value > 0 and (value < low or (high is not None and value > high)):
                raise ValueError(f"'{name}' is {value}: {low} is the least{f', {high} the most' if high else ''}")
        if (self.quota or 0) > 0 and (self.burst or 0) > (self.quota or 0):
            raise ValueError(f"'burst' is {self.burst}, above 'quota', which is {self.quota}")
        return self


class Pids(Part):
    """-1 or 0 is no limit."""

    limit: Annotated[int, Field(ge=-(2**63), le=MOST_PIDS)]


class WeightDevice(Part):
    """Weight of one block device."""

    major: Int64
    minor: Int64
    weight: UInt16 | None = None
    leaf_weight: UInt16 | None = None


class ThrottleDevice(Part):
    """Rate of one block device, in bytes or operations a second."""

    major: Int64
    minor: Int64
    rate: UInt64


WeightDevices = Many[WeightDevice]
ThrottleDevices = Many[ThrottleDevice]


class BlockIo(Part):
    """Weights and rates of block devices."""

    weight: UInt16 | None = None
    leaf_weight: UInt16 | None = None
    weight_device: WeightDevices = ()
    throttle_read_bps_device: ThrottleDevices = ()
    throttle_write_bps_device: ThrottleDevices = ()
    throttle_read_iops_device: Annotated[ThrottleDevices, Field(alias="throttleReadIOPSDevice")] = ()
    throttle_write_iops_device: Annotated[ThrottleDevices, Field(alias="throttleWriteIOPSDevice")] = ()


class HugepageLimit(Part):
    """In bytes, for pages of a size like ``2MB``."""

    page_size: Annotated[str, Field(pattern="^[1-9][0-9]{0,9}[KMG]B$")]
    limit: UInt64


class InterfacePriority(Part):
    """Priority of traffic by interface."""

    name: Text
    priority: UInt32


class NetworkResources(Part):
    """Of cgroup v1."""

    class_id: Annotated[UInt32 | None, Field(alias="classID")] = None
    priorities: Many[InterfacePriority] = ()


class Rdma(Part):
    """Limits of one RDMA device."""

    hca_handles: UInt32 | None = None
    hca_objects: UInt32 | None = None


class Resources(Part):
    """Limits enforced by cgroups; also the document of an update."""

    devices: Many[DeviceRule] = ()
    memory: Memory | None = None
    cpu: Cpu | None = None
    pids: Pids | None = None
    block_io: Annotated[BlockIo | None, Field(alias="blockIO")] = None
    hugepage_limits: Many[HugepageLimit] = ()
    network: NetworkResources | None = None
    rdma: dict[Text, Rdma] = Field(default_factory=dict, max_length=MOST_ENTRIES)
    unified: TextMap = Field(default_factory=dict)


class SeccompArgument(Part):
    """A condition on one argument of a system call."""

    index: Annotated[int, Field(ge=0, le=5)]
    value: UInt64
    value_two: UInt64 = 0
    op: Annotated[str, Field(pattern="^SCMP_CMP_(NE|LT|LE|EQ|GE|GT|MASKED_EQ)$")]


SeccompAction = Annotated[
    str, Field(pattern="^SCMP_ACT_(KILL|KILL_PROCESS|KILL_THREAD|TRAP|ERRNO|TRACE|ALLOW|LOG|NOTIFY)$")
]

SeccompFlag = Literal[
    "SECCOMP_FILTER_FLAG_TSYNC",
    "SECCOMP_FILTER_FLAG_LOG",
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
]


def _check_errno(name: str, action: str, value: int | None) -> None:
    if action == "SCMP_ACT_ERRNO" and (value or 0) > MOST_ERRNO:
        raise ValueError(f"'{name}' is {value}: {MOST_ERRNO} is the most")


class SeccompRule(Part):
    """What happens at some system calls, if all the conditions hold."""

    names: Annotated[Many[Text], Field(min_length=1)]
    action: SeccompAction
    errno_ret: UInt32 | None = None
    args: Many[SeccompArgument] = ()

    @model_validator(mode="after")
    def _errno_is_one(self) -> Self:
        _check_errno("errnoRet", self.action, self.errno_ret)
        return self


class Seccomp(Part):
    """A filter of system calls."""

    default_action: SeccompAction
    default_errno_ret: UInt32 | None = None
    architectures: Many[Annotated[str, Field(pattern="^SCMP_ARCH_[A-Z0-9_]{1,32}$")]] = ()
    flags: Many[SeccompFlag] = ()
    listener_path: Text = ""
    listener_metadata: Text = ""
    syscalls: Many[SeccompRule] = ()

    @model_validator(mode="after")
    def _can_be_applied(self) -> Self:
        _check_errno("defaultErrnoRet", self.default_action, self.default_errno_ret)
        unknown = [name for name in self.architectures if name not in SECCOMP_ARCHITECTURES]
        if unknown:
            raise ValueError(f"'architectures' has '{unknown[0]}', which is unknown")
        return self

    @model_validator(mode="after")
    def _is_listened_to(self) -> Self:
        if self.listener_path:
            return self
        actions = {self.default_action, *(rule.action for rule in self.syscalls)}
        needing = {
            "SCMP_ACT_NOTIFY": "SCMP_ACT_NOTIFY" in actions,
            "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV": "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV" in self.flags,
            "listenerMetadata": bool(self.listener_metadata),
        }
        for name, used in needing.items():
            if used:
                raise ValueError(f"'{name}' is of no use without 'listenerPath'")
        return self


class IntelRdt(Part):
    """Cache and bandwidth allocation of the host's CPU."""

    clos_id: Annotated[Text, Field(alias="closID")] = ""
    l3_cache_schema: Annotated[Text, Field(alias="l3CacheSchema")] = ""
    mem_bw_schema: Text = ""
    enable_cmt: Annotated[bool, Field(alias="enableCMT")] = False
    enable_mbm: Annotated[bool, Field(alias="enableMBM")] = False


class Personality(Part):
    """As for personality(2)."""

    domain: Literal["LINUX", "LINUX32"]
    flags: Texts = ()


class TimeOffset(Part):
    """Of a clock in a time namespace."""

    secs: Int64 = 0
    nanosecs: UInt32 = 0


class Linux(Part):
    """Everything that only Linux has."""

    uid_mappings: Many[IdMapping] = ()
    gid_mappings: Many[IdMapping] = ()
    sysctl: TextMap = Field(default_factory=dict)
    resources: Resources | None = None
    cgroups_path: Text = ""
    namespaces: Many[Namespace] = ()
    devices: Many[Device] = ()
    seccomp: Seccomp | None = None
    rootfs_propagation: Literal[
        "", "private", "rprivate", "slave", "rslave", "shared", "rshared", "unbindable", "runbindable"
    ] = ""
    masked_paths: Texts = ()
    readonly_paths: Texts = ()
    mount_label: Text = ""
    intel_rdt: IntelRdt | None = None
    personality: Personality | None = None
    time_offsets: dict[Literal["monotonic", "boottime"], TimeOffset] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _namespaces_areunique(self) -> Self:
        unique([namespace.type for namespace in self.namespaces], "namespaces", "type")
        return self

    def namespace(self, kind: str) -> Namespace | None:
        """The entry for a type of namespace."""
        return next((namespace for namespace in self.namespaces if namespace.type == kind), None)
