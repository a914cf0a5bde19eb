"""Descriptors of other processes."""

from __future__ import annotations

import ctypes
import os

_PIDFD_GETFD = 438
_libc = ctypes.CDLL(None, use_errno=True)


def descriptor_of(pid: int, number: int) -> int:
    """A descriptor of ours for the open file that a process has as `number`, whatever it is; the caller closes it."""
    pidfd = os.pidfd_open(pid)
    try:
        fd = int(_libc.syscall(_PIDFD_GETFD, pidfd, number, 0))
        if fd < 0:
            error = ctypes.get_errno()
            raise OSError(error, f"descriptor {number} of process {pid}: {os.strerror(error)}")
        return fd
    finally:
        os.close(pidfd)
