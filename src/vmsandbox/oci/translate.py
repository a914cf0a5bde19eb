"""From an engine's config.json to the one that crun gets inside the guest.

Network, IPC and UTS namespace of a pod are the virtual machine's own: a first container's are left out of its document,
and a member that joins the first one's is in them already.  What only means something on the host (paths, cgroups,
hooks, labels, cpusets) stays there; what can be honoured neither there nor in the guest is an UnsupportedError
that names the member.  Pure but for looking at the sources of mounts.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from vmsandbox.errors import InvalidBundleError, UnsupportedError
from vmsandbox.oci import bindings, bpf, nodes
from vmsandbox.oci.bindings import Source
from vmsandbox.oci.compose import SPEC_VERSION
from vmsandbox.oci.limits import guest_resources

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from vmsandbox.oci.bundle import Bundle
    from vmsandbox.oci.linux import Seccomp
    from vmsandbox.oci.spec import Process

Kind = Literal["single", "sandbox", "container"]
#: settings of namespaces that are the pod's
_IPC_SYSCTLS = ("kernel.msg", "kernel.sem", "kernel.shm", "fs.mqueue.")
_UTS_SYSCTLS = ("kernel.domainname", "kernel.hostname")
_POD_SYSCTLS = ("net.", *_IPC_SYSCTLS, *_UTS_SYSCTLS)


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
    #: what has to be plugged before `document` is complete
    disks: list[nodes.HostDisk] = field(default_factory=list)
    #: devices of a privileged container that the virtual machine does not have
    left_out: list[str] = field(default_factory=list)

    def completed(
        self,
        place: Callable[[int], str],
        *,
        plugged: Mapping[nodes.Numbers, nodes.Numbers] | None = None,
        node: Callable[[int], str] = str,
    ) -> dict[str, Any]:
        """The document with the guest's paths and numbers.

        `place` says where the source with a number is in the guest, `plugged` as what each disk of the host is known
        there, and `node` where the device node of the disk with a number is.
        """
        plugged = plugged or {}
        made = copy.deepcopy(self.document)
        made["root"]["path"] = place(0)
        for mount, source in self.mounts.items():
            made["mounts"][mount]["source"] = place(source)
        linux = made["linux"]
        for number, disk in enumerate(self.disks):
            if disk.mount is not None:
                made["mounts"][disk.mount]["source"] = node(number)
                continue
            major, minor = plugged[disk.numbers]
            entry = {"path": disk.path, "type": "b", "major": major, "minor": minor, "fileMode": disk.mode}
            linux.setdefault("devices", []).append({**entry, "uid": disk.uid, "gid": disk.gid})
        if linux.get("resources"):
            linux["resources"] = nodes.placed(linux["resources"], plugged)
        return made


def translated(bundle: Bundle, *, kind: Kind, cache: Path | None, root: nodes.Numbers | None = None) -> Translated:
    """The guest's side of a bundle.

    `kind` is the container's place in its pod, `cache` a directory for compiled seccomp filters, `root` the disk of the
    host on which the root file system is and which will be plugged, if that is so.  Raises
    InvalidBundleError and UnsupportedError naming the member that cannot be honoured.
    """
    document = copy.deepcopy(dict(bundle.document))
    if document.pop("vm", None):
        raise UnsupportedError(
            "'vm' is not supported: hypervisor, kernel and image are those of vmsandbox's own configuration"
        )
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
    if bundle.spec.hooks.start_container:
        document["hooks"] = {"startContainer": bundle.document["hooks"]["startContainer"]}
    found = bindings.sorted_out(bundle, in_pod=kind != "single")
    document["mounts"] = found.entries
    result.mounts = {mount: source + len(result.sources) for mount, source in found.shared.items()}
    result.sources += found.sources
    result.disks += found.disks
    _linux(bundle, document, result, kind=kind, cache=cache, root=root)
    return result


def guest_process(process: Process, document: dict[str, Any]) -> dict[str, Any]:
    """A process object without what is the host's; labels of its security modules say nothing about the guest."""
    if process.scheduler is not None and process.scheduler.policy == "SCHED_ISO":
        raise UnsupportedError("'process.scheduler.policy' is 'SCHED_ISO', which no kernel has")
    made = {key: value for key, value in document.items() if value is not None}
    for name in ("apparmorProfile", "selinuxLabel", "commandLine"):
        made.pop(name, None)
    return made


# ---------------------------------------------------------------- linux


def _linux(
    bundle: Bundle,
    document: dict[str, Any],
    result: Translated,
    *,
    kind: Kind,
    cache: Path | None,
    root: nodes.Numbers | None,
) -> None:
    linux = bundle.spec.linux
    given: dict[str, Any] = {key: value for key, value in (document.get("linux") or {}).items() if value is not None}
    document["linux"] = given
    for name in ("cgroupsPath", "mountLabel", "namespaces", "sysctl"):
        given.pop(name, None)
    if linux.intel_rdt:
        raise UnsupportedError("'linux.intelRdt' is not supported: the host's processors are not the guest's")
    given.pop("intelRdt", None)
    if linux.personality is not None and linux.personality.flags:
        raise UnsupportedError(
            f"'linux.personality.flags' has '{linux.personality.flags[0][:64]}': the specification knows no flags"
        )
    given["namespaces"] = _namespaces(bundle, kind=kind)
    own = {namespace["type"] for namespace in given["namespaces"]}
    if "uts" in own:
        document.update({name: getattr(bundle.spec, name) for name in _names(bundle)})
    if {"time", "user"} <= own:
        raise UnsupportedError(
            "'linux.namespaces' has a time namespace beside a user namespace, which is not supported: who is root "
            "only in a user namespace cannot set its clocks"
        )
    _devices(bundle, given, result, root=root)
    if linux.seccomp is not None:
        if linux.seccomp.listener_path:
            raise UnsupportedError("'linux.seccomp.listenerPath' is not supported: the listener is not in the guest")
        document["annotations"] = _compiled(linux.seccomp, cache)
    for name, setting in linux.sysctl.items():
        dotted = name.replace("/", ".")
        if not dotted.startswith(_POD_SYSCTLS):
            raise UnsupportedError(f"'linux.sysctl' has '{name}', which belongs to no namespace of a container")
        if ("ipc" in own and dotted.startswith(_IPC_SYSCTLS)) or ("uts" in own and dotted in _UTS_SYSCTLS):
            given.setdefault("sysctl", {})[dotted] = setting
        else:
            result.sysctls[dotted] = setting
    if bundle.spec.domainname and kind != "container" and "uts" not in own:
        result.sysctls["kernel.domainname"] = bundle.spec.domainname


def _names(bundle: Bundle) -> list[str]:
    return [name for name in ("hostname", "domainname") if getattr(bundle.spec, name)]


def _devices(bundle: Bundle, given: dict[str, Any], result: Translated, *, root: nodes.Numbers | None) -> None:
    """Devices, and the limits that name some."""
    linux = bundle.spec.linux
    rules = linux.resources.devices if linux.resources is not None else ()
    found = nodes.sort(linux.devices, rules)
    result.disks += found.disks
    result.left_out += found.left_out
    if linux.devices:
        given["devices"] = [_guest_device(given["devices"][index]) for index in found.guest]
    if linux.resources is not None:
        given["resources"] = guest_resources(given.get("resources") or {})
        plugged = [disk.numbers for disk in result.disks]
        nodes.check_block_io(given["resources"].get("blockIO") or {}, [*plugged, root] if root else plugged)


def _guest_device(entry: dict[str, Any]) -> dict[str, Any]:
    """Engines put the type into the mode as well, which crun does not take."""
    mode = entry.get("fileMode")
    return entry if mode is None else {**entry, "fileMode": mode & 0o7777}


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


def _namespaces(bundle: Bundle, *, kind: Kind) -> list[dict[str, str]]:
    linux, member = bundle.spec.linux, kind == "container"
    for needed, why in (
        ("network", "the host's network cannot be a virtual machine's"),
        ("pid", "the host's processes are out of a virtual machine's reach"),
        ("ipc", "the host's IPC objects are out of a virtual machine's reach"),
    ):
        if linux.namespace(needed) is None:
            raise UnsupportedError(f"'linux.namespaces' has no {needed} namespace: {why}")
    made = [{"type": "mount"}, {"type": "cgroup"}]
    # Who is root only in a user namespace rules only namespaces that were made in it.
    alone = kind == "single" and linux.namespace("user") is not None
    for namespace in linux.namespaces:
        if namespace.type in ("pid", "user", "time"):
            if namespace.path:
                raise UnsupportedError(
                    f"'linux.namespaces' joins the {namespace.type} namespace '{namespace.path}', which is not "
                    "supported: it is the host's"
                )
            made.append({"type": namespace.type})
        elif namespace.type in ("mount", "cgroup") and namespace.path:
            raise UnsupportedError(f"'linux.namespaces' joins a {namespace.type} namespace, which is not supported")
        elif namespace.type in ("ipc", "uts"):
            if namespace.path and not member:
                raise UnsupportedError(
                    f"'linux.namespaces' joins the {namespace.type} namespace '{namespace.path}': only containers of "
                    "one pod can share it"
                )
            if not namespace.path and (member or alone):
                made.append({"type": namespace.type})
        elif namespace.type == "network" and member and not namespace.path:
            raise UnsupportedError("'linux.namespaces' asks for a new network: a pod has one network for all")
    return made
