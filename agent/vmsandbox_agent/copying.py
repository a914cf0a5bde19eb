"""Files into and out of a container, as tar archives.

The container may be hostile and running: every name is looked up with the container's root as root, so that no symlink,
however it changes meanwhile, leads elsewhere, and the last component of what is written is never followed.  An
archive may be hostile too: names are taken apart, ``..`` is refused, and devices are made only where the host
sends them.
"""

from __future__ import annotations

import errno
import os
import stat
import tarfile
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, BinaryIO, cast

from vmsandbox_agent.errors import AgentError, ExhaustedError, InvalidArgumentError, NotFoundError
from vmsandbox_agent.syscalls import open_in_root

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

CHUNK = 256 * 1024
_DIRECTORY = os.O_PATH | os.O_DIRECTORY
_XATTR_PREFIX = "SCHILY.xattr."
_XATTR_LIMIT = 64 * 1024
_DEPTH = 200


class _Incoming:
    """The pieces of a request stream as a file."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._rest = memoryview(b"")
        self.taken = 0

    def read(self, size: int) -> bytes:
        parts = []
        while size > 0:
            if not self._rest:
                piece = next(self._pieces, None)
                if piece is None:
                    break
                self._rest = memoryview(piece)
                continue
            part = self._rest[:size]
            self._rest = self._rest[len(part) :]
            size -= len(part)
            parts.append(part)
        data = b"".join(parts)
        self.taken += len(data)
        return data

    def exhaust(self) -> None:
        for piece in self._pieces:
            self.taken += len(piece)


def copy_in(root: int, path: str, pieces: Iterable[bytes]) -> int:
    """Unpack an archive into the directory `path` below the root directory `root`; answers its size in bytes."""
    incoming = _Incoming(pieces)
    with _opened(root, path, _DIRECTORY, "directory") as top:
        try:
            with _reading(incoming) as archive:
                directories: list[tuple[str, tarfile.TarInfo]] = []
                for member in archive:
                    _unpack(root, top, path, archive, member, directories)
                for name, member in reversed(directories):  # what was made in them changed their times
                    with _parent(root, path, name) as (parent, last), suppress(OSError):
                        os.utime(last, ns=_times(member), dir_fd=parent, follow_symlinks=False)
        except tarfile.TarError as error:
            raise InvalidArgumentError(f"the archive for '{path}' is not a tar archive: {error}") from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ExhaustedError(
                    f"there is no space left at '{path}': remove files there, or start with a larger '--scratch-size'"
                ) from error
            raise AgentError(f"cannot write below '{path}': {error.strerror}") from error
        incoming.exhaust()
    return incoming.taken


def _reading(incoming: _Incoming) -> tarfile.TarFile:
    source = cast("BinaryIO", incoming)
    return tarfile.open(fileobj=source, mode="r|", bufsize=CHUNK, encoding="utf-8", errors="surrogateescape")


def _unpack(
    root: int,
    top: int,
    path: str,
    archive: tarfile.TarFile,
    member: tarfile.TarInfo,
    directories: list[tuple[str, tarfile.TarInfo]],
) -> None:
    name = _checked(member.name)
    if not name:
        _own(top, ".", member, into=top)
        return
    with _parent(root, path, name) as (parent, last):
        if member.isdir():
            try:
                os.mkdir(last, 0o700, dir_fd=parent)
            except FileExistsError:
                if not stat.S_ISDIR(os.stat(last, dir_fd=parent, follow_symlinks=False).st_mode):
                    raise
            directories.append((name, member))
        else:
            with suppress(FileNotFoundError):
                os.unlink(last, dir_fd=parent)
            if member.isreg():
                _write(archive, member, parent, last)
            elif member.issym():
                os.symlink(member.linkname, last, dir_fd=parent)
            elif member.islnk():
                with _parent(root, path, _checked(member.linkname)) as (other, target):
                    os.link(target, last, src_dir_fd=other, dst_dir_fd=parent, follow_symlinks=False)
                return
            elif member.ischr() or member.isblk() or member.isfifo():
                kind = stat.S_IFIFO if member.isfifo() else stat.S_IFCHR if member.ischr() else stat.S_IFBLK
                os.mknod(last, kind | 0o600, os.makedev(member.devmajor, member.devminor), dir_fd=parent)
            else:
                raise InvalidArgumentError(f"entry '{member.name}' is of a kind that cannot be copied")
        _own(parent, last, member, into=None)


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, parent: int, name: str) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, 0o600, dir_fd=parent)
    try:
        source = archive.extractfile(member)
        assert source is not None
        with closing(source):
            while data := source.read(CHUNK):
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view) :]
        for key, value in member.pax_headers.items():
            if key.startswith(_XATTR_PREFIX):
                with suppress(OSError):
                    os.setxattr(fd, key.removeprefix(_XATTR_PREFIX), value.encode("utf-8", "surrogateescape"))
    finally:
        os.close(fd)


def _own(parent: int, name: str, member: tarfile.TarInfo, *, into: int | None) -> None:
    """Owner before mode: changing the owner drops set-id bits."""
    if into is not None:
        path = f"/proc/self/fd/{into}"
        os.chown(path, member.uid, member.gid)
        os.chmod(path, stat.S_IMODE(member.mode))
        return
    os.chown(name, member.uid, member.gid, dir_fd=parent, follow_symlinks=False)
    if not (member.issym() or member.islnk()):
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            if not stat.S_ISLNK(os.fstat(fd).st_mode):
                os.chmod(f"/proc/self/fd/{fd}", stat.S_IMODE(member.mode))
        finally:
            os.close(fd)
    os.utime(name, ns=_times(member), dir_fd=parent, follow_symlinks=False)


def _times(member: tarfile.TarInfo) -> tuple[int, int]:
    stamp = int(float(member.mtime) * 1_000_000_000)
    return stamp, stamp


def _checked(name: str) -> str:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise InvalidArgumentError(f"entry '{name[:200]}' leads out of its directory")
    return "/".join(parts)


@contextmanager
def _parent(root: int, path: str, name: str) -> Iterator[tuple[int, str]]:
    """The directory that holds an entry, made if it is missing, and the entry's last name."""
    directory, _, last = name.rpartition("/")
    if not last:
        raise InvalidArgumentError(f"entry '{name}' has no name")
    full = f"{path}/{directory}"
    try:
        fd = open_in_root(root, full, _DIRECTORY)
    except FileNotFoundError:
        _make(root, path, directory)
        fd = open_in_root(root, full, _DIRECTORY)
    try:
        yield fd, last
    finally:
        os.close(fd)


def _make(root: int, path: str, directory: str) -> None:
    so_far = path
    for part in directory.split("/"):
        fd = open_in_root(root, so_far, _DIRECTORY)
        try:
            with suppress(FileExistsError):
                os.mkdir(part, 0o755, dir_fd=fd)
        finally:
            os.close(fd)
        so_far = f"{so_far}/{part}"


@contextmanager
def _opened(root: int, path: str, flags: int, what: str) -> Iterator[int]:
    try:
        fd = open_in_root(root, path, flags)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise NotFoundError(f"{what} '{path}' does not exist in the container") from error
        raise InvalidArgumentError(f"{what} '{path}' cannot be used: {error.strerror}") from error
    try:
        yield fd
    finally:
        os.close(fd)


# ---------------------------------------------------------------- out


def copy_out(root: int, path: str, *, follow_link: bool) -> Iterator[bytes]:
    """An archive of a file or directory in pieces; its top entry has the path's last name."""
    name = os.path.basename(path.rstrip("/")) or "."
    with _opened(root, path, os.O_PATH | (0 if follow_link else os.O_NOFOLLOW), "path") as fd:
        yield from _gathered(_pack(fd, name, {}, 0))
    yield bytes(2 * tarfile.BLOCKSIZE)


def _gathered(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Small pieces put together."""
    parts: list[bytes] = []
    size = 0
    for piece in pieces:
        parts.append(piece)
        size += len(piece)
        if size >= CHUNK:
            yield b"".join(parts)
            parts, size = [], 0
    yield b"".join(parts)


def _pack(fd: int, name: str, seen: dict[tuple[int, int], str], depth: int) -> Iterator[bytes]:
    """What the O_PATH descriptor `fd` is, and what is below it."""
    if depth > _DEPTH:
        raise InvalidArgumentError(f"'{name[:200]}' is more than {_DEPTH} directories deep")
    status = os.fstat(fd)
    entry = _entry(fd, name, status)
    if entry is None:
        return  # a socket has nothing to copy
    inode = (status.st_dev, status.st_ino)
    if entry.isreg() and status.st_nlink > 1 and inode in seen:
        entry.type, entry.linkname, entry.size = tarfile.LNKTYPE, seen[inode], 0
        yield _header(entry)
    elif entry.isreg():
        seen[inode] = name
        yield from _pack_file(fd, entry)
    else:
        yield _header(entry)
    if entry.isdir():
        directory = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for child in sorted(os.listdir(directory)):
                try:
                    below = os.open(child, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
                except FileNotFoundError:
                    continue
                try:
                    yield from _pack(below, f"{name}/{child}", seen, depth + 1)
                finally:
                    os.close(below)
        finally:
            os.close(directory)


def _header(entry: tarfile.TarInfo) -> bytes:
    return entry.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _entry(fd: int, name: str, status: os.stat_result) -> tarfile.TarInfo | None:
    entry = tarfile.TarInfo(name)
    entry.mode = stat.S_IMODE(status.st_mode)
    entry.uid, entry.gid = status.st_uid, status.st_gid
    entry.mtime = int(status.st_mtime)
    kinds = {
        stat.S_IFREG: tarfile.REGTYPE,
        stat.S_IFDIR: tarfile.DIRTYPE,
        stat.S_IFLNK: tarfile.SYMTYPE,
        stat.S_IFIFO: tarfile.FIFOTYPE,
        stat.S_IFCHR: tarfile.CHRTYPE,
        stat.S_IFBLK: tarfile.BLKTYPE,
    }
    kind = kinds.get(stat.S_IFMT(status.st_mode))
    if kind is None:
        return None
    entry.type = kind
    if kind == tarfile.REGTYPE:
        entry.size = status.st_size
    elif kind == tarfile.SYMTYPE:
        entry.linkname = os.readlink("", dir_fd=fd)
    elif kind in (tarfile.CHRTYPE, tarfile.BLKTYPE):
        entry.devmajor, entry.devminor = os.major(status.st_rdev), os.minor(status.st_rdev)
    return entry


def _pack_file(fd: int, entry: tarfile.TarInfo) -> Iterator[bytes]:
    """A file that shrinks while it is read is filled up with zeros, one that grows is cut: the header is out."""
    reading = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        entry.pax_headers = {f"{_XATTR_PREFIX}{key}": value for key, value in _xattrs(reading).items()}
        yield _header(entry)
        left = entry.size
        while left > 0:
            data = os.read(reading, min(CHUNK, left)) or bytes(min(CHUNK, left))
            left -= len(data)
            yield data
        yield bytes(-entry.size % tarfile.BLOCKSIZE)
    finally:
        os.close(reading)


def _xattrs(fd: int) -> dict[str, str]:
    found = {}
    with suppress(OSError):
        for key in os.listxattr(fd):
            if key.startswith(("user.", "security.capability")):
                value = os.getxattr(fd, key)
                if len(value) <= _XATTR_LIMIT:
                    found[key] = value.decode("utf-8", "surrogateescape")
    return found
