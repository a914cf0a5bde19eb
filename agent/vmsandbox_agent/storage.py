"""Mounts that the host asks for, counted by their mount point.

Storages of one request are made in order; if one fails, those made by the same request are undone in reverse
and the failure is reported.  The source of a block storage is waited for, since the host plugs it in at the same time.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from vmsandbox_agent import devices
from vmsandbox_agent import syscalls as sc
from vmsandbox_agent.errors import AgentError, InvalidArgumentError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from vmsandbox_agent.devices import BlockDevice
    from vmsandbox_protocol import agent_pb2 as pb

# The numbers of Storage.Driver, so that nothing here needs the generated code at run time.
BLOCK, VIRTIOFS, NINEP, OVERLAY, TMPFS, BIND, BLOCK_DEVICE = range(1, 8)

_FLAGS = {
    "ro": sc.MS_RDONLY,
    "nosuid": sc.MS_NOSUID,
    "nodev": sc.MS_NODEV,
    "noexec": sc.MS_NOEXEC,
    "sync": 16,
    "dirsync": 128,
    "noatime": 1024,
    "nodiratime": 2048,
    "relatime": 1 << 21,
    "strictatime": 1 << 24,
    "bind": sc.MS_BIND,
    "rbind": sc.MS_BIND | sc.MS_REC,
}
_NO_FLAGS = {"rw", "suid", "dev", "exec", "async", "atime", "diratime", "defaults"}
_PROPAGATION = {
    "private": sc.MS_PRIVATE,
    "rprivate": sc.MS_PRIVATE | sc.MS_REC,
    "slave": sc.MS_SLAVE,
    "rslave": sc.MS_SLAVE | sc.MS_REC,
    "shared": sc.MS_SHARED,
    "rshared": sc.MS_SHARED | sc.MS_REC,
}


#: what mounting a share says whose device is not there
_UNKNOWN_SHARE = {"virtiofs": errno.EINVAL, "9p": errno.ENOENT}


class Options(NamedTuple):
    """mount(8) options taken apart."""

    flags: int
    propagation: int
    data: list[str]


class _Mounted:
    def __init__(self, references: int, *, is_mount: bool, address: BlockDevice | None, made: bool) -> None:
        self.references = references
        self.is_mount = is_mount
        self.address = address
        self.made = made


def parse_options(options: Iterable[str]) -> Options:
    flags = propagation = 0
    data: list[str] = []
    for option in options:
        if option in _FLAGS:
            flags |= _FLAGS[option]
        elif option in _PROPAGATION:
            propagation |= _PROPAGATION[option]
        elif option and option not in _NO_FLAGS:
            data.append(option)
    return Options(flags, propagation, data)


class Storages:
    """Everything that is mounted below `base` on the host's behalf."""

    def __init__(
        self,
        base: Path,
        calls: sc.SystemCalls,
        *,
        find_block: Callable[[str, int], BlockDevice] = devices.wait_for_block,
        wait_for: Callable[[Callable[[], bool | None], str], object] = devices.wait_for,
    ) -> None:
        self._base = str(base)
        self._calls = calls
        self._find_block = find_block
        self._wait_for = wait_for
        self._lock = threading.Lock()
        self._mounted: dict[str, _Mounted] = {}

    def add(self, storages: Sequence[pb.Storage]) -> dict[str, BlockDevice]:
        """Mount all of them or none; answers where block storages were found, by mount point."""
        added: list[str] = []
        addresses = {}
        found = [self._device(storage) for storage in storages]  # may take long, so not under the lock
        with self._lock:
            try:
                for storage, device in zip(storages, found, strict=True):
                    point = self._checked_point(storage.mount_point)
                    mounted = self._mounted.get(point)
                    if mounted is None:
                        mounted = self._mounted[point] = self._mount(storage, point, device)
                    else:
                        mounted.references += 1
                    added.append(point)
                    if mounted.address is not None:
                        addresses[storage.mount_point] = mounted.address
            except BaseException:
                for point in reversed(added):
                    with suppress(OSError, AgentError):
                        self._drop(point)
                raise
        return addresses

    def remove(self, points: Iterable[str]) -> None:
        """Drop one reference of each, the last first; all are tried, the first failure is raised."""
        failure: Exception | None = None
        with self._lock:
            for point in reversed([*points]):
                try:
                    self._drop(self._checked_point(point))
                except (OSError, AgentError) as error:
                    failure = failure or error
        if failure is not None:
            raise failure

    def remove_all(self) -> None:
        """Unmount everything, whoever refers to it; what is busy is detached."""
        with self._lock:
            for point, mounted in reversed([*self._mounted.items()]):
                mounted.references = 1
                try:
                    self._drop(point)
                except (OSError, AgentError):
                    with suppress(OSError):
                        self._calls.umount(point, sc.MNT_DETACH)
            self._mounted.clear()

    def _checked_point(self, point: str) -> str:
        normal = os.path.normpath(point)
        if not normal.startswith(self._base + "/"):
            raise InvalidArgumentError(f"mount point '{point}' is not below '{self._base}'")
        return normal

    def _drop(self, point: str) -> None:
        mounted = self._mounted.get(point)
        if mounted is None:
            raise NotFoundError(f"nothing is mounted at '{point}'")
        if mounted.references > 1:
            mounted.references -= 1
            return
        if mounted.is_mount:
            self._calls.umount(point, sc.UMOUNT_NOFOLLOW)
        del self._mounted[point]
        if mounted.made or not mounted.is_mount:
            with suppress(OSError):
                os.rmdir(point) if os.path.isdir(point) else os.unlink(point)

    def _device(self, storage: pb.Storage) -> BlockDevice | None:
        """The block device of a storage that has one."""
        if storage.driver not in (BLOCK, BLOCK_DEVICE):
            return None
        if storage.pci_path:
            return self._find_block(storage.pci_path, storage.partition)
        try:
            return devices.block_device_at(storage.source)
        except OSError as error:
            raise NotFoundError(f"block device '{storage.source}' cannot be used: {error.strerror}") from error

    def _mount(self, storage: pb.Storage, point: str, address: BlockDevice | None) -> _Mounted:
        options = parse_options(storage.options)
        source, fstype, data = storage.source, storage.fstype, options.data
        if address is not None:
            source = address.node
        if storage.driver == BLOCK_DEVICE:
            assert address is not None
            self._make_node(storage, point, address)
            return _Mounted(1, is_mount=False, address=address, made=True)
        if storage.driver == BLOCK:
            fstype = fstype or "ext4"
        elif storage.driver == VIRTIOFS:
            fstype = "virtiofs"
        elif storage.driver == NINEP:
            fstype = "9p"
            data = data if any(option.startswith("trans=") for option in data) else ["trans=virtio", *data]
        elif storage.driver == TMPFS:
            source, fstype = source or "tmpfs", "tmpfs"
        elif storage.driver == OVERLAY:
            source, fstype = source or "overlay", "overlay"
            data = [*self._overlay_options(storage), *data]
        elif storage.driver != BIND:
            raise InvalidArgumentError(f"storage driver {storage.driver} of '{point}' is unknown")
        made = self._make_point(point, file=storage.driver == BIND and not os.path.isdir(source))
        try:
            if storage.driver == BIND:
                self._bind(source, point, options)
            else:
                self._mount_when_there(source, point, fstype, options.flags, ",".join(data))
                if options.propagation:
                    self._calls.mount("", point, "", options.propagation)
        except BaseException as error:
            if made:
                with suppress(OSError):
                    os.rmdir(point) if os.path.isdir(point) else os.unlink(point)
            if isinstance(error, OSError):
                raise AgentError(
                    f"cannot mount '{source}' as {fstype or 'bind'} at '{point}': {error.strerror}"
                ) from error
            raise
        return _Mounted(1, is_mount=True, address=address, made=made)

    def _mount_when_there(self, source: str, point: str, fstype: str, flags: int, data: str) -> None:
        """Mount; a share that the guest has not heard of yet is waited for, since the host plugs it in meanwhile."""
        missing = _UNKNOWN_SHARE.get(fstype)

        def mount() -> bool | None:
            try:
                self._calls.mount(source, point, fstype, flags, data)
            except OSError as error:
                if error.errno != missing:
                    raise
                return None
            return True

        if mount() is None:
            self._wait_for(mount, f"share '{source}'")

    def _bind(self, source: str, point: str, options: Options) -> None:
        recursive = options.flags & sc.MS_REC
        self._calls.mount(source, point, "", sc.MS_BIND | recursive)
        try:
            attributes = options.flags & ~(sc.MS_BIND | sc.MS_REC)
            if attributes:
                self._calls.mount("", point, "", sc.MS_BIND | sc.MS_REMOUNT | attributes)
            if options.propagation:
                self._calls.mount("", point, "", options.propagation)
        except BaseException:
            self._calls.umount(point, sc.MNT_DETACH)
            raise

    def _overlay_options(self, storage: pb.Storage) -> list[str]:
        lower = ":".join(_escaped(path) for path in storage.lower)
        if not storage.upper:
            return [f"lowerdir={lower}"]
        for path in (storage.upper, storage.work):
            os.makedirs(self._checked_point(path), mode=0o755, exist_ok=True)
        return [f"lowerdir={lower}", f"upperdir={_escaped(storage.upper)}", f"workdir={_escaped(storage.work)}"]

    @staticmethod
    def _make_point(point: str, *, file: bool) -> bool:
        if os.path.lexists(point):
            return False
        if file:
            os.makedirs(os.path.dirname(point), exist_ok=True)
            os.close(os.open(point, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
        else:
            os.makedirs(point)
        return True

    @staticmethod
    def _make_node(storage: pb.Storage, point: str, address: BlockDevice) -> None:
        os.makedirs(os.path.dirname(point), exist_ok=True)
        with suppress(FileNotFoundError):
            os.unlink(point)
        mode = storage.mode & 0o7777 or 0o660
        os.mknod(point, stat.S_IFBLK | mode, os.makedev(address.major, address.minor))
        os.chmod(point, mode)
        os.chown(point, storage.uid, storage.gid)


def _escaped(path: str) -> str:
    """A path in overlayfs' options, where commas and colons separate."""
    return path.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")


def mount_on_demand(sources: list[str]) -> None:
    """Have the kernel mount what it mounts when somebody goes there: the parts of a share that are file systems.

    For a user namespace crun takes its copies of sources without going there.  What is mounted in a copy later
    has not all of the copy's options.
    """
    for source in sources:
        with suppress(OSError):  # no directory, or none of a bind mount
            os.stat(f"{source}/.")
