"""Writes the entries of layers into a tree, lowest layer first.

Whiteouts (``.wh.NAME``) and opaque marks (``.wh..wh..opq``) take away what lower layers have, wherever in its archive
a layer puts them.  Owners, modes, modification times, extended attributes, device nodes and hard links come out as
the archive has them, with these exceptions: times before 1970 become 1970, which is the oldest erofs can tell;
``security.selinux`` and ``system.nfs4_acl`` speak of the machine that made the image, and overlayfs' own
attributes would be obeyed by the overlay the container runs on: these are left out.
"""

from __future__ import annotations

import errno
import os
import stat
import tarfile
from typing import TYPE_CHECKING

from vmsandbox.errors import InvalidArgumentError, SandboxError
from vmsandbox.resources.images.store import storage_error
from vmsandbox.resources.images.streams import Budget, Buffered, Measured, Section, StreamError, decompressed
from vmsandbox.resources.images.tarstream import Entry, TarError, TarReader
from vmsandbox.resources.images.tree import Place, Tree, TreeError, check_path, described, split

if TYPE_CHECKING:
    from pathlib import Path


_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"
#: Names that aufs keeps for itself.
_RESERVED = ".wh..wh."
_LEFT_OUT = ("security.selinux", "system.nfs4_acl")
_LEFT_OUT_PREFIXES = ("trusted.overlay.", "user.overlay.")
_ID_MAX = (1 << 32) - 2
#: the largest that fits into a signed 64-bit number of nanoseconds
_TIME_MAX_NS = (1 << 63) - 1
#: Failures of the machine; every other one is put down to the entry that met it.
_MACHINE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_NODES = {tarfile.CHRTYPE: stat.S_IFCHR, tarfile.BLKTYPE: stat.S_IFBLK, tarfile.FIFOTYPE: stat.S_IFIFO}


class Layers:
    """Writes one layer after the other into the directory `root`."""

    def __init__(self, root: Path, *, max_bytes: int, max_entries: int) -> None:
        self._root = root
        self._budget = Budget(max_bytes)
        self._max_entries = max_entries
        self._entries = 0
        self._count = 0
        self._tree = Tree(root)

    def __enter__(self) -> Layers:
        return self

    def __exit__(self, *_: object) -> None:
        self._tree.__exit__()

    def add(self, blob: Section, *, title: str) -> str:
        """Unpack one layer, which may be compressed; returns the digest of what it is uncompressed.

        Raises `InvalidArgumentError` naming the layer by `title` and the entry, `ExhaustedError` on a full disk.
        """
        self._tree.begin_layer(lowest=self._count == 0)
        self._count += 1
        entry: Entry | None = None
        try:
            with decompressed(blob) as content:
                measured = Measured(content, self._budget)
                reader = TarReader(Buffered(measured))
                for entry in reader:
                    self._count_entry(entry)
                    self._apply(entry, reader)
                    entry = None
                return measured.finish()
        except OSError as error:
            if error.errno in _MACHINE_ERRORS:
                raise storage_error(error, f"unpack layer {title}", self._root) from error
            raise InvalidArgumentError(_where(title, entry, error.strerror or str(error))) from error
        except TarError as error:
            raise InvalidArgumentError(_where(title, None, str(error))) from error
        except InvalidArgumentError as error:
            raise type(error)(_where(title, entry, str(error))) from error
        except SandboxError as error:
            raise type(error)(_where(title, None, str(error))) from error

    def finish(self) -> None:
        """Set what can only be set when everything is in its place: the times of directories."""
        self._tree.finish()

    def _count_entry(self, entry: Entry) -> None:
        self._entries += 1
        if self._entries > self._max_entries:
            raise StreamError(f"the image has more than {self._max_entries} entries: allow more with '--max-entries'")
        if entry.segments is not None:
            # What a sparse file's holes take later, beyond the data that is counted as it is read.
            self._budget.spend(entry.size - sum(length for _, length in entry.segments))

    def _apply(self, entry: Entry, reader: TarReader) -> None:
        parts = split(entry.name)
        if not parts:
            if entry.kind != tarfile.DIRTYPE:
                raise TreeError("it has no name")
            self._write_directory(self._whole(()), entry)
            return
        *above, name = parts
        if any(part.startswith(_RESERVED) for part in parts) and name != _OPAQUE:
            return
        place = self._whole(tuple(above))
        if name.startswith(_WHITEOUT):
            self._hide(place, name)
            return
        check_path(place.child(name))
        status = self._tree.status(place, name)
        if entry.kind == tarfile.DIRTYPE:
            self._directory(place, name, status, entry)
        elif entry.kind == tarfile.LNKTYPE:
            self._hard_link(tuple(above), name, status, entry)
        else:
            self._clear(place, name, status)
            if entry.kind == tarfile.REGTYPE:
                self._file(place, name, entry, reader)
            elif entry.kind == tarfile.SYMTYPE:
                self._tree.add_link(place, name, entry.link)
                self._write_metadata(place, name, entry)
            elif entry.kind in _NODES:
                self._node(place, name, entry)
            else:
                raise TreeError(f"it is of a type that is not known: {entry.kind!r}")
        self._tree.written(place.child(name))

    def _whole(self, parts: tuple[str, ...]) -> Place:
        place = self._tree.parent(parts, make=True)
        assert place is not None
        return place

    def _hide(self, place: Place, name: str) -> None:
        if name == _OPAQUE:
            self._tree.hide_all(place)
            return
        hidden = name.removeprefix(_WHITEOUT)
        if hidden in ("", ".", ".."):
            raise TreeError("it is a whiteout of nothing")
        self._tree.hide(place, hidden)

    def _clear(self, place: Place, name: str, status: os.stat_result | None) -> None:
        if status is not None:
            self._tree.remove(place, name, status)

    def _directory(self, place: Place, name: str, status: os.stat_result | None, entry: Entry) -> None:
        if status is None or not stat.S_ISDIR(status.st_mode):
            self._clear(place, name, status)
            os.mkdir(name, 0o700, dir_fd=place.descriptor)
        descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=place.descriptor)
        try:
            self._write_directory(Place(descriptor, place.child(name)), entry)
        finally:
            os.close(descriptor)

    def _write_directory(self, directory: Place, entry: Entry) -> None:
        for attribute in os.listxattr(directory.descriptor):
            if attribute not in _LEFT_OUT:
                os.removexattr(directory.descriptor, attribute)
        self._write_by_descriptor(directory.descriptor, entry)
        self._tree.set_time(directory.path, _time(entry))

    def _hard_link(self, above: tuple[str, ...], name: str, status: os.stat_result | None, entry: Entry) -> None:
        target = split(entry.link)
        if not target:
            raise TreeError("it is a hard link to nothing")
        found = self._tree.parent(target[:-1], make=False)
        source = None if found is None else self._tree.status(found, target[-1])
        if found is None or source is None:
            raise TreeError(f"it is a hard link to '{entry.link}', which the image does not have")
        if stat.S_ISDIR(source.st_mode):
            raise TreeError(f"it is a hard link to '{entry.link}', which is {described(source.st_mode)}")
        if status is not None and (status.st_dev, status.st_ino) == (source.st_dev, source.st_ino):
            return
        source_directory = os.dup(found.descriptor)
        try:
            place = self._whole(above)
            self._clear(place, name, status)
            os.link(
                target[-1],
                name,
                src_dir_fd=source_directory,
                dst_dir_fd=place.descriptor,
                follow_symlinks=False,
            )
        finally:
            os.close(source_directory)

    def _file(self, place: Place, name: str, entry: Entry, reader: TarReader) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(name, flags, 0o600, dir_fd=place.descriptor)
        try:
            for offset, chunk in reader.data(entry):
                _write_at(descriptor, chunk, offset)
            if entry.segments is not None:
                os.ftruncate(descriptor, entry.size)
            self._write_by_descriptor(descriptor, entry)
            os.utime(descriptor, ns=(_time(entry), _time(entry)))
        finally:
            os.close(descriptor)

    def _node(self, place: Place, name: str, entry: Entry) -> None:
        major, minor = entry.device
        if entry.kind != tarfile.FIFOTYPE and not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):
            raise TreeError(f"no device can have the numbers {major}:{minor}")
        device = 0 if entry.kind == tarfile.FIFOTYPE else os.makedev(major, minor)
        os.mknod(name, _NODES[entry.kind] | 0o600, device, dir_fd=place.descriptor)
        self._write_metadata(place, name, entry)

    def _write_by_descriptor(self, descriptor: int, entry: Entry) -> None:
        """Owner, mode and attributes, in the order in which none takes back another."""
        os.fchown(descriptor, *_owner(entry))
        os.fchmod(descriptor, entry.mode)
        for name, value in _attributes(entry):
            _set_attribute(descriptor, name, value, follow_symlinks=True)

    def _write_metadata(self, place: Place, name: str, entry: Entry) -> None:
        """The same for what cannot be opened: links and device nodes."""
        os.chown(name, *_owner(entry), dir_fd=place.descriptor, follow_symlinks=False)
        if entry.kind != tarfile.SYMTYPE:
            # Follows links, but `name` is the node just made.
            os.chmod(name, entry.mode, dir_fd=place.descriptor)
        for attribute, value in _attributes(entry):
            if attribute.startswith("user."):
                continue  # the kernel has these on files and directories only
            path = f"/proc/self/fd/{place.descriptor}/{name}"
            _set_attribute(path, attribute, value, follow_symlinks=False)
        os.utime(name, ns=(_time(entry), _time(entry)), dir_fd=place.descriptor, follow_symlinks=False)


def _where(title: str, entry: Entry | None, reason: str) -> str:
    place = f", entry '{entry.name}'" if entry is not None else ""
    return f"cannot unpack layer {title}{place}: {reason}"


def _owner(entry: Entry) -> tuple[int, int]:
    if not (0 <= entry.uid <= _ID_MAX and 0 <= entry.gid <= _ID_MAX):
        raise TreeError(f"no file can have the owner {entry.uid}:{entry.gid}")
    return entry.uid, entry.gid


def _time(entry: Entry) -> int:
    return min(max(entry.mtime_ns, 0), _TIME_MAX_NS)


def _attributes(entry: Entry) -> list[tuple[str, bytes]]:
    return [
        (name, value)
        for name, value in entry.xattrs.items()
        if name not in _LEFT_OUT and not name.startswith(_LEFT_OUT_PREFIXES)
    ]


def _set_attribute(target: int | str, name: str, value: bytes, *, follow_symlinks: bool) -> None:
    try:
        os.setxattr(target, name, value, follow_symlinks=follow_symlinks)
    except OSError as error:
        reason = error.strerror
        if error.errno == errno.ENOTSUP:
            reason = "the file system of the data root has no such attributes"
        if error.errno in _MACHINE_ERRORS and error.errno != errno.ENOSPC:
            raise
        # ENOSPC also means that all attributes of one file are too large together, on a disk with room.
        raise TreeError(f"cannot set its attribute '{name}' of {len(value)} bytes: {reason}") from error


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    written = os.pwrite(descriptor, data, offset)
    while written < len(data):
        written += os.pwrite(descriptor, data[written:], offset + written)
