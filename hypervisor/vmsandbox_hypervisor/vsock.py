"""Context ids for AF_VSOCK: one is claimed by setting it on an open vhost-vsock descriptor, which QEMU then gets."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import struct
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

DEVICE = Path("/dev/vhost-vsock")
VHOST_VSOCK_SET_GUEST_CID = 0x4008AF60
#: 0 to 2 are reserved, and so is the highest
FIRST_CID, LAST_CID = 3, 2**32 - 2
ATTEMPTS = 64
_choose = random.SystemRandom().randint


class Claim(NamedTuple):
    """A context id that is ours for as long as `fd` is open somewhere."""

    cid: int
    fd: int


def available(device: Path = DEVICE) -> bool:
    """Whether this host has vhost-vsock at all and we may use it."""
    return os.access(device, os.R_OK | os.W_OK)


def claim(
    cid: int | None = None,
    *,
    device: Path = DEVICE,
    ioctl: Callable[[int, int, bytes], object] = fcntl.ioctl,
    choose: Callable[[int, int], int] = _choose,
) -> Claim:
    """Take `cid`, or any that is free.  Raises `OSError`: no vhost-vsock, or the id is in use."""
    fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        for attempt in range(1, ATTEMPTS + 1):
            wanted = choose(FIRST_CID, LAST_CID) if cid is None else cid
            try:
                ioctl(fd, VHOST_VSOCK_SET_GUEST_CID, struct.pack("@Q", wanted))
            except OSError as error:
                if error.errno != errno.EADDRINUSE or cid is not None or attempt == ATTEMPTS:
                    raise
                continue
            return Claim(wanted, fd)
        raise AssertionError("unreachable")
    except BaseException:
        os.close(fd)
        raise
