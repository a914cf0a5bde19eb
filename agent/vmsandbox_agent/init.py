"""What PID 1 does before and after it serves: file systems, limits, loopback, and switching off.

The initramfs has loaded modules and mounted the root read-only; it may have mounted some of these as well.  Everything
that is written lies on tmpfs.
"""

from __future__ import annotations

import _socket as socket
import errno
import fcntl
import os
import resource
import struct
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from vmsandbox_agent.syscalls import MS_NODEV, MS_NOEXEC, MS_NOSUID, SystemCalls

if TYPE_CHECKING:
    from collections.abc import Mapping

_MOUNTS = (
    ("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, ""),
    ("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, ""),
    ("devtmpfs", "/dev", "devtmpfs", MS_NOSUID, "mode=755"),
    ("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "mode=620,gid=5,ptmxmode=666"),
    ("shm", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777"),
    ("mqueue", "/dev/mqueue", "mqueue", MS_NOSUID | MS_NODEV | MS_NOEXEC, ""),
    ("run", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755"),
    ("tmp", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777"),
    ("cgroup2", "/sys/fs/cgroup", "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC, ""),
)
#: where a kernel may lack the feature
_OPTIONAL = {"/dev/mqueue", "/dev/pts", "/dev/shm"}
_MADE_IN_DEV = {"/dev/pts", "/dev/shm", "/dev/mqueue"}
_DEV_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
}

_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1
_MANY_FILES = 65536
_ETC_SIZE = "4m"


def mount_everything(calls: SystemCalls) -> None:
    """Mount what a system has; what is mounted already stays."""
    mounted = set()
    for source, target, fstype, flags, data in _MOUNTS:
        if target in _MADE_IN_DEV:
            with suppress(OSError):
                os.mkdir(target)
        if target in mounted or _is_mounted(target, fstype):
            continue
        try:
            calls.mount(source, target, fstype, flags, data)
        except OSError as error:
            if target not in _OPTIONAL and error.errno != errno.EBUSY:
                raise
        mounted.add(target)
    for name, target in _DEV_LINKS.items():
        with suppress(OSError):
            os.symlink(target, f"/dev/{name}")


def _is_mounted(target: str, fstype: str) -> bool:
    try:
        lines = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return False
    return any(fields[1] == target and fields[2] == fstype for fields in map(str.split, lines))


def survive_containers(calls: SystemCalls, etc: Path) -> None:
    """Have as many descriptors as streams may need, and keep what containers may write to apart from our own files.

    `etc` is where files are that containers have mounted.  The OOM killer never chooses PID 1; asking for that by
    ``oom_score_adj`` would be inherited by every process that is started in a container.
    """
    etc.mkdir(parents=True, exist_ok=True)
    calls.mount("etc", str(etc), "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, f"mode=755,size={_ETC_SIZE}")
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (_MANY_FILES, _MANY_FILES))


def raise_loopback() -> None:
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)) as sock:
        request = struct.pack("16sH14x", b"lo", 0)
        flags = struct.unpack("16sH14x", fcntl.ioctl(sock, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | _IFF_UP))


def parameters(command_line: str) -> Mapping[str, str]:
    """Our own parameters of the kernel command line: ``vmsandbox.NAME=VALUE``."""
    found = {}
    for word in command_line.split():
        name, _, value = word.partition("=")
        if name.startswith("vmsandbox."):
            found[name.removeprefix("vmsandbox.")] = value
    return found
