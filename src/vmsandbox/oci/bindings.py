"""The mounts of config.json: what the guest makes itself, what of the host has to be shared, what is refused.

Bind mounts of the host's files and directories become sources to share.  A socket or a FIFO crosses as a name: both its
ends have to be in the virtual machine.  Devices cross as in `nodes`, disks by being plugged.  Trees of a kernel
(``/proc``, ``/sys``, ``/dev``) are the guest's.

Pure but for looking at the sources.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vmsandbox.errors import InvalidBundleError, UnsupportedError
from vmsandbox.oci import nodes

if TYPE_CHECKING:
    from vmsandbox.oci.bundle import Bundle
    from vmsandbox.oci.spec import Mount

#: file systems that the guest makes itself
MADE_IN_GUEST = frozenset(
    {
        *("proc", "sysfs", "tmpfs", "ramfs", "devpts", "mqueue", "cgroup", "cgroup2", "hugetlbfs"),
        *("bpf", "configfs", "debugfs", "devtmpfs", "fusectl", "securityfs", "tracefs"),
    }
)
#: trees of a kernel, which is the guest's
KERNEL_TREES = ("/proc", "/sys")
DEV = "/dev"
SHM = "/dev/shm"
_SHM_BYTES = 64 << 20
#: options that map ids of the mount
_MAPPING = ("idmap", "ridmap")
#: what the guest's crun takes for a bind mount; anything else it would hand to a kernel that does not look at it
OPTIONS = frozenset(
    {
        *("async", "atime", "bind", "defaults", "dev", "diratime", "dirsync", "exec", "mand", "noatime", "nodev"),
        *("nodiratime", "noexec", "nomand", "norelatime", "nostrictatime", "nosuid", "private", "rbind", "relatime"),
        *("remount", "ro", "rprivate", "rro", "rrw", "rshared", "rslave", "runbindable", "rw", "shared", "slave"),
        *("strictatime", "suid", "sync", "tmpcopyup", "unbindable"),
        *("rdev", "rdiratime", "rexec", "rnoatime", "rnodev", "rnodiratime", "rnoexec", "rnorelatime"),
        *("rnostrictatime", "rnosuid", "rrelatime", "rstrictatime", "rsuid"),
    }
)
#: crun knows of no such flag of a mount
_UNKNOWN = frozenset({"nosymfollow", "symfollow"})


@dataclass(frozen=True, kw_only=True)
class Source:
    """Something of the host that a container needs to see; `destination` is ``/`` for its root."""

    path: str
    destination: str
    read_only: bool


@dataclass(kw_only=True)
class Mounts:
    """What the mounts come to."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    #: index in `entries` -> index in `sources`
    shared: dict[int, int] = field(default_factory=dict)
    disks: list[nodes.HostDisk] = field(default_factory=list)


def sorted_out(bundle: Bundle, *, in_pod: bool) -> Mounts:
    """Take the mounts of a bundle apart.  Raises InvalidBundleError and UnsupportedError naming the entry."""
    made = Mounts()
    last_shm = max((n for n, each in enumerate(bundle.spec.mounts) if each.destination == SHM), default=-1)
    for index, mount in enumerate(bundle.spec.mounts):
        if mount.uid_mappings or mount.gid_mappings or any(_maps(option) for option in mount.options):
            raise UnsupportedError(
                f"'mounts[{index}]' maps ids, which is not supported: the guest cannot map those of shared directories"
            )
        _check_options(mount, index)
        entry = {
            "destination": mount.destination,
            "type": mount.type,
            "source": mount.source,
            "options": list(mount.options),
        }
        if mount.destination == SHM and (is_bind(mount) or mount.type in MADE_IN_GUEST):
            if index == last_shm:
                made.entries.append(_shared_memory(entry, mount, in_pod=in_pod))
        elif is_bind(mount):
            if not mount.source:
                raise InvalidBundleError(f"'mounts[{index}].source' is empty: a bind mount is of a file or directory")
            _bind(made, index, mount, {**entry, "type": "bind"}, os.path.normpath(bundle.directory / mount.source))
        elif mount.type in MADE_IN_GUEST:
            made.entries.append(entry)
        else:
            raise UnsupportedError(
                f"'mounts[{index}].type' is '{mount.type}', which cannot be mounted in a virtual machine"
            )
    return made


def _maps(option: str) -> bool:
    return option in _MAPPING or option.startswith(("idmap=", "ridmap="))


def _check_options(mount: Mount, index: int) -> None:
    # Of /dev/shm, which is the guest's, they are not used.
    known = OPTIONS | {""} if is_bind(mount) and mount.destination != SHM else None
    for option in mount.options:
        if option in _UNKNOWN or (known is not None and option not in known):
            raise UnsupportedError(
                f"'mounts[{index}].options' has '{option[:64]}', which is not supported: 'features' lists what is"
            )


def is_bind(mount: Mount) -> bool:
    return mount.type == "bind" or "bind" in mount.options or "rbind" in mount.options


def _read_only(mount: Mount) -> bool:
    access = [option for option in mount.options if option in ("ro", "rro", "rw")]
    return bool(access) and access[-1] != "rw"


def _bind(made: Mounts, index: int, mount: Mount, entry: dict[str, Any], source: str) -> None:
    if source == DEV or _below(source, KERNEL_TREES):
        # The guest's own: what the kernel tells there is about the virtual machine.
        made.entries.append({**entry, "source": source})
        return
    status = _status(source, index)
    if stat.S_ISCHR(status.st_mode):
        _character_device(made, index, entry, source, status)
        return
    if stat.S_ISBLK(status.st_mode):
        made.disks.append(
            nodes.HostDisk(
                member=f"mounts[{index}]",
                path=mount.destination,
                numbers=(os.major(status.st_rdev), os.minor(status.st_rdev)),
                read_only=_read_only(mount),
                mode=stat.S_IMODE(status.st_mode),
                uid=status.st_uid,
                gid=status.st_gid,
                mount=len(made.entries),
            )
        )
    else:
        made.shared[len(made.entries)] = len(made.sources)
        made.sources.append(Source(path=source, destination=mount.destination, read_only=_read_only(mount)))
    made.entries.append(entry)


def _character_device(made: Mounts, index: int, entry: dict[str, Any], source: str, status: os.stat_result) -> None:
    major, minor = os.major(status.st_rdev), os.minor(status.st_rdev)
    if not source.startswith(DEV + "/") or not nodes.is_same_everywhere(major, minor):
        raise UnsupportedError(
            f"cannot share '{source}' of 'mounts[{index}]': device {major}:{minor} is the host's, and only the "
            "devices that every Linux has are in a virtual machine"
        )
    made.entries.append({**entry, "source": source})


def _below(path: str, places: tuple[str, ...]) -> bool:
    return any(path == place or path.startswith(place + "/") for place in places)


def _status(path: str, index: int) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        reason = (error.strerror or "unknown").lower()
        raise InvalidBundleError(f"cannot use the source '{path}' of 'mounts[{index}]': {reason}") from error


def _shared_memory(entry: dict[str, Any], mount: Mount, *, in_pod: bool) -> dict[str, Any]:
    """/dev/shm is the guest's: memory of the host cannot be shared with programs in it."""
    if not is_bind(mount):
        return entry
    quiet = ["nosuid", "noexec", "nodev"]
    if in_pod:
        return {**entry, "type": "bind", "source": SHM, "options": ["rbind", "rprivate", *quiet]}
    try:
        read = os.statvfs(mount.source)
        size = read.f_frsize * read.f_blocks
    except OSError:
        size = _SHM_BYTES
    options = [*quiet, "mode=1777", f"size={size or _SHM_BYTES}"]
    return {**entry, "type": "tmpfs", "source": "shm", "options": options}
