"""Network namespaces: checked before use, made and removed for pods that no engine made one for.

A namespace of ours is kept by a bind mount, as iproute2 does it, so that it outlives every process of the pod and can
still be taken apart after all of them were killed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vmsandbox.errors import (
    AlreadyExistsError,
    InvalidArgumentError,
    SandboxError,
    UnavailableError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

_CLONE_NEWNET = 0x40000000
_NS_GET_NSTYPE = 0xB703
_MNT_DETACH = 2
_HOSTS = ("/proc/self/ns/net", "/proc/1/ns/net")


@contextmanager
def opened(path: str) -> Iterator[int]:
    """A descriptor of the network namespace at `path`.

    Raises InvalidArgumentError if there is none, and UnsupportedError if it is the host's: nothing of ours may ever
    be attached there.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise InvalidArgumentError(f"cannot use network namespace '{path}': {error.strerror}") from error
    try:
        _check(fd, path)
        yield fd
    finally:
        os.close(fd)


def check(path: str) -> None:
    """Raise as `opened` does."""
    with opened(path):
        pass


def _check(fd: int, path: str) -> None:
    try:
        kind = fcntl.ioctl(fd, _NS_GET_NSTYPE)
    except OSError:
        kind = 0
    if kind != _CLONE_NEWNET:
        raise InvalidArgumentError(
            f"'{path}' is not a network namespace: 'ip netns add NAME' makes one at '/run/netns/NAME'"
        )
    if is_hosts(fd):
        raise UnsupportedError(
            "a pod cannot join the host's network: its containers run in a virtual machine; "
            "give it a network of its own and publish ports"
        )


def is_hosts(fd: int) -> bool:
    """Whether a namespace is the one this process or the host's init is in."""
    mine = os.fstat(fd)
    for path in _HOSTS:
        try:
            other = os.stat(path)
        except OSError:
            continue  # an init that we may not look at is in another namespace of processes
        if (mine.st_dev, mine.st_ino) == (other.st_dev, other.st_ino):
            return True
    return False


async def create(path: str) -> None:
    """Make a network namespace, kept at the new file `path` until `remove`; undone if it fails."""
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        raise AlreadyExistsError(f"network namespace '{path}' exists already") from None
    # Late: the processes that enter namespaces have no use for an event loop.
    from vmsandbox_hypervisor.children import described, spawn

    messages = os.memfd_create("messages", os.MFD_CLOEXEC)
    try:
        child = spawn("unshare", ["unshare", f"--net={path}", "true"], fds={}, stderr=messages)
        status = await child.wait()
        if status != 0:
            said = os.pread(messages, 4096, 0).decode(errors="replace").strip()
            raise UnavailableError(f"cannot make network namespace '{path}': {said or described(status)}")
    except BaseException:
        remove(path)
        raise
    finally:
        os.close(messages)


def remove(path: str) -> bool:
    """Let go of a pinned namespace; says whether there was one.  Safe to repeat."""
    removed = False
    while _umount(path):
        removed = True
    try:
        os.unlink(path)
    except FileNotFoundError:
        return removed
    except OSError as error:
        raise SandboxError(f"cannot remove network namespace '{path}': {error.strerror}") from error
    return True


def enter(fd: int) -> None:
    """Move the calling thread into a network namespace, for good; for `helper` only."""
    if _libc().setns(fd, _CLONE_NEWNET):
        raise _failed("setns")


def enter_new() -> None:
    """Move the calling thread into a network namespace of its own, for good; for `helper` only."""
    if _libc().unshare(_CLONE_NEWNET):
        raise _failed("unshare")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _failed(what: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code), what)


def _umount(path: str) -> bool:
    if _libc().umount2(os.fsencode(path), _MNT_DETACH) == 0:
        return True
    if ctypes.get_errno() in (errno.EINVAL, errno.ENOENT):
        return False
    raise SandboxError(f"cannot unmount '{path}': {os.strerror(ctypes.get_errno())}")
