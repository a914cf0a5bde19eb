"""The mounts of a composed container: system file systems, the pod's files, volumes and tmpfs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmsandbox.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vmsandbox.oci.options import RunOptions

#: files of the pod that every container sees, where the agent keeps them in the guest
POD_FILES = {f"/etc/{name}": f"/run/vmsandbox/etc/{name}" for name in ("hosts", "hostname", "resolv.conf")}


def container_mounts(
    options: RunOptions,
    *,
    shm_bytes: int,
    volume_sources: Mapping[str, str],
    files: Mapping[str, str],
    shm: str,
) -> list[dict[str, Any]]:
    """The default mounts, then files, volumes and tmpfs from the root down; the options' replace the defaults.

    `volume_sources` maps destinations of volumes to paths in the guest, `files` paths in the container to files of the
    guest.  `shm` is the guest's directory that becomes /dev/shm; empty: a tmpfs of `shm_bytes` of its own.
    Raises InvalidArgumentError if a volume has no source or two mounts claim one place.
    """
    asked: dict[str, dict[str, Any]] = {}
    for volume in options.volumes:
        source = volume_sources.get(volume.destination)
        if source is None:
            raise InvalidArgumentError(f"volume '{volume.source}' at '{volume.destination}' has not been shared")
        access = "ro" if volume.read_only else "rw"
        _claim(asked, volume.destination, _bind(volume.destination, source, access))
    for tmpfs in options.tmpfs:
        flags = {"noexec": "exec", "nosuid": "suid", "nodev": "dev"}
        chosen = [flag for flag, undo in flags.items() if undo not in tmpfs.options and flag not in tmpfs.options]
        _claim(asked, tmpfs.destination, _mount(tmpfs.destination, "tmpfs", "tmpfs", [*chosen, *tmpfs.options]))
    access = "ro" if options.read_only else "rw"
    provided = {path: _bind(path, source, access) for path, source in files.items()}
    system = _system_mounts(shm_bytes, shm, writable=options.privileged)
    later = {**provided, **asked}
    for path in asked:
        system.pop(path, None)
    return [*system.values(), *sorted(later.values(), key=lambda mount: str(mount["destination"]).count("/"))]


def _claim(mounts: dict[str, dict[str, Any]], path: str, mount: dict[str, Any]) -> None:
    if path in mounts:
        raise InvalidArgumentError(f"mount point '{path}' is given twice")
    mounts[path] = mount


def _system_mounts(shm_bytes: int, shm: str, *, writable: bool) -> dict[str, dict[str, Any]]:
    quiet = ["nosuid", "noexec", "nodev"]
    access = [] if writable else ["ro"]
    if shm:
        shared_memory = _mount("/dev/shm", "bind", shm, ["rbind", "rprivate", *quiet])
    else:
        shared_memory = _mount("/dev/shm", "tmpfs", "shm", [*quiet, "mode=1777", f"size={shm_bytes}"])
    mounts = (
        _mount("/proc", "proc", "proc", quiet),
        _mount("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
        _mount(
            "/dev/pts", "devpts", "devpts", ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]
        ),
        _mount("/sys", "sysfs", "sysfs", [*quiet, *access]),
        _mount("/sys/fs/cgroup", "cgroup", "cgroup", [*quiet, *access]),
        _mount("/dev/mqueue", "mqueue", "mqueue", quiet),
        shared_memory,
    )
    return {str(mount["destination"]): mount for mount in mounts}


def _bind(path: str, source: str, access: str) -> dict[str, Any]:
    return _mount(path, "bind", source, ["rbind", "rprivate", access])


def _mount(path: str, kind: str, source: str, options: Sequence[str]) -> dict[str, Any]:
    return {"destination": path, "type": kind, "source": source, "options": list(options)}
