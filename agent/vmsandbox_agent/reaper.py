"""The one place where children are started and waited for.

PID 1 inherits every orphan of the guest, so nobody else may call wait: an exit status is taken once and the pid
is then free for reuse.  A thread blocks in waitid(2) for any child and hands each status to whoever claimed the
pid.  A container's init is not started here but inherited when crun ends; it may be dead before its pid is known.
Between `expecting` and `claim` the statuses of unknown pids are therefore kept.

Children are started with posix_spawn only: a fork of a process with many threads is not safe.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from vmsandbox_agent.errors import TimedOutError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence


class Exit(NamedTuple):
    """How a process ended: `code` as a shell says it, `signal` 0 if it ended by itself."""

    code: int
    signal: int
    time_ns: int


class Child:
    """A process that this one is the parent of; `wait` may be called by many threads."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.exit: Exit | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._callbacks: list[Callable[[Exit], None]] = []

    def wait(self, timeout: float | None = None) -> Exit:
        """Wait for the end; raises TimedOutError."""
        if not self._ended.wait(timeout):
            raise TimedOutError(f"process {self.pid} has not ended after {timeout:g} s")
        assert self.exit is not None
        return self.exit

    def kill(self, number: int) -> bool:
        """Send a signal; False if the process has ended.  Never hits another process that got its pid."""
        with self._lock:
            if self.exit is not None:
                return False
            os.kill(self.pid, number)
            return True

    def when_ended(self, callback: Callable[[Exit], None]) -> None:
        """Call `callback` in the reaper's thread at the end, or now if that has been."""
        with self._lock:
            if self.exit is None:
                self._callbacks.append(callback)
                return
        callback(self.exit)

    def _end(self, status: Exit) -> None:
        self.exit = status
        self._ended.set()
        for callback in self._callbacks:
            callback(status)


class Reaper:
    """Starts children and reaps them, and those inherited."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._children: dict[int, Child] = {}
        self._unclaimed: dict[int, Exit] = {}
        self._expecting = 0
        self._something_to_wait_for = threading.Event()
        self._thread = threading.Thread(target=self._reap, name="reaper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def spawn(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
    ) -> Child:
        """Start a program; a missing stream is /dev/null.  Every other descriptor is close-on-exec."""
        actions: list[tuple[int, int, int] | tuple[int, int, str, int, int]] = []
        for target, fd in enumerate((stdin, stdout, stderr)):
            if fd is None:
                actions.append((os.POSIX_SPAWN_OPEN, target, "/dev/null", os.O_RDWR, 0))
            else:
                actions.append((os.POSIX_SPAWN_DUP2, fd, target))
        with self._lock:
            pid = os.posix_spawn(
                argv[0],
                list(argv),
                dict(env),
                file_actions=actions,
                setsid=True,
                setsigmask=[],
                setsigdef=[signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM, signal.SIGCHLD],
            )
            child = self._children[pid] = Child(pid)
        self._something_to_wait_for.set()
        return child

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """While in the block no status of an inherited child is thrown away."""
        with self._lock:
            if self._expecting == 0:
                self._unclaimed.clear()
            self._expecting += 1
        try:
            yield
        finally:
            with self._lock:
                self._expecting -= 1

    def claim(self, pid: int) -> Child:
        """Take responsibility for a child that was inherited within this `expecting` block."""
        with self._lock:
            child = Child(pid)
            status = self._unclaimed.pop(pid, None)
            if status is None or _is_child(pid):
                # A kept status may be of an older process that had the same pid.
                status = None
                self._children[pid] = child
        if status is not None:
            child._end(status)
        self._something_to_wait_for.set()
        return child

    def _reap(self) -> None:
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
            except ChildProcessError:
                self._something_to_wait_for.wait()
                self._something_to_wait_for.clear()
                continue
            if found is None:  # only with WNOHANG
                continue
            if found.si_code == os.CLD_EXITED:
                status = Exit(found.si_status & 0xFF, 0, time.time_ns())
            else:
                status = Exit(128 + found.si_status, found.si_status, time.time_ns())
            with self._lock:
                child = self._children.pop(found.si_pid, None)
                # The pid is freed under the locks of those who signal or start children.
                if child is not None:
                    with child._lock:
                        os.waitpid(found.si_pid, 0)
                        child.exit = status
                else:
                    os.waitpid(found.si_pid, 0)
                    if self._expecting:
                        self._unclaimed[found.si_pid] = status
            if child is not None:
                child._end(status)


def _is_child(pid: int) -> bool:
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    except ChildProcessError:
        return False
    return True
