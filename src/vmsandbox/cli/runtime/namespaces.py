"""The namespaces that stand-ins are in: the pod's network, and a view of files with nothing but the container's.

Programs of engines join the namespaces of the pid they were given, to list its processes or to copy files; with the
host's there they would write to the host.  Stdlib only; `ctypes` costs, so only children import this.
"""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import contextmanager

from vmsandbox.errors import InvalidBundleError, SandboxError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_CLONE_NEWNET = 0x40000000
_CLONE_NEWNS = 0x00020000
_MS_BIND = 1 << 12
_MS_REC = 1 << 14
_MS_PRIVATE = 1 << 18
_MNT_DETACH = 2
HERE = "/proc/self/ns/net"


def _checked(result: int, what: str) -> None:
    if result:
        raise SandboxError(f"cannot {what}: {os.strerror(ctypes.get_errno()).lower()}")


def enter(path: str) -> int:
    """Move this process into the network namespace at `path` (empty: a new one); answers a descriptor of the old."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open(HERE, os.O_RDONLY | os.O_CLOEXEC)
    if not path:
        _checked(libc.unshare(_CLONE_NEWNET), "make a network namespace")
        return home
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        reason = (error.strerror or "").lower()
        raise InvalidBundleError(f"cannot use the network namespace '{path}': {reason}") from error
    try:
        _checked(libc.setns(fd, _CLONE_NEWNET), f"enter the network namespace '{path}'")
    finally:
        os.close(fd)
    return home


class Enclosure:
    """This process' view of files once it is the container's root and nothing else, and the way back."""

    def __init__(self, root: str) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._home = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        what = f"have '{root}' as root"
        _checked(self._libc.unshare(_CLONE_NEWNS), what)
        self._inside = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        place = os.fsencode(root)
        _checked(self._libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None), what)
        _checked(self._libc.mount(place, place, None, ctypes.c_ulong(_MS_BIND | _MS_REC), None), what)
        os.chdir(root)
        # From here on every path is one of the container's: nothing of it may ever be imported.
        sys.meta_path.clear()
        sys.path.clear()
        _checked(self._libc.pivot_root(b".", b"."), what)
        _checked(self._libc.umount2(b".", _MNT_DETACH), what)
        os.chdir("/")

    @contextmanager
    def left(self) -> Iterator[None]:
        """See the host's files for the block."""
        _checked(self._libc.setns(self._home, _CLONE_NEWNS), "go back to the host's files")
        try:
            yield
        finally:
            _checked(self._libc.setns(self._inside, _CLONE_NEWNS), "go back to the container's files")


@contextmanager
def visiting(fd: int) -> Iterator[None]:
    """Be in another network namespace for the block."""
    libc = ctypes.CDLL(None, use_errno=True)
    back = os.open(HERE, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _checked(libc.setns(fd, _CLONE_NEWNET), "go back to the host's network namespace")
        try:
            yield
        finally:
            _checked(libc.setns(back, _CLONE_NEWNET), "go back to the pod's network namespace")
    finally:
        os.close(back)
