"""The one door for child processes: QEMU, virtiofsd and the accelerator probe.

A child is watched through a pidfd, so the same class serves a process that this process started and one that
it adopted.  Children get descriptors at fixed numbers, which makes their command lines reproducible, and they
are started in a session of their own with nothing of our environment: they may outlive us.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
import select
import shutil
import signal
import struct
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vmsandbox_hypervisor.api import Confinement, SecurityLabels

ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
#: how long the parent of a process that has ended may take to bury it
_BURIAL_MS = 100
_PR_SET_CHILD_SUBREAPER = 36
#: `struct pidfd_info`: its size, where the exit status is, and the bit of the mask that asks for it
_PIDFD_GET_INFO, _PIDFD_INFO_SIZE, _PIDFD_INFO_STATUS, _PIDFD_INFO_EXIT = 0xC040FF0B, 64, 60, 1 << 3
#: what everything is started through, and the package it is in
SETPRIV, SETPRIV_PACKAGE = "setpriv", "util-linux"


class Child:
    """A process and its end.  Usable in the event loop in which it was made."""

    def __init__(self, name: str, pid: int, start_time: int, pidfd: int) -> None:
        self.name = name
        self.pid = pid
        self.start_time = start_time
        self._pidfd = pidfd
        self._loop = asyncio.get_running_loop()
        #: exit status as in `subprocess`, None if it is not ours to know
        self.exited: asyncio.Future[int | None] = self._loop.create_future()
        self._loop.add_reader(pidfd, self._reap)

    @classmethod
    def adopted(cls, name: str, pid: int, start_time: int) -> Child:
        """Watch a process that somebody else started; `ProcessLookupError` if it is not that one."""
        pidfd = os.pidfd_open(pid)
        try:
            # Read after the pidfd was taken: what it names cannot change any more.
            if read_start_time(pid) != start_time:
                raise ProcessLookupError(f"process {pid} is another one by now")
            return cls(name, pid, start_time, pidfd)
        except BaseException:
            os.close(pidfd)
            raise

    def _reap(self) -> None:
        status: int | None = None
        try:
            info = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
            if info is not None:
                status = info.si_status if info.si_code == os.CLD_EXITED else -info.si_status
        except ChildProcessError:
            status = _told_status(self._pidfd)
        self.forget()
        if not self.exited.done():
            self.exited.set_result(status)

    @property
    def alive(self) -> bool:
        return self._pidfd >= 0

    def send_signal(self, number: signal.Signals) -> None:
        """Signal it, unless it has ended."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def children(self) -> list[Child]:
        """Its own children at this moment; none once it has ended."""
        found: list[Child] = []
        if self.alive:
            with contextlib.suppress(OSError):
                for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
                    found.append(Child.adopted(f"child of {self.name}", int(pid), read_start_time(int(pid))))
        return found

    async def wait(self) -> int | None:
        return await asyncio.shield(self.exited)

    async def stop(self, *, grace: float = 0.0) -> int | None:
        """End it: SIGTERM first if it gets `grace` seconds, then SIGKILL; returns when it is gone."""
        if grace > 0 and self.alive:
            self.send_signal(signal.SIGTERM)
            await asyncio.wait({self.exited}, timeout=grace)
        self.send_signal(signal.SIGKILL)
        return await self.wait()

    def forget(self) -> None:
        """Stop watching; the process goes on by itself."""
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1


def _told_status(pidfd: int) -> int | None:
    """The exit status of a process that is not our child, where the kernel (6.15 and later) tells it."""
    poll = select.poll()
    poll.register(pidfd, 0)  # which reports POLLHUP alone: whoever its parent is has buried it
    poll.poll(_BURIAL_MS)
    asked = struct.pack("Q", _PIDFD_INFO_EXIT).ljust(_PIDFD_INFO_SIZE, b"\0")
    try:
        told = fcntl.ioctl(pidfd, _PIDFD_GET_INFO, asked)
    except OSError:
        return None
    (mask,) = struct.unpack_from("Q", told)
    if not mask & _PIDFD_INFO_EXIT:
        return None
    (status,) = struct.unpack_from("i", told, _PIDFD_INFO_STATUS)
    return os.waitstatus_to_exitcode(status)


def read_start_time(pid: int) -> int:
    """Field 22 of /proc/PID/stat, in clock ticks since the boot; `ProcessLookupError` if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise ProcessLookupError(f"no process {pid}") from error
    # The command name, in parentheses, may itself contain blanks and parentheses.
    return int(stat[stat.rindex(b")") + 2 :].split()[19])


def confined(argv: Sequence[str], identity: Confinement | None, labels: SecurityLabels | None = None) -> list[str]:
    """`argv` behind setpriv: no new privileges ever, with `identity` no privileges at all, and under `labels`."""
    prefix = [SETPRIV, "--no-new-privs"]
    if labels is not None and labels.selinux:
        prefix.append(f"--selinux-label={labels.selinux}")
    if labels is not None and labels.apparmor:
        prefix.append(f"--apparmor-profile={labels.apparmor}")
    if identity is not None:
        groups = ",".join(str(group) for group in identity.groups)
        prefix += [
            f"--reuid={identity.uid}",
            f"--regid={identity.gid}",
            f"--groups={groups}" if groups else "--clear-groups",
            "--inh-caps=-all",
            "--bounding-set=-all",
        ]
    return [*prefix, "--", *argv]


def adopt_orphans() -> None:
    """Become the parent of processes below us that lose theirs."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) < 0:
        raise OSError(ctypes.get_errno(), "cannot become a subreaper")


def spawn(name: str, argv: Sequence[str], *, fds: Mapping[int, int], stderr: int) -> Child:
    """Start `argv`; `fds` maps numbers in the child to descriptors here, `stderr` takes all it prints.

    Raises `FileNotFoundError` or another `OSError` if it cannot be executed.  Synchronous: it costs about a
    millisecond, whatever this process has loaded.
    """
    program = shutil.which(argv[0], path=ENVIRONMENT["PATH"])
    if program is None:
        remedy = f": install {SETPRIV_PACKAGE}" if argv[0] == SETPRIV else ""
        raise FileNotFoundError(f"no program '{argv[0]}'{remedy}")
    actions: list[tuple[int, int, str, int, int] | tuple[int, int, int] | tuple[int, int]] = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0)
    ]
    actions += [(os.POSIX_SPAWN_CLOSE, fd) for fd in _inheritable() if fd not in fds]
    base = max(fds, default=2) + 1
    moved: list[int] = []
    try:
        # Out of the way first: a descriptor's number here may be another one's number there.
        for target, source in [(1, stderr), (2, stderr), *sorted(fds.items())]:
            moved.append(fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, base))
            actions.append((os.POSIX_SPAWN_DUP2, moved[-1], target))
        pid = os.posix_spawn(
            program,
            list(argv),
            ENVIRONMENT,
            file_actions=actions,
            setsid=True,
            setsigmask=[],
            setsigdef=[number for number in signal.valid_signals() if number not in (signal.SIGKILL, signal.SIGSTOP)],
        )
    finally:
        for fd in moved:
            os.close(fd)
    return watched(name, pid)


def watched(name: str, pid: int) -> Child:
    """A child of this process that has just been started; one that cannot be watched is ended, and `OSError` raised."""
    # An unreaped child keeps its pid, so nothing here can name another process.
    try:
        return Child(name, pid, read_start_time(pid), os.pidfd_open(pid))
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def _inheritable() -> list[int]:
    """What this process would hand on: its own parent's descriptors.  A helper that outlives us must not hold them."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        # One of them was the listing's own and is gone by now.
        with contextlib.suppress(OSError):
            if int(name) > 2 and os.get_inheritable(int(name)):
                found.append(int(name))
    return found


def described(status: int | None) -> str:
    """An exit status in words."""
    if status is None:
        return "ended"
    if status < 0:
        try:
            return f"was killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"was killed by signal {-status}"
    return f"ended with status {status}"
