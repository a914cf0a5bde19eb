"""A directory tree that layers are written into, and that nothing in a layer can lead out of.

Every step into the tree opens one name relative to the descriptor of its directory, without following links.
Symbolic links in an entry's parent path are followed here, by hand, with the tree's root as ``/``, as every
container engine does: images rely on it (``lib/x`` where a lower layer made ``lib`` a link).  A layer that makes such
a link itself and then writes through it was not made from a file system, and is refused.

A path is *canonical* when it has no links in it: relative to the root, '' for the root.  The tree must be private to
this process while it is written.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from contextlib import suppress
from typing import NamedTuple

from vmsandbox.errors import InvalidArgumentError

#: Deeper or longer than this cannot be handled by path, which mkfs.erofs does.
DEPTH_MAX = 256
PATH_MAX = 3500
_LINKS_MAX = 40
_OPEN_MAX = 64
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class TreeError(InvalidArgumentError):
    """The entry cannot be placed in the tree."""


class Place(NamedTuple):
    """A directory: its descriptor (valid until the next call of `Tree.parent`) and its canonical path."""

    descriptor: int
    path: str

    def child(self, name: str) -> str:
        """The canonical path of `name` in it."""
        return f"{self.path}/{name}" if self.path else name


class Tree:
    """The tree below directory `root`; use as a context manager."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = os.open(root, _DIRECTORY)
        os.fchmod(self._root, 0o755)
        self._open: OrderedDict[str, Place] = OrderedDict()
        #: forgotten, but perhaps still in the caller's hands
        self._doomed: list[Place] = []
        #: canonical path of every directory -> modification time it is to have in the end
        self._times: dict[str, int] = {"": 0}
        #: what the layer at hand has written; only kept where there is a lower layer to tell it from
        self._fresh: set[str] | None = None
        self._fresh_links: set[str] = set()

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, *_: object) -> None:
        self._forget()
        self._close_doomed()
        os.close(self._root)

    def begin_layer(self, *, lowest: bool) -> None:
        """From here on, everything that exists belongs to lower layers."""
        self._fresh = None if lowest else set()
        self._fresh_links = set()

    def written(self, path: str) -> None:
        """Note that the layer at hand wrote the object at canonical `path`."""
        while self._fresh is not None and path not in self._fresh:
            self._fresh.add(path)
            path = path.rpartition("/")[0]

    def set_time(self, path: str, mtime_ns: int) -> None:
        """The modification time that directory `path` is to have when everything is written."""
        self._times[path] = mtime_ns

    def parent(self, parts: tuple[str, ...], *, make: bool) -> Place | None:
        """Find the directory that `parts` lead to; missing ones are made, or the result is None.

        Raises `TreeError` if something that is no directory is in the way, or a link that this layer made.
        """
        self._close_doomed()
        for part in parts:
            if len(os.fsencode(part)) > 255:
                raise TreeError(f"a part of its path is longer than 255 bytes: '{part[:40]}...'")
        known = len(parts)
        while known and "/".join(parts[:known]) not in self._open:
            known -= 1
        place = self._open["/".join(parts[:known])] if known else Place(self._root, "")
        if known:
            self._open.move_to_end("/".join(parts[:known]))
        for index in range(known, len(parts)):
            found = self._step(place, parts[index], make=make)
            if found is None:
                return None
            place = found
            self._keep("/".join(parts[: index + 1]), place)
        return place

    def _step(self, place: Place, part: str, *, make: bool) -> Place | None:
        """One step from an open directory; the result is open and owned by the caller."""
        pending = [part]
        links = 0
        current = Place(os.dup(place.descriptor), place.path)
        try:
            while pending:
                name = pending.pop()
                if name == "..":
                    current = self._replaced(current, self._reopened(current.path.rpartition("/")[0]))
                    continue
                path = current.child(name)
                try:
                    descriptor = os.open(name, _DIRECTORY, dir_fd=current.descriptor)
                except FileNotFoundError:
                    if not make:
                        os.close(current.descriptor)
                        return None
                    descriptor = self._made(current, name)
                except OSError as error:
                    if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                        raise
                    links += 1
                    target = self._target(current, name, links)
                    if target.startswith("/"):
                        current = self._replaced(current, self._reopened(""))
                    pending += [part for part in reversed(target.split("/")) if part not in ("", ".")]
                    continue
                current = self._replaced(current, Place(descriptor, path))
        except BaseException:
            with suppress(OSError):
                os.close(current.descriptor)
            raise
        return current

    def _replaced(self, old: Place, new: Place) -> Place:
        os.close(old.descriptor)
        return new

    def _reopened(self, path: str) -> Place:
        """Open a canonical path anew."""
        descriptor = os.dup(self._root)
        for name in path.split("/") if path else ():
            try:
                following = os.open(name, _DIRECTORY, dir_fd=descriptor)
            finally:
                os.close(descriptor)
            descriptor = following
        return Place(descriptor, path)

    def _made(self, place: Place, name: str) -> int:
        """Make a directory that no entry speaks of."""
        path = place.child(name)
        check_path(path)
        os.mkdir(name, 0o755, dir_fd=place.descriptor)
        descriptor = os.open(name, _DIRECTORY, dir_fd=place.descriptor)
        os.fchmod(descriptor, 0o755)
        self._times[path] = 0
        self.written(path)
        return descriptor

    def _target(self, place: Place, name: str, links: int) -> str:
        """Where the link `name` points; raises `TreeError` if it is none, or must not be followed."""
        path = place.child(name)
        status = os.stat(name, dir_fd=place.descriptor, follow_symlinks=False)
        if not stat.S_ISLNK(status.st_mode):
            raise TreeError(f"'{path}', above it, is {described(status.st_mode)}")
        target = os.readlink(name, dir_fd=place.descriptor)
        if path in self._fresh_links:
            raise TreeError(f"'{path}', above it, is a symbolic link to '{target}' that the same layer made")
        if links > _LINKS_MAX:
            raise TreeError(f"'{path}', above it, leads through too many symbolic links")
        return target

    def _keep(self, key: str, place: Place) -> None:
        self._open[key] = place
        if len(self._open) > _OPEN_MAX:
            # never the one just opened
            _, oldest = self._open.popitem(last=False)
            os.close(oldest.descriptor)

    def _forget(self) -> None:
        """Drop every cached directory: what a path leads to has changed."""
        self._doomed += self._open.values()
        self._open.clear()

    def _close_doomed(self) -> None:
        for place in self._doomed:
            os.close(place.descriptor)
        self._doomed.clear()

    def status(self, place: Place, name: str) -> os.stat_result | None:
        """`lstat` of `name` in `place`, None if there is nothing."""
        try:
            return os.stat(name, dir_fd=place.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def add_link(self, place: Place, name: str, target: str) -> None:
        """Make a symbolic link; its target is just text."""
        os.symlink(target, name, dir_fd=place.descriptor)
        self._fresh_links.add(place.child(name))

    def remove(self, place: Place, name: str, status: os.stat_result) -> None:
        """Remove `name` in `place` with everything below it."""
        self._remove(place, name, status, keep_fresh=False)

    def hide(self, place: Place, name: str) -> None:
        """Apply a whiteout: remove what lower layers have at `name`, keep what this layer wrote."""
        status = self.status(place, name)
        if status is not None:
            self._remove(place, name, status, keep_fresh=True)

    def hide_all(self, place: Place) -> None:
        """Apply an opaque mark: remove what lower layers have in the directory, keep what this layer wrote."""
        for name in os.listdir(place.descriptor):
            self.hide(place, name)

    def _remove(self, place: Place, name: str, status: os.stat_result, *, keep_fresh: bool) -> None:
        if keep_fresh and self._fresh is None:
            return  # the lowest layer hides nothing
        if not stat.S_ISREG(status.st_mode):
            self._forget()
        self._remove_at(place.descriptor, place.child(name), name, status.st_mode, keep_fresh=keep_fresh)

    def _remove_at(self, parent: int, path: str, name: str, mode: int, *, keep_fresh: bool) -> None:
        kept = keep_fresh and self._fresh is not None and path in self._fresh
        if not stat.S_ISDIR(mode):
            if not kept:
                os.unlink(name, dir_fd=parent)
                self._fresh_links.discard(path)
            return
        descriptor = os.open(name, _DIRECTORY, dir_fd=parent)
        try:
            for child in os.listdir(descriptor):
                child_mode = os.stat(child, dir_fd=descriptor, follow_symlinks=False).st_mode
                self._remove_at(descriptor, f"{path}/{child}", child, child_mode, keep_fresh=kept)
        finally:
            os.close(descriptor)
        if not kept:
            os.rmdir(name, dir_fd=parent)
            self._times.pop(path, None)

    def finish(self) -> None:
        """Give every directory its modification time."""
        self._forget()
        for path, mtime_ns in self._times.items():
            os.utime(path or ".", ns=(mtime_ns, mtime_ns), dir_fd=self._root, follow_symlinks=False)


def check_path(path: str) -> None:
    """Raise `TreeError` for a canonical path that is too long or too deep."""
    if path.count("/") >= DEPTH_MAX:
        raise TreeError(f"its path is more than {DEPTH_MAX} directories deep")
    if len(os.fsencode(path)) > PATH_MAX:
        raise TreeError(f"its path is longer than {PATH_MAX} bytes")


_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFIFO: "a fifo",
    stat.S_IFSOCK: "a socket",
}


def described(mode: int) -> str:
    """What sort of file a mode is, in words."""
    return _KINDS.get(stat.S_IFMT(mode), "of an unknown sort")


def split(name: str) -> tuple[str, ...]:
    """The parts of an entry's name, relative to the root of the image.

    A leading '/' means that root, as it does to every container engine; '..' is refused.
    """
    if "\0" in name:
        raise TreeError("its path contains a zero byte")
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if ".." in parts:
        raise TreeError("its path contains '..'")
    return parts
