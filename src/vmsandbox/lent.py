"""Root file systems that engines have mounted from a disk: found, lent to a virtual machine, and given back.

Two kernels that have one file system mounted, and one of them for writing, destroy it.  So while the machine has the
disk, the engine's mount is taken away, and afterwards it is made again as it was.  Whoever else has the disk
mounted, in whatever namespace, makes lending it impossible: the kernel lets only those open a disk exclusively who are
alone with it.  A file system that is mounted read-only as a whole stays where it is.

A loop device that would go with its last user stays meanwhile.

What was taken away is written down first, in the pod's directory, so that whoever cleans up after a supervisor that was
killed can put it back.  Stdlib only.
"""

from __future__ import annotations

import errno
import os
import stat
import time

from vmsandbox import documents, remains
from vmsandbox.errors import SandboxError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmsandbox.paths import SandboxPaths

#: what the guest can mount
FILE_SYSTEMS = frozenset({"ext2", "ext3", "ext4", "xfs", "erofs"})
#: seconds for those who are just copying a mount namespace to let go of what they do not want in it
ALONE_TIMEOUT = 2.0
_PAUSE = 0.02
_FLAGS = {
    "ro": 1,
    "nosuid": 2,
    "nodev": 4,
    "noexec": 8,
    "sync": 16,
    "dirsync": 128,
    "noatime": 1024,
    "nodiratime": 2048,
    "relatime": 1 << 21,
    "strictatime": 1 << 24,
}
_PRIVATE = 1 << 18
_LOOP_SET_STATUS64, _LOOP_GET_STATUS64 = 0x4C04, 0x4C05
#: struct loop_info64, and where its flags are
_LOOP_INFO, _LOOP_FLAGS = 232, 52
_LOOP_AUTOCLEAR = 4
_NOFOLLOW = 8
_ESCAPES = (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\"))


class NotAloneError(SandboxError):
    """Somebody else uses the file system or its disk."""


def find(path: str) -> dict[str, Any] | None:
    """The disk whose whole file system is mounted at `path`; None if it is a directory of another kind.

    Answers ``path``, ``device``, ``numbers``, ``fstype``, ``options`` of the mount, ``data`` of the file system,
    ``read_only`` (the whole file system is) and ``shared`` (its mount is propagated).
    """
    real = os.path.realpath(path)
    found: tuple[list[str], str, str, list[str]] | None = None
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            left, _, right = line.rstrip("\n").partition(" - ")
            fields = left.split(" ")
            # What is mounted last at a place covers the others.
            if _plain(fields[4]) == real:
                kind, device, shown = right.split(" ", 2)
                found = (fields, kind, _plain(device), shown.split(","))
    if found is None:
        return None
    fields, fstype, source, data = found
    major, _, minor = fields[2].partition(":")
    numbers = (int(major), int(minor))
    if fields[3] != "/" or fstype not in FILE_SYSTEMS:
        return None
    device = node_of(numbers, hint=source)
    if not device:
        return None
    return {
        "path": real,
        "device": device,
        "numbers": list(numbers),
        "fstype": fstype,
        "options": fields[5].split(","),
        "data": [option for option in data if option not in ("rw", "ro")],
        "read_only": "ro" in data,
        "shared": any(field.startswith("shared:") for field in fields[6:]),
    }


def _plain(text: str) -> str:
    for code, character in _ESCAPES if "\\" in text else ():
        text = text.replace(code, character)
    return text


def node_of(numbers: tuple[int, int], *, hint: str = "") -> str:
    """The node of a block device below /dev; empty if there is none."""
    candidates = [hint] if hint.startswith("/") else []
    try:
        with open(f"/sys/dev/block/{numbers[0]}:{numbers[1]}/uevent", encoding="utf-8") as file:
            names = [line.rstrip("\n").partition("=")[2] for line in file if line.startswith("DEVNAME=")]
    except OSError:
        names = []
    for path in [*candidates, *(f"/dev/{name}" for name in names)]:
        try:
            status = os.stat(path)
        except OSError:
            continue
        if stat.S_ISBLK(status.st_mode) and status.st_rdev == os.makedev(*numbers):
            return path
    return ""


def is_alone(device: str) -> bool:
    """Whether nobody has a disk, or a part of it, mounted or in another exclusive use."""
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        raise SandboxError(f"cannot open '{device}': {error.strerror}") from error
    return True


# ---------------------------------------------------------------- lending


def record_of(sandbox: SandboxPaths, container_id: str) -> str:
    """Where it is written down that a container's root was taken."""
    return f"{sandbox.dir}/roots/{container_id}.json"


def take(root: dict[str, Any], record: str) -> None:
    """Unmount what `find` found.  Raises `NotAloneError`, and then it is where it was.  Blocks."""
    if root["read_only"]:
        return
    os.makedirs(os.path.dirname(record), mode=0o700, exist_ok=True)
    root["autoclear"] = _clear_itself(root["device"], wanted=None)
    documents.write(record, root)
    _clear_itself(root["device"], wanted=False)
    try:
        _unmount(root["path"])
    except OSError as error:
        _clear_itself(root["device"], wanted=root["autoclear"])
        os.unlink(record)
        raise NotAloneError(f"'{root['path']}' cannot be unmounted: {error.strerror}") from error
    deadline = time.monotonic() + ALONE_TIMEOUT
    while not is_alone(root["device"]):
        if time.monotonic() > deadline:
            give_back(record)
            raise NotAloneError(f"'{root['device']}' is in use elsewhere on this machine")
        time.sleep(_PAUSE)


def give_back(record: str) -> None:
    """Mount again what `take` unmounted; the machine must have let go of it.  Safe to repeat.  Blocks.

    Raises SandboxError if it cannot be mounted; then it is forgotten all the same.
    """
    import fcntl

    try:
        lock = open(record, "rb")  # noqa: SIM115 - closed by the with below
    except FileNotFoundError:
        return
    with lock:
        # A supervisor that ends and whoever cleans up after it may both be here.
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            root = documents.read(record)
        except SandboxError:
            return
        _give_back(root, record)


def _give_back(root: dict[str, Any], record: str) -> None:
    try:
        if find(root["path"]) is None:
            _mount(root)
    except OSError as error:
        raise SandboxError(
            f"cannot mount '{root['device']}' at '{root['path']}' again: {error.strerror}: its engine has to"
        ) from error
    finally:
        # It is in use again; if it is not, that is its end.
        _clear_itself(root["device"], wanted=root["autoclear"])
        os.unlink(record)


def _clear_itself(device: str, *, wanted: bool | None) -> bool:
    """Whether a loop device goes with its last user, and from now on, if that is `wanted`; no other device does."""
    import fcntl
    import struct

    try:
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        info = bytearray(_LOOP_INFO)
        fcntl.ioctl(fd, _LOOP_GET_STATUS64, info)
        (flags,) = struct.unpack_from("I", info, _LOOP_FLAGS)
        if wanted is not None and wanted != bool(flags & _LOOP_AUTOCLEAR):
            struct.pack_into("I", info, _LOOP_FLAGS, flags ^ _LOOP_AUTOCLEAR)
            fcntl.ioctl(fd, _LOOP_SET_STATUS64, info)
    except OSError:  # not a loop device, or one without a file
        return False
    finally:
        os.close(fd)
    return bool(flags & _LOOP_AUTOCLEAR)


def give_back_all(sandbox: SandboxPaths) -> list[str]:
    """`give_back` everything that a pod was lent, whose machine is gone; answers what went wrong."""
    directory, complaints = f"{sandbox.dir}/roots", []
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    for name in names:
        try:
            give_back(f"{directory}/{name}")
        except SandboxError as error:
            complaints.append(str(error))
    remains.remove_tree(directory)
    return complaints


def _libc() -> Any:  # noqa: ANN401
    import ctypes

    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> None:
    import ctypes

    if result:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _unmount(path: str) -> None:
    _checked(_libc().umount2(os.fsencode(path), _NOFOLLOW))


def _mount(root: dict[str, Any]) -> None:
    import ctypes

    flags = 0
    for option in root["options"]:
        flags |= _FLAGS.get(option, 0)
    target, fstype = os.fsencode(root["path"]), root["fstype"].encode()
    data = ",".join(root["data"]).encode()
    libc = _libc()
    if libc.mount(os.fsencode(root["device"]), target, fstype, ctypes.c_ulong(flags), data):
        # Not all that the kernel shows of a file system it also takes.
        _checked(libc.mount(os.fsencode(root["device"]), target, fstype, ctypes.c_ulong(flags), None))
    if not root["shared"]:
        _checked(libc.mount(None, target, None, ctypes.c_ulong(_PRIVATE), None))
