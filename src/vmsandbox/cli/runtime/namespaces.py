"""The namespaces that stand-ins are in: the pod's network, processes of their own, and the container's files alone.

Programs of engines join the namespaces of the pid they were given, to list its processes or to copy files; with the
host's there they would tell of the host's processes and write to its files.  Stdlib only; `ctypes` costs, so only
children import this.
"""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import contextmanager

from vmsandbox.cli.standin import EMPTY
from vmsandbox.errors import InvalidBundleError, SandboxError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_CLONE_NEWNET = 0x40000000
_CLONE_NEWNS = 0x00020000
_CLONE_NEWPID = 0x20000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_REMOUNT = 32
_MS_BIND = 1 << 12
_MS_REC = 1 << 14
_MS_PRIVATE = 1 << 18
_MS_SLAVE = 1 << 19
_MNT_DETACH = 2
_PR_SET_CHILD_SUBREAPER = 36


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result:
        raise SandboxError(f"cannot {what}: {os.strerror(ctypes.get_errno()).lower()}")


def enter(path: str) -> None:
    """Move this process into the network namespace at `path` (empty: a new one)."""
    libc = _libc()
    if not path:
        _checked(libc.unshare(_CLONE_NEWNET), "make a network namespace")
        return
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        reason = (error.strerror or "").lower()
        raise InvalidBundleError(f"cannot use the network namespace '{path}': {reason}") from error
    try:
        _checked(libc.setns(fd, _CLONE_NEWNET), f"enter the network namespace '{path}'")
    finally:
        os.close(fd)


def number_children_anew() -> None:
    """Make the next child the first process of a pid namespace."""
    _checked(_libc().unshare(_CLONE_NEWPID), "make a pid namespace")


def adopt_orphans() -> None:
    """Become the parent of processes below us that lose theirs."""
    _checked(_libc().prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "become a subreaper")


def hide_mounts() -> None:
    """Have a view of files whose mounts nobody else sees."""
    libc = _libc()
    _checked(libc.unshare(_CLONE_NEWNS), "make a mount namespace")
    _checked(libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_SLAVE), None), "hide mounts")


class Enclosure:
    """This process' view of files once it is the container's root and nothing else, and the way back.

    With `standin.EMPTY` for a root there is nothing but processes.
    """

    def __init__(self, root: str) -> None:
        self._libc = _libc()
        self._home = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        what = f"have '{root}' as root"
        _checked(self._libc.unshare(_CLONE_NEWNS), what)
        self._inside = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        _checked(self._libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None), what)
        if root == EMPTY:
            root = "/proc"  # which is everywhere
            _checked(self._libc.mount(b"none", os.fsencode(root), b"tmpfs", ctypes.c_ulong(0), None), what)
            os.mkdir("/proc/proc")
            read_only = ctypes.c_ulong(_MS_REMOUNT | _MS_RDONLY)
            _checked(self._libc.mount(None, os.fsencode(root), None, read_only, None), what)
        else:
            place = os.fsencode(root)
            _checked(self._libc.mount(place, place, None, ctypes.c_ulong(_MS_BIND | _MS_REC), None), what)
        os.chdir(root)
        # From here on every path is one of the container's: nothing of it may ever be imported.
        sys.meta_path.clear()
        sys.path.clear()
        _checked(self._libc.pivot_root(b".", b"."), what)
        _checked(self._libc.umount2(b".", _MNT_DETACH), what)
        os.chdir("/")
        # Where there is no directory for it nobody can look at processes; that harms nobody.
        flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
        self._libc.mount(b"proc", b"/proc", b"proc", flags, None)

    @contextmanager
    def left(self) -> Iterator[None]:
        """See the host's files for the block."""
        _checked(self._libc.setns(self._home, _CLONE_NEWNS), "go back to the host's files")
        try:
            yield
        finally:
            _checked(self._libc.setns(self._inside, _CLONE_NEWNS), "go back to the container's files")
