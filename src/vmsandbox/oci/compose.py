"""Composes the OCI runtime spec of a container from its image's config and the user's options.

The spec is for crun inside the guest, so every path in it is one of the guest.  What only the guest can know is left to
the agent: names in `Composed.user` and the home directory.  There is no network namespace: the pod's virtual
machine is the pod's network.

Pure and without imports that cost: a run goes through here.
"""

from __future__ import annotations

import posixpath
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vmsandbox.errors import InvalidArgumentError
from vmsandbox.oci import bpf, capabilities, mounts, seccomp, signals, texts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from vmsandbox.oci.options import Device, ExecOptions, RunOptions

SPEC_VERSION = "1.0.2"
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CPU_PERIOD = 100_000
SIGTERM = 15

MASKED_PATHS = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")

#: (type, major, minor): null, zero, full, random, urandom, tty, console, ptmx, pts
_DEVICES = (
    ("c", 1, 3),
    ("c", 1, 5),
    ("c", 1, 7),
    ("c", 1, 8),
    ("c", 1, 9),
    ("c", 5, 0),
    ("c", 5, 1),
    ("c", 5, 2),
    ("c", 136, None),
)
_NAMESPACES = ("pid", "ipc", "uts", "mount", "cgroup")


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a container gets when neither its options nor its image say otherwise."""

    shm_bytes: int = 64 * 2**20
    #: 0: no limit
    pids_limit: int = 2048
    no_new_privileges: bool = False
    #: "default", "unconfined" or the path of a profile
    seccomp: str = "default"
    #: soft and hard limit of open files
    nofile: tuple[int, int] = (1024, 1_048_576)


@dataclass(frozen=True, kw_only=True)
class Composed:
    """A spec, and what goes beside it into CreateContainerRequest and the container's record."""

    spec: dict[str, Any]
    #: for the agent to resolve; uid 0 if nobody says otherwise, which gives root the groups it has in the image
    user: str
    #: the environment has no HOME: the agent sets the user's
    default_home: bool
    make_cwd: bool = True
    labels: dict[str, str] = field(default_factory=dict)
    stop_signal: int = SIGTERM


@dataclass(frozen=True, kw_only=True)
class ComposedExec:
    """A process object, and what goes beside it into ExecRequest (with `inherit` set)."""

    process: dict[str, Any]
    user: str
    default_home: bool


@dataclass(frozen=True)
class _Image:
    """An image's config with every member of the right type."""

    entrypoint: tuple[str, ...]
    command: tuple[str, ...]
    env: tuple[str, ...]
    workdir: str
    user: str
    stop_signal: str
    labels: dict[str, str]


def compose(
    image_config: Mapping[str, object],
    options: RunOptions,
    *,
    rootfs: str,
    container_id: str,
    defaults: Defaults | None = None,
    volume_sources: Mapping[str, str] | None = None,
    devices: Sequence[Device] = (),
    shared_namespaces: Mapping[str, str] | None = None,
    shared_shm: str = "/dev/shm",
    pod_hostname: str = "",
    pod_files: Mapping[str, str] | None = None,
    cgroups_path: str = "",
    cache: Path | None = None,
) -> Composed:
    """The spec of a container.

    `image_config` is the ``config`` object of the image's configuration.  `rootfs` is the guest's path of the root file
    system; `volume_sources` maps the destination of each of the options' volumes to the guest's path of its source.
    `shared_namespaces` maps a type (ipc, pid, uts) to the guest's path of the namespace to join, or to "" for the
    guest's own; with ipc shared, `shared_shm` is what becomes /dev/shm, with uts shared, `pod_hostname` is the name
    that $HOSTNAME tells.  `pod_files` maps paths in the container to
    files of the guest (default `mounts.POD_FILES`).  `cache` is a directory for compiled seccomp filters (`Roots.run /
    "cache"`); without one each call compiles.

    Raises InvalidArgumentError or UnsupportedError naming the entry that cannot be honoured.
    """
    defaults = defaults or Defaults()
    shared = dict(shared_namespaces or {})
    for kind in shared:
        if kind not in ("ipc", "pid", "uts"):
            raise InvalidArgumentError(f"namespace '{kind}' cannot be shared: known are 'ipc', 'pid' and 'uts'")
    image = _image(image_config)
    hostname = (pod_hostname if "uts" in shared else options.hostname) or container_id[:12]
    base = [f"PATH={DEFAULT_PATH}", f"HOSTNAME={hostname}", *(["TERM=xterm"] if options.tty else [])]
    environment = texts.environment(image.env, options.env, client=options.client_env, base=base)
    caps = capabilities.adjusted(options.cap_add, options.cap_drop, privileged=options.privileged)
    forbid = defaults.no_new_privileges if options.no_new_privileges is None else options.no_new_privileges
    process = {
        "terminal": options.tty,
        "user": {
            "uid": 0,
            "gid": 0,
            "umask": 0o022,
            **({"additionalGids": list(options.groups)} if options.groups else {}),
        },
        "args": _command(image, options),
        "env": environment,
        "cwd": _workdir(options.workdir or image.workdir),
        "capabilities": {kind: list(caps) for kind in ("bounding", "effective", "permitted")},
        "rlimits": _rlimits(options, defaults),
        "noNewPrivileges": forbid,
        # Always said: a container must not inherit the agent's protection from the OOM killer.
        "oomScoreAdj": options.oom_score_adj,
    }
    linux: dict[str, Any] = {
        "namespaces": [
            {"type": kind, "path": shared[kind]} if shared.get(kind) else {"type": kind}
            for kind in _NAMESPACES
            if shared.get(kind) != ""
        ],
        "resources": _resources(options, defaults, devices),
        "maskedPaths": [] if options.privileged else list(MASKED_PATHS),
        "readonlyPaths": [] if options.privileged else list(READONLY_PATHS),
    }
    if devices:
        linux["devices"] = [_device(device) for device in devices]
    if options.sysctls:
        linux["sysctl"] = _sysctls(options, shared)
    if cgroups_path:
        linux["cgroupsPath"] = cgroups_path
    profile = options.seccomp or ("unconfined" if options.privileged else defaults.seccomp)
    annotations: dict[str, str] = {}
    if profile != "unconfined":
        linux["seccomp"] = seccomp.section(profile, caps)
        annotations = bpf.annotation(linux["seccomp"], directory=cache)
    container_mounts = mounts.container_mounts(
        options,
        shm_bytes=options.shm_bytes or defaults.shm_bytes,
        volume_sources=volume_sources or {},
        files=mounts.POD_FILES if pod_files is None else pod_files,
        shm=shared_shm if "ipc" in shared else "",
    )
    spec: dict[str, Any] = {
        "ociVersion": SPEC_VERSION,
        "process": process,
        "root": {"path": rootfs, "readonly": options.read_only},
        "mounts": container_mounts,
        "linux": linux,
        **({"annotations": annotations} if annotations else {}),
    }
    if "uts" not in shared:
        spec["hostname"] = hostname
        if options.domainname:
            spec["domainname"] = options.domainname
    elif options.hostname or options.domainname:
        raise InvalidArgumentError(
            f"hostname '{options.hostname or options.domainname}' cannot be set: it is the pod's, set it there"
        )
    return Composed(
        spec=spec,
        user=options.user or image.user or "0",
        default_home=not _has_home(environment),
        labels={**image.labels, **options.labels},
        stop_signal=options.stop_signal or (signals.parse(image.stop_signal) if image.stop_signal else SIGTERM),
    )


def add_devices(spec: dict[str, Any], devices: Sequence[Device]) -> None:
    """Offer devices to the container of a composed spec, whose numbers were not known before."""
    linux = spec["linux"]
    linux.setdefault("devices", []).extend(_device(device) for device in devices)
    linux["resources"]["devices"].extend(_allowed(device) for device in devices)


def compose_exec(options: ExecOptions, spec: Mapping[str, Any]) -> ComposedExec:
    """The process object of an exec in the container of `spec` (`Composed.spec`), for `ExecRequest.inherit`.

    It holds arguments, terminal and the complete environment, and what the options change; the rest comes from the
    container's init process.
    """
    container = spec["process"]
    base = list(container["env"])
    if options.tty and not any(entry.startswith("TERM=") for entry in base):
        base.append("TERM=xterm")
    environment = texts.environment((), options.env, client=options.client_env, base=base)
    process: dict[str, Any] = {"args": list(options.args), "terminal": options.tty, "env": environment}
    if options.workdir:
        process["cwd"] = _workdir(options.workdir)
    if options.privileged:
        process["capabilities"] = {kind: list(capabilities.KNOWN) for kind in ("bounding", "effective", "permitted")}
    return ComposedExec(process=process, user=options.user, default_home=not _has_home(environment))


def _has_home(environment: Sequence[str]) -> bool:
    return any(entry.startswith("HOME=") for entry in environment)


def _image(config: Mapping[str, object]) -> _Image:
    return _Image(
        entrypoint=_image_texts(config, "Entrypoint"),
        command=_image_texts(config, "Cmd"),
        env=_image_texts(config, "Env"),
        workdir=_image_text(config, "WorkingDir"),
        user=texts.user(_image_text(config, "User")),
        stop_signal=_image_text(config, "StopSignal"),
        labels=_image_labels(config),
    )


def _image_text(config: Mapping[str, object], name: str) -> str:
    value = config.get(name)
    if value is None:
        return ""
    if not isinstance(value, str) or "\0" in value:
        raise InvalidArgumentError(f"the image's config is malformed: '{name}' is not a text")
    return value


def _image_texts(config: Mapping[str, object], name: str) -> tuple[str, ...]:
    value = config.get(name)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) and "\0" not in item for item in value):
        raise InvalidArgumentError(f"the image's config is malformed: '{name}' is not a list of texts")
    return tuple(value)


def _image_labels(config: Mapping[str, object]) -> dict[str, str]:
    value = config.get("Labels")
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(
        isinstance(key, str) and isinstance(text, str) for key, text in value.items()
    ):
        raise InvalidArgumentError("the image's config is malformed: 'Labels' does not map texts to texts")
    return value


def _command(image: _Image, options: RunOptions) -> list[str]:
    """Entrypoint and command: the options' entrypoint drops the image's command, their arguments replace it."""
    if options.entrypoint is None:
        args = [*image.entrypoint, *(options.args or image.command)]
    else:
        entrypoint = () if options.entrypoint == ("",) else options.entrypoint
        args = [*entrypoint, *options.args]
    if not args:
        raise InvalidArgumentError("no command specified: the image has none, give one after the image's name")
    return args


def _workdir(path: str) -> str:
    normal = posixpath.normpath("/" + path)
    return "/" + normal.lstrip("/")


def _rlimits(options: RunOptions, defaults: Defaults) -> list[dict[str, object]]:
    soft, hard = defaults.nofile
    # The kernel derives its default number of processes from the memory at boot, which is small here.
    limits = {"RLIMIT_NOFILE": (soft, hard), "RLIMIT_NPROC": (texts.UNLIMITED, texts.UNLIMITED)}
    limits.update({limit.type: (limit.soft, limit.hard) for limit in options.ulimits})
    return [{"type": name, "soft": soft, "hard": hard} for name, (soft, hard) in limits.items()]


def _resources(options: RunOptions, defaults: Defaults, devices: Sequence[Device]) -> dict[str, Any]:
    resources: dict[str, Any] = {"devices": _device_rules(options, devices)}
    if options.memory_bytes is not None:
        resources["memory"] = {"limit": options.memory_bytes}
    cpu: dict[str, Any] = {}
    if options.cpus:
        cpu.update(quota=max(1000, round(options.cpus * CPU_PERIOD)), period=CPU_PERIOD)
    if options.cpu_shares:
        cpu["shares"] = options.cpu_shares
    if options.cpuset_cpus:
        cpu["cpus"] = options.cpuset_cpus
    if cpu:
        resources["cpu"] = cpu
    limit = defaults.pids_limit if options.pids_limit is None else options.pids_limit
    if limit > 0:
        resources["pids"] = {"limit": limit}
    return resources


def _device_rules(options: RunOptions, devices: Sequence[Device]) -> list[dict[str, object]]:
    if options.privileged:
        return [{"allow": True, "access": "rwm"}]
    rules: list[dict[str, object]] = [{"allow": False, "access": "rwm"}]
    rules += [{"allow": True, "type": kind, "access": "m"} for kind in ("c", "b")]
    for kind, major, minor in _DEVICES:
        rule: dict[str, object] = {"allow": True, "type": kind, "major": major, "access": "rwm"}
        rules.append(rule if minor is None else {**rule, "minor": minor})
    return [*rules, *(_allowed(device) for device in devices)]


def _allowed(device: Device) -> dict[str, object]:
    return {"allow": True, "type": device.type, "major": device.major, "minor": device.minor, "access": device.access}


def _device(device: Device) -> dict[str, object]:
    return {
        "path": texts.destination(device.path, "device"),
        "type": device.type,
        "major": device.major,
        "minor": device.minor,
        "fileMode": device.mode,
        "uid": device.uid,
        "gid": device.gid,
    }


def _sysctls(options: RunOptions, shared: Mapping[str, str]) -> dict[str, str]:
    """Only those of namespaces the container does not share with others; the network's belong to the pod."""
    own = {"ipc": ("kernel.msg", "kernel.sem", "kernel.shm", "fs.mqueue."), "uts": ("kernel.domainname",)}
    for name in options.sysctls:
        dotted = name.replace("/", ".")
        if not any(dotted.startswith(prefix) for kind in own if kind not in shared for prefix in own[kind]):
            raise InvalidArgumentError(f"sysctl '{name}' is not the container's own: set it for the pod")
    return {name.replace("/", "."): value for name, value in options.sysctls.items()}
