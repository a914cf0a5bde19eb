"""From an engine's config.json to the one that crun gets inside the guest.

Network, IPC and UTS namespace of a pod are the virtual machine's own: a first container's are left out of its document,
and a member that joins the first one's is in them already.  What only means something on the host (paths, cgroups,
hooks, labels, cpusets) stays there; what can be honoured neither there nor in the guest is an UnsupportedError
that names the member.  Pure but for looking at the sources of mounts.
"""

from __future__ import annotations

import copy
import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from vmsandbox.errors import InvalidBundleError, UnsupportedError
from vmsandbox.oci import bpf
from vmsandbox.oci.compose import SPEC_VERSION

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vmsandbox.oci.bundle import Bundle
    from vmsandbox.oci.linux import Seccomp
    from vmsandbox.oci.spec import Mount, Process

#: file systems that the guest makes itself
MADE_IN_GUEST = frozenset({"proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "hugetlbfs", "ramfs"})
#: settings of namespaces that are the pod's
_POD_SYSCTLS = ("net.", "kernel.msg", "kernel.sem", "kernel.shm", "fs.mqueue.", "kernel.domainname", "kernel.hostname")
#: trees of a kernel, which is the guest's
_KERNEL_TREES = ("/proc", "/sys")
_SHM = "/dev/shm"
_SHM_BYTES = 64 << 20
_PROCESS_UNSUPPORTED = ("scheduler", "io_priority")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Something of the host that a container needs to see; `destination` is ``/`` for its root."""

    path: str
    destination: str
    read_only: bool


@dataclass(kw_only=True)
class Translated:
    """What is made of a bundle: the guest's document, and what is needed around it."""

    document: dict[str, Any]
    #: what has to be shared before `document` is complete: the root first, then bind mounts
    sources: list[Source]
    #: of the pod's namespaces; only a first container may ask for them
    sysctls: dict[str, str]
    #: index of a mount in `document` -> index of its source in `sources`
    mounts: dict[int, int] = field(default_factory=dict)

    def completed(self, place: Callable[[int], str]) -> dict[str, Any]:
        """The document with the guest's paths; `place` says where the source with a number is in the guest."""
        made = copy.deepcopy(self.document)
        made["root"]["path"] = place(0)
        for mount, source in self.mounts.items():
            made["mounts"][mount]["source"] = place(source)
        return made


def translated(bundle: Bundle, *, kind: Literal["single", "sandbox", "container"], cache: Path | None) -> Translated:
    """The guest's side of a bundle.

    `kind` is the container's place in its pod, `cache` a directory for compiled seccomp filters.  Raises
    InvalidBundleError and UnsupportedError naming the member that cannot be honoured.
    """
    member = kind == "container"
    document = copy.deepcopy(dict(bundle.document))
    for name in ("hooks", "annotations", "hostname", "domainname"):
        document.pop(name, None)
    if bundle.spec.process is None:
        raise InvalidBundleError("config.json is not valid: 'process' is missing: there is no program to run")
    document["ociVersion"] = SPEC_VERSION
    document["process"] = guest_process(bundle.spec.process, document["process"])
    document["root"] = {"path": "", "readonly": bundle.spec.root.readonly}
    result = Translated(
        document=document,
        sources=[Source(path=str(bundle.rootfs), destination="/", read_only=False)],
        sysctls={},
    )
    _hooks(bundle, document)
    _linux(bundle, document, result, member=member, cache=cache)
    _mounts(bundle, document, result, in_pod=kind != "single")
    return result


def guest_process(process: Process, document: dict[str, Any]) -> dict[str, Any]:
    """A process object without what is the host's; labels of its security modules say nothing about the guest."""
    for name in _PROCESS_UNSUPPORTED:
        if getattr(process, name) is not None:
            member = "ioPriority" if name == "io_priority" else name
            raise UnsupportedError(f"'process.{member}' is not supported: the guest's runtime cannot apply it")
    made = {key: value for key, value in document.items() if value is not None}
    for name in ("apparmorProfile", "selinuxLabel", "commandLine"):
        made.pop(name, None)
    return made


def _hooks(bundle: Bundle, document: dict[str, Any]) -> None:
    hooks = bundle.spec.hooks
    if hooks.create_container:
        raise UnsupportedError(
            "'hooks.createContainer' is not supported: its programs are the host's, the container's namespaces "
            "the virtual machine's"
        )
    if hooks.start_container:
        document["hooks"] = {"startContainer": bundle.document["hooks"]["startContainer"]}


# ---------------------------------------------------------------- linux


def _linux(bundle: Bundle, document: dict[str, Any], result: Translated, *, member: bool, cache: Path | None) -> None:
    linux = bundle.spec.linux
    given: dict[str, Any] = {key: value for key, value in (document.get("linux") or {}).items() if value is not None}
    document["linux"] = given
    for name in ("cgroupsPath", "mountLabel", "namespaces", "sysctl"):
        given.pop(name, None)
    refused: tuple[tuple[object, str], ...] = (
        (linux.intel_rdt, "intelRdt"),
        (linux.time_offsets, "timeOffsets"),
        (linux.uid_mappings, "uidMappings"),
        (linux.gid_mappings, "gidMappings"),
    )
    for value, name in refused:
        if value:
            raise UnsupportedError(f"'linux.{name}' is not supported")
        given.pop(name, None)
    given["namespaces"] = _namespaces(bundle, member=member)
    if {"type": "uts"} in given["namespaces"]:
        if bundle.spec.domainname:
            raise UnsupportedError("'domainname' is not supported beside that of the pod")
        if bundle.spec.hostname:
            document["hostname"] = bundle.spec.hostname
    for index, device in enumerate(linux.devices):
        if device.type == "b" or device.path.startswith("/dev/vfio"):
            raise UnsupportedError(
                f"'linux.devices[{index}]' is '{device.path}': devices of the host are not given to virtual machines"
            )
        if device.file_mode is not None:
            given["devices"][index]["fileMode"] = device.file_mode & 0o7777
    if linux.resources is not None:
        given["resources"] = guest_resources(given.get("resources") or {})
    if linux.seccomp is not None:
        if linux.seccomp.listener_path:
            raise UnsupportedError("'linux.seccomp.listenerPath' is not supported: the listener is not in the guest")
        document["annotations"] = _compiled(linux.seccomp, cache)
    for name, setting in linux.sysctl.items():
        dotted = name.replace("/", ".")
        if not dotted.startswith(_POD_SYSCTLS):
            raise UnsupportedError(f"'linux.sysctl' has '{name}', which belongs to no namespace of a container")
        result.sysctls[dotted] = setting
    if bundle.spec.domainname and not member:
        result.sysctls["kernel.domainname"] = bundle.spec.domainname


def _compiled(section: Seccomp, cache: Path | None) -> dict[str, str]:
    """The section as a finished filter; empty where only the guest can make it."""
    actions = {section.default_action, *(rule.action for rule in section.syscalls)}
    if not actions <= bpf.KNOWN_ACTIONS or not set(section.architectures) <= bpf.KNOWN_ARCHITECTURES:
        return {}
    complete = {
        "defaultAction": section.default_action,
        "defaultErrnoRet": section.default_errno_ret,
        "architectures": list(section.architectures),
        "syscalls": [
            {
                "names": list(rule.names),
                "action": rule.action,
                "errnoRet": rule.errno_ret,
                "args": [
                    {"index": each.index, "value": each.value, "valueTwo": each.value_two, "op": each.op}
                    for each in rule.args
                ],
            }
            for rule in section.syscalls
        ],
    }
    return bpf.annotation(complete, directory=cache)


def _namespaces(bundle: Bundle, *, member: bool) -> list[dict[str, str]]:
    linux = bundle.spec.linux
    for kind, why in (
        ("network", "the host's network cannot be a virtual machine's"),
        ("pid", "the host's processes are out of a virtual machine's reach"),
        ("ipc", "the host's IPC objects are out of a virtual machine's reach"),
    ):
        if linux.namespace(kind) is None:
            raise UnsupportedError(f"'linux.namespaces' has no {kind} namespace: {why}")
    made = [{"type": "mount"}, {"type": "cgroup"}]
    for namespace in linux.namespaces:
        if namespace.type in ("user", "time"):
            raise UnsupportedError(f"'linux.namespaces' has a {namespace.type} namespace, which is not supported")
        if namespace.type == "pid":
            if namespace.path:
                raise UnsupportedError(
                    f"'linux.namespaces' joins the pid namespace '{namespace.path}': sharing it is not supported"
                )
            made.append({"type": "pid"})
        elif namespace.type in ("mount", "cgroup") and namespace.path:
            raise UnsupportedError(f"'linux.namespaces' joins a {namespace.type} namespace, which is not supported")
        elif namespace.type in ("ipc", "uts"):
            if namespace.path and not member:
                raise UnsupportedError(
                    f"'linux.namespaces' joins the {namespace.type} namespace '{namespace.path}': only containers of "
                    "one pod can share it"
                )
            if member and not namespace.path:
                made.append({"type": namespace.type})
        elif namespace.type == "network" and member and not namespace.path:
            raise UnsupportedError("'linux.namespaces' asks for a new network: a pod has one network for all")
    return made


def guest_resources(given: dict[str, Any]) -> dict[str, Any]:
    """LinuxResources as the guest can apply them; zeros and nulls mean nothing, as engines write them.

    Host cpusets are left out: they say on which of the host's processors a container may run, not on which of the
    guest's.
    """
    made: dict[str, Any] = {}
    if given.get("devices"):
        made["devices"] = given["devices"]
    memory = {key: value for key, value in (given.get("memory") or {}).items() if value not in (None, 0, False)}
    for name in ("kernel", "kernelTCP", "useHierarchy", "checkBeforeUpdate"):
        memory.pop(name, None)
    if "disableOOMKiller" in memory:
        raise UnsupportedError(
            "'linux.resources.memory.disableOOMKiller' is not supported: cgroup v2 has no such thing"
        )
    if memory.get("swap") is not None and memory["swap"] >= 0 and not memory.get("limit"):
        del memory["swap"]
    cpu = {key: value for key, value in (given.get("cpu") or {}).items() if value not in (None, 0, "")}
    for name in ("cpus", "mems"):
        cpu.pop(name, None)
    for name in ("realtimeRuntime", "realtimePeriod"):
        if name in cpu:
            raise UnsupportedError(f"'linux.resources.cpu.{name}' is not supported: cgroup v2 has no such thing")
    pids = {key: value for key, value in (given.get("pids") or {}).items() if value not in (None, 0)}
    block_io = {key: value for key, value in (given.get("blockIO") or {}).items() if value not in (None, 0, [])}
    for name in block_io:
        if name.endswith("Device"):
            raise UnsupportedError(f"'linux.resources.blockIO.{name}' names devices that the guest does not have")
    made.update({name: part for name, part in _named(memory, cpu, pids, block_io) if part})
    pages = [entry for entry in given.get("hugepageLimits") or [] if entry.get("limit")]
    if pages:
        made["hugepageLimits"] = pages
    network = {key: value for key, value in (given.get("network") or {}).items() if value not in (None, 0, [])}
    for name, part in (("network", network), ("rdma", given.get("rdma"))):
        if part:
            raise UnsupportedError(f"'linux.resources.{name}' is not supported: the guest's kernel cannot apply it")
    if given.get("unified"):
        made["unified"] = given["unified"]
    return made


def _named(*parts: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [*zip(("memory", "cpu", "pids", "blockIO"), parts, strict=True)]


# ---------------------------------------------------------------- mounts


def _mounts(bundle: Bundle, document: dict[str, Any], result: Translated, *, in_pod: bool) -> None:
    """Bind mounts become sources to share; what the guest can make itself stays as it is."""
    mounts: list[dict[str, Any]] = []
    last_shm = max((n for n, each in enumerate(bundle.spec.mounts) if each.destination == _SHM), default=-1)
    for index, mount in enumerate(bundle.spec.mounts):
        if mount.uid_mappings or mount.gid_mappings:
            raise UnsupportedError(f"'mounts[{index}]' maps ids, which is not supported")
        entry = {
            "destination": mount.destination,
            "type": mount.type,
            "source": mount.source,
            "options": list(mount.options),
        }
        if mount.destination == _SHM:
            if index == last_shm:
                mounts.append(_shared_memory(entry, mount, in_pod=in_pod))
            continue
        if _is_bind(mount):
            source = os.path.normpath(bundle.directory / mount.source)
            if _below(source, _KERNEL_TREES):
                # The guest's own: what the kernel tells there is about the virtual machine.
                mounts.append({**entry, "type": "bind", "source": source})
                continue
            _check_source(source, index)
            result.mounts[len(mounts)] = len(result.sources)
            result.sources.append(Source(path=source, destination=mount.destination, read_only=_read_only(mount)))
            entry["type"] = "bind"
        elif mount.type not in MADE_IN_GUEST:
            raise UnsupportedError(
                f"'mounts[{index}].type' is '{mount.type}', which cannot be mounted in a virtual machine"
            )
        mounts.append(entry)
    document["mounts"] = mounts


def _is_bind(mount: Mount) -> bool:
    return mount.type == "bind" or "bind" in mount.options or "rbind" in mount.options


def _read_only(mount: Mount) -> bool:
    access = [option for option in mount.options if option in ("ro", "rro", "rw")]
    return bool(access) and access[-1] != "rw"


def _below(path: str, places: tuple[str, ...]) -> bool:
    return any(path == place or path.startswith(place + "/") for place in places)


def _check_source(path: str, index: int) -> None:
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        reason = (error.strerror or "unknown").lower()
        raise InvalidBundleError(f"cannot use the source '{path}' of 'mounts[{index}]': {reason}") from error
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise UnsupportedError(
            f"cannot share '{path}' of 'mounts[{index}]': only files and directories can cross into a virtual machine"
        )


def _shared_memory(entry: dict[str, Any], mount: Mount, *, in_pod: bool) -> dict[str, Any]:
    """/dev/shm is the guest's: memory of the host cannot be shared with programs in it."""
    if not _is_bind(mount):
        return entry
    quiet = ["nosuid", "noexec", "nodev"]
    if in_pod:
        return {**entry, "type": "bind", "source": _SHM, "options": ["rbind", "rprivate", *quiet]}
    try:
        read = os.statvfs(mount.source)
        size = read.f_frsize * read.f_blocks
    except OSError:
        size = _SHM_BYTES
    options = [*quiet, "mode=1777", f"size={size or _SHM_BYTES}"]
    return {**entry, "type": "tmpfs", "source": "shm", "options": options}
