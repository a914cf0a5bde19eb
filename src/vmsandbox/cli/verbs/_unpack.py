"""Unpacking an archive that a guest sent.

The guest may be hostile.  Every directory is opened component by component without following links, so nothing is
written outside the destination whatever links the archive (or anybody at the same time) makes; sizes,
numbers and headers are bounded; links that lead outside and special files are left out and named.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import tarfile
from contextlib import contextmanager

from vmsandbox.errors import ExhaustedError, InvalidArgumentError, NotFoundError, printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import IO

#: entries of one archive
MOST_ENTRIES = 1_000_000
#: bytes of one header that the archive describes itself
MOST_HEADER = 1 << 20
MOST_DEPTH = 256
#: links on one way, as the kernel has it
MOST_LINKS = 40
CHUNK = 256 * 1024
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LONG = (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


class Entry(tarfile.TarInfo):
    """An entry whose headers are bounded before they are read into memory."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in (tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_SPARSE):
            raise InvalidArgumentError("the guest sent an archive of a kind that it never makes")
        if self.type in _LONG and not 0 <= self.size <= MOST_HEADER:
            raise InvalidArgumentError(f"the guest sent an archive with a header of {self.size} bytes")
        made: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]
        return made


@contextmanager
def opened(stream: IO[bytes]) -> Iterator[tarfile.TarFile]:
    """A guest's archive; whatever an archive that no honest guest sends leads to is an `InvalidArgumentError`."""
    try:
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=Entry, errors="surrogateescape") as archive:
            yield archive
    except (tarfile.TarError, RecursionError, EOFError, ValueError, OverflowError) as error:
        raise InvalidArgumentError(f"the guest sent a broken archive: {_shown(str(error))}") from error


class Unpacker:
    """Unpacks one archive into a directory; its top entry is called `name` there.

    `owners` keeps the numbers of users and groups; otherwise everything belongs to the caller.  `most_bytes` bounds
    what is written.
    """

    def __init__(self, directory: str, source: str, name: str, *, owners: bool, most_bytes: int) -> None:
        self.directory = directory
        self.source = source
        self.name = name
        self.owners = owners
        self.most_bytes = most_bytes
        self.written = 0
        #: the top entry has to be a directory: only that can be made under the name that was asked for
        self.only_directory = False
        #: what was left out, and why
        self.left_out: list[str] = []
        #: what is being made
        self._entry = ""
        self._directories: list[tuple[str, tarfile.TarInfo]] = []

    def unpack(self, stream: IO[bytes]) -> None:
        """Raises `InvalidArgumentError` for what no honest guest sends and `ExhaustedError` beyond a bound."""
        root = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with opened(stream) as archive:
                self._entries(root, archive)
                self._finish_directories(root)
        except OSError as error:
            place = os.path.join(self.directory, self._entry) if self._entry else self.directory
            raise InvalidArgumentError(f"cannot copy to '{_shown(place)}': {error.strerror or error}") from error
        finally:
            os.close(root)

    def _entries(self, root: int, archive: tarfile.TarFile) -> None:
        count = 0
        while (member := archive.next()) is not None:
            vars(archive)["members"].clear()  # kept for looking up, which nobody does
            count += 1
            if count > MOST_ENTRIES:
                raise ExhaustedError(
                    f"the guest sent more than {MOST_ENTRIES} files: copy a part of the directory at a time"
                )
            name = self._renamed(member.name)
            if name.count("/") > MOST_DEPTH:
                raise InvalidArgumentError(f"the guest sent directories more than {MOST_DEPTH} deep")
            linkname = self._renamed(member.linkname) if member.islnk() else member.linkname
            member.name, member.linkname = name or ".", linkname
            self._entry = name
            if self.only_directory and count == 1 and not member.isdir():
                raise NotFoundError(f"directory '{os.path.join(self.directory, self.name)}' does not exist")
            if self._allowed(root, member):
                self._make(root, name, archive, member)

    def _renamed(self, name: str) -> str:
        """Below our name for the top entry; "" is the directory itself, where its content is what is wanted."""
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if ".." in parts or name.startswith("/"):
            raise InvalidArgumentError(f"the guest sent '{_shown(name)}', which leads out of the copy")
        if self.source != "." and (not parts or parts.pop(0) != self.source):
            raise InvalidArgumentError(f"the guest sent '{_shown(name)}', which was not asked for")
        return "/".join([self.name, *parts] if self.name else parts)

    def _allowed(self, root: int, member: tarfile.TarInfo) -> bool:
        if not (member.isreg() or member.isdir() or member.islnk() or member.issym()):
            self.left_out.append(f"'{_shown(member.name)}' is a special file")
            return False
        if _leads_outside(root, "", member.name):
            # Through a link that is there already; writing would not follow it.
            raise InvalidArgumentError(
                f"'{_shown(member.name)}' would be written through a link that is there already: remove that first"
            )
        start = os.path.dirname(member.name) if member.issym() else ""
        if (member.issym() or member.islnk()) and _leads_outside(root, start, member.linkname):
            self.left_out.append(f"link '{_shown(member.name)}' leads outside, to '{_shown(member.linkname)}'")
            return False
        return True

    def _make(self, root: int, name: str, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        if not name:
            if not member.isdir():
                raise InvalidArgumentError("the guest sent a file where a directory was asked for")
            return
        with self._parent(root, name) as (parent, last):
            if member.isdir():
                try:
                    os.mkdir(last, 0o700, dir_fd=parent)
                except FileExistsError:
                    if not stat.S_ISDIR(os.stat(last, dir_fd=parent, follow_symlinks=False).st_mode):
                        there = _shown(os.path.join(self.directory, name))
                        raise InvalidArgumentError(
                            f"'{there}' is a file: a directory cannot be copied onto it"
                        ) from None
                self._directories.append((name, member))
                return
            try:
                os.unlink(last, dir_fd=parent)
            except FileNotFoundError:
                pass
            if member.issym():
                os.symlink(member.linkname, last, dir_fd=parent)
                if self.owners:
                    os.chown(last, member.uid, member.gid, dir_fd=parent, follow_symlinks=False)
            elif member.islnk():
                with self._parent(root, member.linkname) as (other, target):
                    os.link(target, last, src_dir_fd=other, dst_dir_fd=parent, follow_symlinks=False)
            else:
                self._write(archive, member, parent, last)

    def _write(self, archive: tarfile.TarFile, member: tarfile.TarInfo, parent: int, last: str) -> None:
        if getattr(member, "sparse", None) is not None:
            raise InvalidArgumentError("the guest sent an archive of a kind that it never makes")
        self.written += member.size
        if self.written > self.most_bytes:
            raise ExhaustedError(f"the guest sends more than {self.most_bytes >> 20} MiB: '--max-size' sets the limit")
        source = archive.extractfile(member)
        assert source is not None
        fd = os.open(last, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent)
        try:
            left = member.size
            while left:
                data = source.read(min(CHUNK, left))
                if not data:
                    raise InvalidArgumentError("the guest sent less of a file than it announced")
                left -= len(data)
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view) :]
            self._finish(fd, member)
        finally:
            os.close(fd)

    def _finish_directories(self, root: int) -> None:
        """Last of all: what is made in a directory changes its time, and its mode may forbid making anything."""
        for name, member in reversed(self._directories):
            with self._parent(root, name) as (parent, last):
                fd = os.open(last, DIRECTORY, dir_fd=parent)
                try:
                    self._finish(fd, member)
                finally:
                    os.close(fd)

    def _finish(self, fd: int, member: tarfile.TarInfo) -> None:
        """Owner, mode and time; set-id bits of a guest mean nothing good on the host."""
        if self.owners:
            os.fchown(fd, member.uid, member.gid)
        os.fchmod(fd, member.mode & 0o777)
        stamp = int(float(member.mtime) * 1e9)
        os.utime(fd, ns=(stamp, stamp))

    @contextmanager
    def _parent(self, root: int, name: str) -> Iterator[tuple[int, str]]:
        """The directory that holds `name`, reached without following a link, and its last component."""
        *directories, last = name.split("/")
        fd = os.dup(root)
        try:
            for part in directories:
                below = os.open(part, DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = below
            yield fd, last
        finally:
            os.close(fd)

    def report(self) -> None:
        for text in self.left_out:
            print(f"vmsandbox: not copied: {text}", file=sys.stderr)


def _leads_outside(root: int, start: str, path: str) -> bool:
    """Whether `path`, seen from the directory `start`, leaves `root` on its way, by itself or by links that are there.

    What cannot be told is outside.  tarfile's own filters are not in Debian's Python.
    """
    if path.startswith("/"):
        return True
    reached = [part for part in start.split("/") if part not in ("", ".")]
    ahead = path.split("/")[::-1]
    followed = 0
    while ahead:
        part = ahead.pop()
        if part in ("", "."):
            continue
        if part == "..":
            if not reached:
                return True
            reached.pop()
            continue
        try:
            link = os.readlink("/".join([*reached, part]), dir_fd=root)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOENT, errno.ENOTDIR):
                return True
            reached.append(part)  # no link, or nothing yet
            continue
        followed += 1
        if link.startswith("/") or followed > MOST_LINKS:
            return True
        ahead += link.split("/")[::-1]
    return False


def _shown(text: str) -> str:
    """A guest's text, short and harmless."""
    return printable(text[:200])
