"""The control groups of the containers: what crun made there is read, and killed, here.

The guest has cgroup v2.  On a host that still has the controllers of v1 the agent can run as a service; then the
same questions are answered from there.  All containers are below one group of ours, which leaves the agent
enough processes and memory whatever a container does.
"""

from __future__ import annotations

import os
import select
import threading
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MOUNT = Path("/sys/fs/cgroup")
#: processes and threads that containers leave to the agent and the kernel
PIDS_RESERVE = 256
#: what a limit that is not set reads as
UNLIMITED = (1 << 64) - 1
_V1_UNLIMITED = 1 << 62
_ROUNDS = 1000
#: controllers with limits, and files of theirs that can be written and are none
_LIMITED = frozenset({"cpu", "cpuset", "hugetlb", "io", "memory", "misc", "pids", "rdma"})
_NO_LIMITS = frozenset({"peak", "pressure", "weight.nice"})
#: what takes a limit away from one device, by the file
_UNSET = {"io.max": "rbps=max wbps=max riops=max wiops=max", "io.weight": "default"}


class Stats(NamedTuple):
    """One reading; bytes, microseconds and counts.  A limit of 0 is none."""

    cpu_usage_us: int = 0
    cpu_user_us: int = 0
    cpu_system_us: int = 0
    cpu_periods: int = 0
    cpu_throttled_periods: int = 0
    cpu_throttled_us: int = 0
    memory_bytes: int = 0
    memory_limit_bytes: int = 0
    memory_max_bytes: int = 0
    pids: int = 0
    pids_limit: int = 0
    io_read_bytes: int = 0
    io_write_bytes: int = 0
    oom_kills: int = 0
    memory_stat: Mapping[str, int] = MappingProxyType({})


class Cgroups(Protocol):
    """The hierarchy of one machine; groups are named by their path from its top, e.g. "/containers/web"."""

    def prepare(self, parent: str) -> None:
        """Make the group that all containers are below."""

    def processes(self, group: str) -> list[int]:
        """The pids in a group and below it; empty if it is gone."""

    def kill(self, group: str) -> None:
        """SIGKILL to everything in a group, until nothing is left to be hit; frozen ones die too."""

    def limits(self, group: str) -> Mapping[str, str]:
        """What a group's limits are, by their files."""

    def restore(self, group: str, limits: Mapping[str, str]) -> None:
        """Make a group's limits what they were, as far as the kernel lets them be."""

    def stats(self, group: str) -> Stats: ...

    def has_io_weights(self, parent: str) -> bool:
        """Whether the kernel knows weights of block I/O for the groups in `parent`."""

    def oom_kills(self, group: str) -> int: ...

    def watch_oom(self, group: str) -> tuple[list[int], int]:
        """Open what tells of an OOM: descriptors to hold, the last of them to poll, and the poll events."""


def detect(mount: Path = MOUNT) -> Cgroups:
    return UnifiedCgroups(mount) if (mount / "cgroup.controllers").exists() else ControllerCgroups(mount)


class UnifiedCgroups:
    """cgroup v2."""

    def __init__(self, mount: Path = MOUNT) -> None:
        self._mount = mount

    def _path(self, group: str) -> Path:
        return self._mount / group.lstrip("/")

    def prepare(self, parent: str) -> None:
        path = self._path(parent)
        path.mkdir(parents=True, exist_ok=True)
        for controller in (_read(self._mount / "cgroup.controllers") or "").split():
            _write(self._mount / "cgroup.subtree_control", f"+{controller}")
            _write(path / "cgroup.subtree_control", f"+{controller}")
        threads = _number(Path("/proc/sys/kernel/threads-max"))
        highest = _number(Path("/proc/sys/kernel/pid_max"))
        _write(path / "pids.max", str(max(64, min(threads, highest) - PIDS_RESERVE)))

    def protect(self, group: str, memory_bytes: int) -> None:
        """Put this process into a group of its own whose memory is not reclaimed for others."""
        path = self._path(group)
        path.mkdir(exist_ok=True)
        _write(path / "memory.min", str(memory_bytes))
        _write(path / "cgroup.procs", str(os.getpid()))

    def processes(self, group: str) -> list[int]:
        pids = []
        for directory, _, _ in os.walk(self._path(group)):
            pids += [int(line) for line in (_read(Path(directory) / "cgroup.procs") or "").split()]
        return pids

    def kill(self, group: str) -> None:
        _write(self._path(group) / "cgroup.kill", "1")

    def limits(self, group: str) -> dict[str, str]:
        found = {}
        with suppress(OSError), os.scandir(self._path(group)) as entries:
            for entry in entries:
                controller, _, rest = entry.name.partition(".")
                if controller not in _LIMITED or rest in _NO_LIMITS or entry.stat().st_mode & 0o600 != 0o600:
                    continue
                if (text := _read(Path(entry.path))) is not None:
                    found[entry.name] = text
        return found

    def restore(self, group: str, limits: Mapping[str, str]) -> None:
        path = self._path(group)
        # Twice, because one may not be what it was while another is not.
        for _ in range(2):
            for name, text in limits.items():
                now = _read(path / name) or ""
                for line in _undoing(name, text, now) if now != text else ():
                    _write(path / name, line)

    def has_io_weights(self, parent: str) -> bool:
        # The group at the top has no such file, and one of ours is not there yet.
        return any((self._path(parent) / name).exists() for name in ("io.weight", "io.bfq.weight"))

    def stats(self, group: str) -> Stats:
        path = self._path(group)
        cpu = _table(path / "cpu.stat")
        io = [_pairs(line) for line in (_read(path / "io.stat") or "").splitlines()]
        return Stats(
            cpu_usage_us=cpu.get("usage_usec", 0),
            cpu_user_us=cpu.get("user_usec", 0),
            cpu_system_us=cpu.get("system_usec", 0),
            cpu_periods=cpu.get("nr_periods", 0),
            cpu_throttled_periods=cpu.get("nr_throttled", 0),
            cpu_throttled_us=cpu.get("throttled_usec", 0),
            memory_bytes=_number(path / "memory.current"),
            memory_limit_bytes=_number(path / "memory.max"),
            memory_max_bytes=_number(path / "memory.peak"),
            pids=_number(path / "pids.current"),
            pids_limit=_number(path / "pids.max"),
            io_read_bytes=sum(device.get("rbytes", 0) for device in io),
            io_write_bytes=sum(device.get("wbytes", 0) for device in io),
            oom_kills=self.oom_kills(group),
            memory_stat=_table(path / "memory.stat"),
        )

    def oom_kills(self, group: str) -> int:
        return _table(self._path(group) / "memory.events").get("oom_kill", 0)

    def watch_oom(self, group: str) -> tuple[list[int], int]:
        fd = os.open(self._path(group) / "memory.events", os.O_RDONLY | os.O_CLOEXEC)
        os.read(fd, 4096)  # the kernel reports what changes after a read
        return [fd], select.POLLPRI


class ControllerCgroups:
    """cgroup v1, one hierarchy per controller."""

    def __init__(self, mount: Path = MOUNT) -> None:
        self._mount = mount

    def _path(self, controller: str, group: str) -> Path:
        return self._mount / controller / group.lstrip("/")

    def prepare(self, parent: str) -> None:
        """Nothing: crun makes the groups on its way."""

    def processes(self, group: str) -> list[int]:
        pids: list[int] = []
        for controller in ("pids", "memory", "freezer"):
            for directory, _, _ in os.walk(self._path(controller, group)):
                pids += [int(line) for line in (_read(Path(directory) / "cgroup.procs") or "").split()]
            if pids:
                break
        return pids

    def has_io_weights(self, parent: str) -> bool:
        return True  # crun says what is missing

    def kill(self, group: str) -> None:
        frozen = self._path("freezer", group) / "freezer.state"
        for _ in range(_ROUNDS):
            pids = self.processes(group)
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, 9)
            _write(frozen, "THAWED")
            if not pids or pids == self.processes(group):
                return

    def limits(self, group: str) -> dict[str, str]:
        return {}

    def restore(self, group: str, limits: Mapping[str, str]) -> None:
        """Nothing: some of v1's files say how they were changed, and not what they are."""

    def stats(self, group: str) -> Stats:
        cpu = _table(self._path("cpu", group) / "cpu.stat")
        times = _table(self._path("cpuacct", group) / "cpuacct.stat")
        memory = self._path("memory", group)
        tick = 1_000_000 // os.sysconf("SC_CLK_TCK")
        return Stats(
            cpu_usage_us=_number(self._path("cpuacct", group) / "cpuacct.usage") // 1000,
            cpu_user_us=times.get("user", 0) * tick,
            cpu_system_us=times.get("system", 0) * tick,
            cpu_periods=cpu.get("nr_periods", 0),
            cpu_throttled_periods=cpu.get("nr_throttled", 0),
            cpu_throttled_us=cpu.get("throttled_time", 0) // 1000,
            memory_bytes=_number(memory / "memory.usage_in_bytes"),
            memory_limit_bytes=_number(memory / "memory.limit_in_bytes"),
            memory_max_bytes=_number(memory / "memory.max_usage_in_bytes"),
            pids=_number(self._path("pids", group) / "pids.current"),
            pids_limit=_number(self._path("pids", group) / "pids.max"),
            oom_kills=self.oom_kills(group),
            memory_stat=_table(memory / "memory.stat"),
        )

    def oom_kills(self, group: str) -> int:
        return _table(self._path("memory", group) / "memory.oom_control").get("oom_kill", 0)

    def watch_oom(self, group: str) -> tuple[list[int], int]:
        memory = self._path("memory", group)
        control = os.open(memory / "memory.oom_control", os.O_RDONLY | os.O_CLOEXEC)
        event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            (memory / "cgroup.event_control").write_text(f"{event} {control}")
        except OSError:
            os.close(event)
            os.close(control)
            raise
        return [control, event], select.POLLIN


class OomWatcher:
    """One thread that tells of OOM kills as they happen."""

    def __init__(self, cgroups: Cgroups, report: Callable[[str, int], None]) -> None:
        """`report` is called with a container's id and the number of kills so far."""
        self._cgroups = cgroups
        self._report = report
        self._lock = threading.Lock()
        self._epoll = select.epoll()
        self._watched: dict[int, tuple[str, str, list[int]]] = {}
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wakeup, select.EPOLLIN)

    def add(self, container_id: str, group: str) -> None:
        try:
            fds, events = self._cgroups.watch_oom(group)
        except OSError:
            return  # no memory controller: there are no such kills
        with self._lock:
            self._watched[fds[-1]] = (container_id, group, fds)
            self._epoll.register(fds[-1], events)
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="oom", daemon=True)
                self._thread.start()

    def remove(self, container_id: str) -> None:
        with self._lock:
            for fd, (watched, _, fds) in list(self._watched.items()):
                if watched == container_id:
                    del self._watched[fd]
                    with suppress(OSError):
                        self._epoll.unregister(fd)
                    for each in fds:
                        os.close(each)

    def stop(self) -> None:
        """Watch no more."""
        with self._lock:
            containers = {container_id for container_id, _, _ in self._watched.values()}
        for container_id in containers:
            self.remove(container_id)
        self._stopped = True
        os.eventfd_write(self._wakeup, 1)
        if self._thread is not None:
            self._thread.join()
        self._epoll.close()
        os.close(self._wakeup)

    def _watch(self) -> None:
        while not self._stopped:
            for fd, _ in self._epoll.poll():
                with self._lock:
                    entry = self._watched.get(fd)
                    if entry is None:
                        continue
                    container_id, group, fds = entry
                    try:
                        os.pread(fd, 4096, 0) if len(fds) == 1 else os.eventfd_read(fd)
                        kills = self._cgroups.oom_kills(group)
                    except OSError:  # the group is gone
                        self._epoll.unregister(fd)
                        continue
                if kills:
                    self._report(container_id, kills)


def _read(path: Path) -> str | None:
    try:
        with path.open() as file:
            return file.read(1 << 20)
    except OSError:
        return None


def _write(path: Path, value: str) -> None:
    with suppress(OSError), path.open("w") as file:
        file.write(value)


def _undoing(name: str, before: str, now: str) -> list[str]:
    """The writes that turn what a file says `now` into what it said `before`; the kernel takes one device a write."""
    if name not in _UNSET:
        return [before]
    devices = {line.partition(" ")[0] for line in before.splitlines()}
    new = {line.partition(" ")[0] for line in now.splitlines()} - devices
    return [*(f"{device} {_UNSET[name]}" for device in sorted(new)), *before.splitlines()]


def _number(path: Path) -> int:
    """A file's number; 0 for "max", nonsense and files that are not there."""
    text = (_read(path) or "").strip()
    number = int(text) if text.isdigit() else 0
    return number if number < _V1_UNLIMITED else 0


def _table(path: Path) -> dict[str, int]:
    table = {}
    for line in (_read(path) or "").splitlines():
        name, _, value = line.partition(" ")
        if value.isdigit():
            table[name] = int(value)
    return table


def _pairs(line: str) -> dict[str, int]:
    pairs = (word.partition("=") for word in line.split()[1:])
    return {name: int(value) for name, _, value in pairs if value.isdigit()}
