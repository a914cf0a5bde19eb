"""config.json of the OCI runtime specification 1.2 for Linux, as typed and frozen models."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from vmsandbox.oci import capabilities
from vmsandbox.oci.document import AbsolutePath, Id, Many, Part, Text, TextMap, Texts, UInt32, UInt64, unique
from vmsandbox.oci.linux import IdMapping, Linux


class ConsoleSize(Part):
    """Of the terminal, in characters."""

    height: UInt32
    width: UInt32


class User(Part):
    """Numeric identity of a process."""

    uid: Id = 0
    gid: Id = 0
    umask: Annotated[int, Field(ge=0, le=0o777)] | None = None
    additional_gids: Many[Id] = ()
    username: Text = ""


class Capabilities(Part):
    """The five sets, by names with ``CAP_``."""

    bounding: Texts = ()
    effective: Texts = ()
    inheritable: Texts = ()
    permitted: Texts = ()
    ambient: Texts = ()

    @model_validator(mode="after")
    def _can_be_set(self) -> Self:
        """What capset(2) demands; unknown ones are left out, wherever they are."""
        for name, within in (("effective", "permitted"), ("inheritable", "bounding")):
            there = capabilities.among(getattr(self, within))
            missing = [each for each in capabilities.among(getattr(self, name)) if each not in there]
            if missing:
                raise ValueError(f"'{name}' has '{missing[0]}', which is not in '{within}'")
        return self


class Rlimit(Part):
    """A resource limit; 2**64 - 1 is none."""

    type: Annotated[str, Field(pattern="^RLIMIT_[A-Z]{1,32}$")]
    soft: UInt64
    hard: UInt64


SCHEDULER_FLAGS = frozenset(
    {
        "SCHED_FLAG_RESET_ON_FORK",
        "SCHED_FLAG_RECLAIM",
        "SCHED_FLAG_DL_OVERRUN",
        "SCHED_FLAG_KEEP_POLICY",
        "SCHED_FLAG_KEEP_PARAMS",
        "SCHED_FLAG_UTIL_CLAMP_MIN",
        "SCHED_FLAG_UTIL_CLAMP_MAX",
    }
)


class Scheduler(Part):
    """As for sched_setattr(2)."""

    policy: Literal["SCHED_OTHER", "SCHED_FIFO", "SCHED_RR", "SCHED_BATCH", "SCHED_ISO", "SCHED_IDLE", "SCHED_DEADLINE"]
    nice: Annotated[int, Field(ge=-20, le=19)] = 0
    priority: Annotated[int, Field(ge=0, le=99)] = 0
    flags: Texts = ()
    runtime: UInt64 = 0
    deadline: UInt64 = 0
    period: UInt64 = 0

    @model_validator(mode="after")
    def _fits_its_policy(self) -> Self:
        real_time = self.policy in ("SCHED_FIFO", "SCHED_RR")
        if real_time != (self.priority > 0):
            raise ValueError(f"priority is '{self.priority}': 1 to 99 for SCHED_FIFO and SCHED_RR, 0 for all others")
        if self.policy == "SCHED_DEADLINE" and not 0 < self.runtime <= self.deadline <= (self.period or self.deadline):
            raise ValueError("SCHED_DEADLINE needs 0 < runtime <= deadline <= period")
        if unknown := sorted(set(self.flags) - SCHEDULER_FLAGS):
            raise ValueError(f"flag '{unknown[0][:64]}' is unknown")
        return self


class IoPriority(Part):
    """As for ioprio_set(2)."""

    class_: Annotated[Literal["IOPRIO_CLASS_RT", "IOPRIO_CLASS_BE", "IOPRIO_CLASS_IDLE"], Field(alias="class")]
    priority: Annotated[int, Field(ge=0, le=7)] = 0


class Process(Part):
    """A process to be run; also the document of an exec."""

    terminal: bool = False
    console_size: ConsoleSize | None = None
    user: User = Field(default_factory=User)
    args: Texts = ()
    env: Texts = ()
    cwd: AbsolutePath
    capabilities: Capabilities | None = None
    rlimits: Many[Rlimit] = ()
    no_new_privileges: bool = False
    apparmor_profile: Text = ""
    oom_score_adj: Annotated[int, Field(ge=-1000, le=1000)] | None = None
    selinux_label: Text = ""
    scheduler: Scheduler | None = None
    io_priority: IoPriority | None = None

    @model_validator(mode="after")
    def _limits_areunique(self) -> Self:
        unique([limit.type for limit in self.rlimits], "rlimits", "type")
        return self


class Root(Part):
    """The container's root file system; a relative path is below the bundle."""

    path: Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]*$")]
    readonly: bool = False


def _from_the_root(path: str) -> str:
    return path if path.startswith("/") else f"/{path}"


class Mount(Part):
    """One mount, in the order in which they are made.

    A relative destination, which the specification deprecates but demands, begins at the container's root.
    """

    destination: Annotated[
        str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]*$"), AfterValidator(_from_the_root)
    ]
    type: Text = ""
    source: Text = ""
    options: Texts = ()
    uid_mappings: Many[IdMapping] = ()
    gid_mappings: Many[IdMapping] = ()


class Hook(Part):
    """A program run at a point of the container's life; `timeout` is in seconds."""

    path: AbsolutePath
    args: Texts = ()
    env: Texts = ()
    timeout: Annotated[int, Field(ge=1, le=2**31)] | None = None


HookList = Many[Hook]


class Hooks(Part):
    """Programs by the point at which they are run."""

    prestart: HookList = ()
    create_runtime: HookList = ()
    create_container: HookList = ()
    start_container: HookList = ()
    poststart: HookList = ()
    poststop: HookList = ()


class Spec(Part):
    """A whole config.json."""

    oci_version: Annotated[str, Field(max_length=64)]
    process: Process | None = None
    root: Root
    hostname: Text = ""
    domainname: Text = ""
    mounts: Many[Mount] = ()
    hooks: Hooks = Field(default_factory=Hooks)
    annotations: TextMap = Field(default_factory=dict)
    linux: Linux = Field(default_factory=Linux)

    @model_validator(mode="after")
    def _version_is_known(self) -> Self:
        if not re.fullmatch(r"1\.\d+\.\d+(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?", self.oci_version):
            raise ValueError(f"ociVersion '{self.oci_version}' is not one that is understood: known are 1.0.0 to 1.2.x")
        return self
