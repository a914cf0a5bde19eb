"""`spec`, `features`, and the verbs that are refused: nothing here knows a container."""

from __future__ import annotations

import json
import os

from vmsandbox import __version__
from vmsandbox.cli.runtime.main import SPEC
from vmsandbox.cli.runtime.options import FLAG, VALUE, parse
from vmsandbox.errors import AlreadyExistsError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from vmsandbox.cli.runtime.main import Options

CAPABILITIES = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]
ALL_CAPABILITIES = [
    f"CAP_{name}"
    for name in (
        *("CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP"),
        *("LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER"),
        *("SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE"),
        *("SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP"),
        *("MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF"),
        "CHECKPOINT_RESTORE",
    )
]
HOOKS = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"]
NAMESPACES = ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"]
MOUNT_OPTIONS = [
    *("async", "atime", "bind", "defaults", "dev", "diratime", "dirsync", "exec", "mand", "noatime", "nodev"),
    *("nodiratime", "noexec", "nomand", "norelatime", "nostrictatime", "nosuid", "private", "rbind", "relatime"),
    *("remount", "ro", "rprivate", "rro", "rrw", "rshared", "rslave", "runbindable", "rw", "shared", "slave"),
    *("strictatime", "suid", "sync", "tmpcopyup", "unbindable"),
    *("rdev", "rdiratime", "rexec", "rnoatime", "rnodev", "rnodiratime", "rnoexec", "rnorelatime", "rnostrictatime"),
    *("rnosuid", "rrelatime", "rstrictatime", "rsuid"),
]
ARCHITECTURES = ["SCMP_ARCH_X32", "SCMP_ARCH_X86", "SCMP_ARCH_X86_64"]
ACTIONS = [
    f"SCMP_ACT_{name}" for name in ["ALLOW", "ERRNO", "KILL", "KILL_PROCESS", "KILL_THREAD", "LOG", "TRACE", "TRAP"]
]
OPERATORS = [f"SCMP_CMP_{name}" for name in ["EQ", "GE", "GT", "LE", "LT", "MASKED_EQ", "NE"]]


def features_verb(_options: Options, argv: list[str]) -> int:
    parse(argv, {})
    features = {
        "ociVersionMin": "1.0.0",
        "ociVersionMax": SPEC,
        "hooks": HOOKS,
        "mountOptions": MOUNT_OPTIONS,
        "linux": {
            "namespaces": NAMESPACES,
            "capabilities": ALL_CAPABILITIES,
            "cgroup": {"v1": True, "v2": True, "systemd": True, "systemdUser": False},
            "seccomp": {"enabled": True, "actions": ACTIONS, "operators": OPERATORS, "archs": ARCHITECTURES},
            "apparmor": {"enabled": True},
            "selinux": {"enabled": True},
        },
        "annotations": {"org.vmsandbox.checkpoint.enabled": "false", "org.vmsandbox.version": __version__},
    }
    print(json.dumps(features, indent=4))
    return 0


def spec_verb(_options: Options, argv: list[str]) -> int:
    """Write config.json into the bundle; one that is there is left alone."""
    given = parse(argv, {"bundle": VALUE, "rootless": FLAG}, short={"b": "bundle"})
    if given.flag("rootless"):
        raise UnsupportedError("'--rootless' is not supported: virtual machines need root")
    path = os.path.join(given.text("bundle", os.curdir), "config.json")
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        raise AlreadyExistsError(f"file {path} exists. Remove it first") from None
    except OSError as error:
        raise UnsupportedError(f"cannot write '{path}': {(error.strerror or '').lower()}") from error
    with open(fd, "w", encoding="utf-8") as file:
        json.dump(default_spec(), file, indent="\t")
    return 0


def default_spec() -> dict[str, Any]:
    """What runc suggests as well."""
    quiet = ["nosuid", "noexec", "nodev"]

    def mount(destination: str, kind: str, source: str, *options: str) -> dict[str, Any]:
        return {"destination": destination, "type": kind, "source": source, "options": [*options]}

    return {
        "ociVersion": SPEC,
        "process": {
            "terminal": True,
            "user": {"uid": 0, "gid": 0},
            "args": ["sh"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {kind: [*CAPABILITIES] for kind in ("bounding", "effective", "permitted", "ambient")},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "vmsandbox",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
            mount(
                "/dev/pts", "devpts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"
            ),
            mount("/dev/shm", "tmpfs", "shm", *quiet, "mode=1777", "size=65536k"),
            mount("/dev/mqueue", "mqueue", "mqueue", *quiet),
            mount("/sys", "sysfs", "sysfs", *quiet, "ro"),
            mount("/sys/fs/cgroup", "cgroup", "cgroup", *quiet, "relatime", "ro"),
        ],
        "linux": {
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount", "cgroup")],
            "maskedPaths": [
                "/proc/acpi",
                "/proc/asound",
                "/proc/kcore",
                "/proc/keys",
                "/proc/latency_stats",
                "/proc/timer_list",
                "/proc/timer_stats",
                "/proc/sched_debug",
                "/sys/firmware",
                "/proc/scsi",
            ],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    }


def checkpoint_verb(_options: Options, _argv: list[str]) -> NoReturn:
    raise UnsupportedError("checkpoint is not supported: a container in a virtual machine cannot be checkpointed")


def restore_verb(_options: Options, _argv: list[str]) -> NoReturn:
    raise UnsupportedError("restore is not supported: there are no checkpoints of containers in virtual machines")
