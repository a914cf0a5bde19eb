"""Disks of the host that a container is given: what may be one, and in which ways it is in use already."""

from __future__ import annotations

import os
import stat

from vmsandbox import lent
from vmsandbox.errors import InvalidArgumentError, InvalidBundleError, UnsupportedError


def check(path: str, *, read_only: bool) -> None:
    """Refuse what is no disk, cannot be opened, or would be damaged.  Blocks: it looks at the source.

    Raises `InvalidArgumentError` that says why and what to do.
    """
    try:
        # Without blocking: what turns out to be a FIFO must not wait for its other end.
        fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise InvalidArgumentError(f"cannot give device '{path}': there is no such file") from None
    except IsADirectoryError:
        raise InvalidArgumentError(f"cannot give device '{path}': it is a directory; '-v' shares one") from None
    except OSError as error:
        how = "" if read_only else "; ':r' behind it gives it read-only"
        raise InvalidArgumentError(f"cannot give device '{path}': {error.strerror}{how}") from error
    try:
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode):
            if status.st_size < 512:
                raise InvalidArgumentError(f"cannot give device '{path}': the file holds less than a sector")
            return
        if not stat.S_ISBLK(status.st_mode):
            raise InvalidArgumentError(
                f"cannot give device '{path}': only block devices and raw files can be seen inside a virtual machine"
            )
    finally:
        os.close(fd)
    place = mounted_at(os.major(status.st_rdev), os.minor(status.st_rdev))
    if not read_only and (place or not lent.is_alone(path)):
        where = f"mounted at '{place}'" if place else "in use"
        raise InvalidArgumentError(
            f"cannot give device '{path}': the host has it {where}, and two who write destroy it; "
            f"unmount it, or give it read-only as '--device {path}:r'"
        )


def find(numbers: tuple[int, int], *, member: str, read_only: bool) -> tuple[str, bool]:
    """The node of the disk that a bundle's `member` names by its numbers, and whether it has to be plugged read-only.

    Raises InvalidBundleError if there is none, UnsupportedError if it would be damaged.  Blocks: it opens the disk.
    """
    major, minor = numbers
    path = lent.node_of(numbers)
    if not path:
        raise InvalidBundleError(f"'{member}' names the disk {major}:{minor}, which this host does not have")
    read_only = read_only or _is_read_only(numbers)
    if not read_only and not lent.is_alone(path):
        place = mounted_at(major, minor)
        where = f"mounted at '{place}'" if place else "in use"
        raise UnsupportedError(
            f"'{member}' is the disk '{path}', which the host has {where}: two who write destroy it; unmount it, or "
            "allow the container to read it only"
        )
    return path, read_only


def _is_read_only(numbers: tuple[int, int]) -> bool:
    try:
        with open(f"/sys/dev/block/{numbers[0]}:{numbers[1]}/ro", encoding="ascii") as file:
            return file.read().strip() == "1"
    except OSError:
        return False


def mounted_at(major: int, minor: int) -> str:
    """Where this host has a block device mounted; empty if nowhere."""
    wanted = f"{major}:{minor}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields = line.split(" ", 5)
            if fields[2] == wanted:
                return fields[4]
    return ""
