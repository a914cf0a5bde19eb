"""System calls that Python does not wrap, behind a protocol so that tests can record them.

Mounting, the kernel's random generator, the clock, the hostname and the power switch change the machine;
whoever needs them is given a `SystemCalls`.  In service mode, where the agent shares the machine with
somebody else, `SharedMachineCalls` mounts but leaves clock, name, entropy and power alone.
"""

from __future__ import annotations

import _socket as socket
import ctypes
import errno
import fcntl
import os
import struct
import time
from typing import Protocol

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_IN_ROOT = 0x10

_SYS_OPENAT2 = 437
_RNDADDENTROPY = 0x40085203
_RNDRESEEDCRNG = 0x5207
_RB_POWER_OFF = 0x4321FEDC
_PR_SET_CHILD_SUBREAPER = 36
_CLONE_NEWPID = 0x20000000
_ADDR_NO_RANDOMIZE = 0x0040000
_ADJ_SETOFFSET = 0x0100
_ADJ_NANO = 0x2000
#: struct timex, and where its time is
_TIMEX_SIZE = 208
_TIMEX_TIME = 72
CLONE_NEWTIME = 0x00000080
_CLONE_NEWUTS, _CLONE_NEWIPC = 0x04000000, 0x08000000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
_libc.syscall.restype = ctypes.c_long


class SystemCalls(Protocol):
    """What changes the machine.  Every method raises OSError."""

    def mount(self, source: str, target: str, fstype: str, flags: int = 0, data: str = "") -> None: ...

    def umount(self, target: str, flags: int = 0) -> None: ...

    def add_entropy(self, data: bytes) -> None:
        """Credit `data` to the kernel's generator and reseed it at once."""

    def set_time(self, time_ns: int) -> None: ...

    def shift_time(self, shift_ns: int) -> None:
        """Set the clock forward or back in one step, whenever that is done."""

    def set_hostname(self, name: str) -> None: ...

    def power_off(self) -> None: ...


def _failed(what: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code), what)


class LinuxCalls:
    """The real ones."""

    def mount(self, source: str, target: str, fstype: str, flags: int = 0, data: str = "") -> None:
        if _libc.mount(
            os.fsencode(source),
            os.fsencode(target),
            os.fsencode(fstype) if fstype else None,
            flags,
            os.fsencode(data) if data else None,
        ):
            raise _failed(target)

    def umount(self, target: str, flags: int = 0) -> None:
        if _libc.umount2(os.fsencode(target), flags):
            raise _failed(target)

    def add_entropy(self, data: bytes) -> None:
        fd = os.open("/dev/urandom", os.O_WRONLY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _RNDADDENTROPY, struct.pack("ii", len(data) * 8, len(data)) + data)
            fcntl.ioctl(fd, _RNDRESEEDCRNG)
        finally:
            os.close(fd)

    def set_time(self, time_ns: int) -> None:
        time.clock_settime_ns(time.CLOCK_REALTIME, time_ns)

    def shift_time(self, shift_ns: int) -> None:
        timex = bytearray(_TIMEX_SIZE)
        struct.pack_into("I", timex, 0, _ADJ_SETOFFSET | _ADJ_NANO)
        struct.pack_into("2q", timex, _TIMEX_TIME, *divmod(shift_ns, 10**9))
        # What it returns besides is the state of a clock that nobody disciplines.
        if _libc.clock_adjtime(time.CLOCK_REALTIME, (ctypes.c_char * _TIMEX_SIZE).from_buffer(timex)) < 0:
            raise _failed("the clock")

    def set_hostname(self, name: str) -> None:
        socket.sethostname(name)

    def power_off(self) -> None:
        os.sync()
        if _libc.reboot(ctypes.c_int(_RB_POWER_OFF)):
            raise _failed("power off")


class SharedMachineCalls(LinuxCalls):
    """For an agent that is not alone: mounts are its own, the rest belongs to the machine."""

    def add_entropy(self, data: bytes) -> None:
        pass

    def set_time(self, time_ns: int) -> None:
        pass

    def shift_time(self, shift_ns: int) -> None:
        pass

    def set_hostname(self, name: str) -> None:
        pass

    def power_off(self) -> None:
        pass


def become_subreaper() -> None:
    """Make orphaned descendants our children, as they are for PID 1."""
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise _failed("prctl")


def load_at_fixed_addresses() -> None:
    """Have what this process executes from now on loaded at the same addresses each time; it is inherited.

    An emulator that knows translated code by its address then need not translate a program again that ran before.
    """
    if _libc.personality(_ADDR_NO_RANDOMIZE) < 0:
        raise _failed("personality")


def begin_pid_namespace() -> None:
    """Put the children that this thread starts from now on into a new PID namespace; the thread can do nothing else."""
    if _libc.unshare(_CLONE_NEWPID):
        raise _failed("unshare")


def begin_namespaces_with_sysctls() -> None:
    """Put the calling thread into IPC and UTS namespaces of its own."""
    if _libc.unshare(_CLONE_NEWIPC | _CLONE_NEWUTS):
        raise _failed("unshare")


def begin_time_namespace() -> None:
    """Have the children that this thread would start in a new time namespace."""
    if _libc.unshare(CLONE_NEWTIME):
        raise _failed("unshare")


def open_in_root(root: int, path: str, flags: int, mode: int = 0) -> int:
    """Open `path` as a process whose root is the directory `root` would; no symlink leads out of it.

    Magic links (``/proc/*/exe`` and the like) are refused with ELOOP.
    """
    how = struct.pack("QQQ", flags | os.O_CLOEXEC, mode, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
    while True:
        fd = _libc.syscall(
            ctypes.c_long(_SYS_OPENAT2),
            ctypes.c_long(root),
            ctypes.c_char_p(os.fsencode(path)),
            ctypes.c_char_p(how),
            ctypes.c_size_t(len(how)),
        )
        if fd >= 0:
            return int(fd)
        if ctypes.get_errno() not in (errno.EAGAIN, errno.EINTR):
            raise _failed(path)
