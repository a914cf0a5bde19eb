"""The host's side of bind mounts: one directory per pod, and below it one mount for each source.

The directory is bind-mounted on itself and made shared before virtiofsd looks at it, so that what is mounted below it
later appears in virtiofsd's namespace and, once unmounted here, disappears from there.

A source is cloned as a detached tree, made private and (if asked) read-only with everything below it, and only then
attached.  Its propagation groups are therefore its own: unmounting it can never reach the mounts it was cloned
from, at whatever point this process was killed, and there is no moment in which a read-only source can be written.

The kernel's list of mounts is the record of what has to be undone: `remains.close_shared` needs nothing else.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import stat
import threading
import time
from typing import TYPE_CHECKING

from vmsandbox import remains
from vmsandbox.errors import ExhaustedError, InvalidArgumentError, NotFoundError, SandboxError, UnsupportedError
from vmsandbox.paths import SHORT_ID

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# The numbers are the same on every architecture.
_OPEN_TREE = 428
_MOVE_MOUNT = 429
_MOUNT_SETATTR = 442
_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_AT_RECURSIVE = 0x8000
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 4
_MOUNT_ATTR_RDONLY = 1
_MS_PRIVATE = 1 << 18
_MS_SHARED = 1 << 20

#: destinations in a container (and below them) that are the guest's own
SYSTEM = ("/proc", "/sys", "/dev")
_SAFE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")
_LONGEST_BASENAME = 64
#: a pod's shared directory, whatever root it is below
_SHARED = re.compile(rf"/s/[0-9a-f]{{{SHORT_ID}}}/shared$")
#: seconds that a name may be a mount point in somebody else's copy, and between looks
BUSY_TIMEOUT, BUSY_PAUSE = 2.0, 0.02


class _Attributes(ctypes.Structure):
    """struct mount_attr"""

    _fields_ = (
        ("set", ctypes.c_uint64),
        ("clear", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


_libc = ctypes.CDLL(None, use_errno=True)
_opening = threading.Lock()


def _call(number: int, *arguments: object) -> int:
    result = int(_libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _tree(path: str | os.PathLike[str]) -> int:
    """A detached copy of the mounts at and below `path`, as a descriptor."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_RECURSIVE
    return _call(_OPEN_TREE, _AT_FDCWD, ctypes.c_char_p(os.fsencode(path)), ctypes.c_uint(flags))


def _set(tree: int, *, propagation: int, read_only: bool = False) -> None:
    attributes = _Attributes(_MOUNT_ATTR_RDONLY if read_only else 0, 0, propagation, 0)
    flags = ctypes.c_uint(_AT_EMPTY_PATH | _AT_RECURSIVE)
    _call(_MOUNT_SETATTR, tree, b"", flags, ctypes.byref(attributes), ctypes.c_size_t(ctypes.sizeof(attributes)))


def _move(tree: int, path: str | os.PathLike[str]) -> None:
    flags = ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH)
    _call(_MOVE_MOUNT, tree, b"", _AT_FDCWD, ctypes.c_char_p(os.fsencode(path)), flags)


# ---------------------------------------------------------------- sources


def check_destination(destination: str) -> None:
    """Refuse a place in the container that belongs to the guest."""
    for place in SYSTEM:
        if destination == place or destination.startswith(place + "/"):
            raise InvalidArgumentError(
                f"nothing of the host can be mounted at '{destination}': '{place}' is the virtual machine's own"
            )


def check_source(path: str, *, create: bool, names: bool = False) -> None:
    """Refuse what is not there (unless it may be created) or cannot cross into a virtual machine.

    Of sockets and FIFOs only the name crosses, which is enough for those who ask for `names`: both ends have to be
    in the machine.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if create:
            return
        raise NotFoundError(f"cannot share '{path}': no such file or directory on the host") from None
    except OSError as error:
        raise InvalidArgumentError(f"cannot share '{path}': {error.strerror}") from error
    if names and (stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode)):
        return
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise UnsupportedError(
            f"cannot share '{path}': only files and directories can cross into a virtual machine, no sockets, "
            "pipes or devices"
        )


def name_for(container_id: str, source: str) -> str:
    """A new name below the shared directory that tells whose and what it is: ``<container>-<random>-<basename>``."""
    basename = "".join(character if character in _SAFE else "_" for character in os.path.basename(source))
    return f"{container_id[:64]}-{os.urandom(8).hex()}-{basename[:_LONGEST_BASENAME]}"


# ---------------------------------------------------------------- mounting


def open_directory(directory: str) -> None:
    """Make the pod's shared directory and prepare it for mounts; one that is ready is left as it is.

    Blocks.  Raises `UnsupportedError` without the right to mount or on a kernel before 5.12, else `SandboxError`.
    """
    try:
        # A pod's start and its first container ask for it at the same time, and a second one would lie on top of what
        # is mounted in the first, with a copy of that.
        with _opening:
            os.makedirs(directory, mode=0o700, exist_ok=True)
            if os.path.realpath(directory) in remains.mounts_below(directory):
                return
            tree = _tree(directory)
            try:
                # Private first: it must not share a group with the file system it lies on.
                _set(tree, propagation=_MS_PRIVATE)
                _set(tree, propagation=_MS_SHARED)
                _move(tree, directory)
            finally:
                os.close(tree)
    except OSError as error:
        raise _explained(directory, error) from error


def bind(directory: str, name: str, source: str, *, read_only: bool, create: bool = False) -> None:
    """Mount `source`, a file or directory with all that is mounted below it, as `directory`/`name`.

    With `create` a missing directory is made first.  If it fails nothing is left.  Blocks.
    """
    check_source(source, create=create, names=True)
    made: list[str] = []
    target = f"{directory}/{name}"
    try:
        if create:
            made += _made_directories(source)
        tree = _tree(source)
        try:
            _set(tree, propagation=_MS_PRIVATE, read_only=read_only)
            if stat.S_ISDIR(os.fstat(tree).st_mode):
                os.mkdir(target, mode=0o700)
            else:
                os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            _move(tree, target)
        finally:
            os.close(tree)
        _leave_out_shares(target)
    except BaseException as error:
        unbind(directory, name)
        for path in reversed(made):
            os.rmdir(path)
        if isinstance(error, OSError):
            raise _explained(source, error) from error
        raise


def _leave_out_shares(target: str) -> None:
    """Detach what pods share from a source that contains their directories.

    The kernel lets nobody remove a name on which anything is mounted, be it in a copy of the tree: for as long as a
    container had, say, all of the host's files, no other pod could take back what it has shared.
    """
    for place in remains.mounts_below(target):
        if place != target and _SHARED.search(place):
            remains.unmount_below(place)


def unbind(directory: str, name: str) -> None:
    """Undo `bind`, even while something still holds the mount; what is not mounted is fine.  Blocks."""
    target = f"{directory}/{name}"
    remains.unmount_below(target)
    deadline = time.monotonic() + BUSY_TIMEOUT
    while True:
        try:
            _remove_name(target)
            return
        except OSError as error:
            # Somebody else is just about to leave it out of a copy.
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
        time.sleep(BUSY_PAUSE)


def _remove_name(target: str) -> None:
    try:
        # Never recursive: whatever is in there is not ours.
        os.rmdir(target)
    except NotADirectoryError:
        os.unlink(target)
    except FileNotFoundError:
        return


def bind_all(directory: str, wanted: Sequence[tuple[str, str, bool, bool]]) -> None:
    """`bind` each of (name, source, read only, create), or none."""
    open_directory(directory)
    done: list[str] = []
    try:
        for name, source, read_only, create in wanted:
            bind(directory, name, source, read_only=read_only, create=create)
            done.append(name)
    except BaseException:
        unbind_all(directory, done)
        raise


def unbind_all(directory: str, names: Sequence[str]) -> None:
    """`unbind` each, the last first."""
    for name in reversed(names):
        unbind(directory, name)


def _made_directories(path: str) -> Iterator[str]:
    """Make a directory with its parents; yields those that were not there."""
    missing = []
    while not os.path.lexists(path):
        missing.append(path)
        path = os.path.dirname(path)
    for one in reversed(missing):
        os.mkdir(one, mode=0o755)
        yield one


def _explained(path: str, error: OSError) -> SandboxError:
    what = f"cannot share '{path}': {error.strerror}"
    if error.errno == errno.ENOSYS:
        return UnsupportedError(f"{what}: Linux 5.12 or newer is needed")
    if error.errno == errno.EPERM:
        return UnsupportedError(f"{what}: the right to mount is needed, run as root")
    if error.errno in (errno.ENOSPC, errno.ENOMEM):
        return ExhaustedError(f"{what}: remove containers with volumes, or raise 'fs.mount-max'")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        limit = "ulimit -n" if error.errno == errno.EMFILE else "sysctl fs.file-max"
        return ExhaustedError(f"{what}: raise the limit of open files ({limit})")
    if error.errno == errno.ENOENT:
        return NotFoundError(what)
    return SandboxError(what)
