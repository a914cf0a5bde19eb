"""The guest as the host sees it: identity, storages, containers and what happens to them.

`Sandbox` joins the parts; RPCs call its methods.  Nothing here reads the kernel's boot id before the sandbox was
created, because clones of a template would otherwise share it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from vmsandbox_agent import documents
from vmsandbox_agent.cgroup import Cgroups, OomWatcher
from vmsandbox_agent.container import STOPPED, Container
from vmsandbox_agent.errors import (
    AgentError,
    AlreadyExistsError,
    InvalidArgumentError,
    InvalidStateError,
    NotFoundError,
    TimedOutError,
    UnsupportedError,
)
from vmsandbox_agent.events import Event, Events, Exited, OomKilled, Watcher
from vmsandbox_agent.layout import Layout, checked_id, put
from vmsandbox_agent.pidns import start_holder
from vmsandbox_agent.process import Process, Processes
from vmsandbox_agent.syscalls import MS_NODEV, MS_NOSUID, MS_REMOUNT, SystemCalls

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from vmsandbox_agent import listing
    from vmsandbox_agent.crun import Crun
    from vmsandbox_agent.network import Network
    from vmsandbox_agent.reaper import Reaper
    from vmsandbox_agent.storage import Storages
    from vmsandbox_protocol import agent_pb2 as pb

#: the control group that all containers are below
CONTAINERS_GROUP = "/containers"
_PROC_SYS = Path("/proc/sys")


class Sandbox:
    """One pod's state inside the guest."""

    def __init__(
        self,
        layout: Layout,
        calls: SystemCalls,
        *,
        reaper: Reaper,
        crun: Crun,
        cgroups: Cgroups,
        storages: Storages,
        parent_group: str = CONTAINERS_GROUP,
        shm: Path = Path("/dev/shm"),
        proc_sys: Path = _PROC_SYS,
        network: Network | None = None,
    ) -> None:
        self.layout = layout
        self.storages = storages
        self.processes = Processes()
        self.events = Events()
        self.identified = False
        self._calls = calls
        self._reaper = reaper
        self._crun = crun
        self._cgroups = cgroups
        self._parent_group = parent_group
        self._shm = shm
        self._proc_sys = proc_sys
        self._network = network
        self._lock = threading.Lock()
        self._containers: dict[str, Container | None] = {}
        self._storages_of: dict[str, list[str]] = {}
        self._creating = False
        self._pid_holder: int | None = None
        self._shares_pids = False
        self._oom = OomWatcher(cgroups, lambda container, count: self.events.publish(OomKilled(container, count)))

    # ------------------------------------------------------------ identity

    def create(self, request: pb.CreateSandboxRequest) -> None:
        """Give the guest its identity, or rehearse that.  Raises AlreadyExistsError once it has one."""
        with self._lock:
            if self._creating:
                raise AlreadyExistsError("the sandbox was created before")
            self._creating = True
        try:
            self._renew(request)
            self.storages.add(request.storages)
            if request.rehearsal and self._network is not None:
                self._network.start_again()
        except BaseException:
            self._creating = False
            raise
        if request.rehearsal:
            self._creating = False
            return
        self._shares_pids = request.shared_pid_namespace
        self.identified = True

    def _renew(self, request: pb.CreateSandboxRequest) -> None:
        if request.time_ns:  # first: it grows old
            self._calls.set_time(request.time_ns)
        if request.entropy:
            self.reseed(request.entropy)
        etc = self.layout.etc
        if request.machine_id:
            if len(request.machine_id) != 32 or not set(request.machine_id) <= set("0123456789abcdef"):
                raise InvalidArgumentError(f"machine id '{request.machine_id[:40]}' is not 32 lower-case hex digits")
            put(etc / "machine-id", request.machine_id + "\n")
        hostname = os.uname().nodename if request.rehearsal else request.hostname
        if hostname:
            self._calls.set_hostname(hostname)
            put(etc / "hostname", hostname + "\n")
            own = f"127.0.1.1\t{hostname}\n"
            put(etc / "hosts", "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n" + own)
        if request.hosts:
            self.write_etc("hosts", request.hosts)
        put(etc / "resolv.conf", _resolv_conf(request.dns))
        for path, content in request.files.items():
            self._write_file(path, content)
        if self._network is not None or request.interfaces or request.routes or request.neighbours:
            self.network.configure(request.interfaces, request.routes, request.neighbours)
        for name, value in request.sysctls.items():  # some are an interface's
            self._set_sysctl(name, value)
        if request.shm_bytes:
            self._size_shm(request.shm_bytes)

    @property
    def network(self) -> Network:
        if self._network is None:
            raise UnsupportedError("the network belongs to the machine that this agent shares with others")
        return self._network

    def reseed(self, entropy: bytes) -> None:
        """Renew the kernel's generator, and Python's own if anything has loaded it."""
        self._calls.add_entropy(entropy)
        if generator := sys.modules.get("random"):
            generator.seed(entropy + os.urandom(16))

    def set_time(self, time_ns: int, shift_ns: int) -> None:
        """Set the clock and shift it; 0 leaves it as it is."""
        if time_ns:
            self._calls.set_time(time_ns)
        if shift_ns:
            self._calls.shift_time(shift_ns)

    def write_etc(self, name: str, content: bytes) -> None:
        """Replace what a file says, but not the file: containers have it mounted."""
        if "/" in name or name in ("", ".", ".."):
            raise InvalidArgumentError(f"'{name}' is not a file of '{self.layout.etc}'")
        (self.layout.etc / name).write_bytes(content)

    def _write_file(self, path: str, content: bytes) -> None:
        target = Path(os.path.normpath(self.layout.files / path))
        if not target.is_relative_to(self.layout.files) or target == self.layout.files:
            raise InvalidArgumentError(f"file '{path}' is not below '{self.layout.files}'")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)

    def _set_sysctl(self, name: str, value: str) -> None:
        path = self._proc_sys / name.replace(".", "/")
        if ".." in path.parts or not path.is_relative_to(self._proc_sys):
            raise InvalidArgumentError(f"sysctl '{name}' is not a name")
        try:
            path.write_text(value)
        except OSError as error:
            raise InvalidArgumentError(f"cannot set sysctl '{name}' to '{value}': {error.strerror}") from error

    def _size_shm(self, size: int) -> None:
        self._calls.mount("shm", str(self._shm), "tmpfs", MS_REMOUNT | MS_NOSUID | MS_NODEV, f"size={size},mode=1777")

    # ------------------------------------------------------------ containers

    def create_container(self, request: pb.CreateContainerRequest) -> Container:
        """Mount its storages, create it, start it if asked; on failure nothing is left."""
        container_id = checked_id(request.container_id, "container")
        spec = documents.parsed(request.spec_json, "spec")
        with self._lock:
            if container_id in self._containers:
                raise AlreadyExistsError(f"container '{container_id}' exists already")
            self._containers[container_id] = None
        points = [storage.mount_point for storage in request.storages]
        mounted = False
        try:
            begun = time.monotonic_ns()
            self.storages.add(request.storages)
            mounted = True
            storage_us = (time.monotonic_ns() - begun) // 1000
            if self._shares_pids:
                self._join_pids(spec)
            container = Container(
                container_id,
                bundle=self.layout.bundle(container_id),
                spec=spec,
                group=f"{self._parent_group}/{container_id}",
                crun=self._crun,
                cgroups=self._cgroups,
                table=self.processes,
            )
            container.phases_us["storage"] = storage_us
            container.create(request, self._ended)
        except BaseException:
            with self._lock:
                del self._containers[container_id]
            if mounted:
                with suppress(OSError, AgentError):
                    self.storages.remove(points)
            raise
        with self._lock:
            self._containers[container_id] = container
            self._storages_of[container_id] = points
        self._oom.add(container_id, container.group)
        return container

    def container(self, container_id: str) -> Container:
        with self._lock:
            container = self._containers.get(container_id)
        if container is None:
            raise NotFoundError(f"container '{container_id[:130]}' does not exist")
        return container

    def containers(self) -> list[Container]:
        with self._lock:
            return [container for container in self._containers.values() if container is not None]

    def remove_container(self, container_id: str, *, force: bool) -> None:
        """Remove a container and release its storages."""
        container = self.container(container_id)
        container.remove(force=force)
        self._oom.remove(container_id)
        with self._lock:
            if self._containers.pop(container_id, None) is None:
                return
            points = self._storages_of.pop(container_id, [])
        self.storages.remove(points)

    def exec(self, request: pb.ExecRequest) -> Process:
        """Start another process in a running container."""
        checked_id(request.exec_id, "exec")
        return self.container(request.container_id).exec(request, self._ended)

    def list_processes(self, container_id: str) -> list[listing.Row]:
        """What runs in a container."""
        from vmsandbox_agent import listing

        container = self.container(container_id)
        execs = {process.child.pid: process.key[1] for process in self.processes.of(container_id)}
        with opened(container.open_root()) as root:
            return listing.rows(container.processes(), execs, root)

    def copy_in(self, container_id: str, path: str, pieces: Iterable[bytes]) -> int:
        """Unpack an archive into a directory of a container, or of the guest; answers its bytes."""
        from vmsandbox_agent import copying  # tarfile is not for the start

        with opened(self._root_of(container_id)) as root:
            return copying.copy_in(root, path, pieces)

    def copy_out(self, container_id: str, path: str, *, follow_link: bool) -> Iterator[bytes]:
        """An archive of a file or directory of a container, or of the guest."""
        from vmsandbox_agent import copying

        with opened(self._root_of(container_id)) as root:
            yield from copying.copy_out(root, path, follow_link=follow_link)

    def _root_of(self, container_id: str) -> int:
        if container_id:
            return self.container(container_id).open_root()
        return os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def acknowledge(self, container_id: str, exec_id: str) -> None:
        """Forget an ended exec; InvalidStateError while it runs."""
        process = self.processes.get(container_id, exec_id)
        if process.alive:
            raise InvalidStateError(f"process '{exec_id}' of '{container_id}'", state="running", wanted="acknowledge")
        if not exec_id:
            raise InvalidArgumentError("a container's init is acknowledged by removing the container")
        self.processes.forget(process)

    def watch(self) -> Watcher:
        return self.events.watch(self._happened)

    def _happened(self) -> list[Event]:
        kills = [(container.id, container.oom_kills()) for container in self.containers()]
        told: list[Event] = [OomKilled(container_id, count) for container_id, count in kills if count]
        for process in self.processes.all():
            if process.ending is not None:
                told.append(Exited(*process.key, process.ending))
        return told

    def _ended(self, process: Process) -> None:
        assert process.ending is not None
        self.events.publish(Exited(*process.key, process.ending))

    def _join_pids(self, spec: dict[str, object]) -> None:
        """Put the container into the PID namespace that all share, making its holder for the first."""
        with self._lock:
            if self._pid_holder is None:
                self._pid_holder = start_holder(self._reaper)
            path = f"/proc/{self._pid_holder}/ns/pid"
        linux = spec.setdefault("linux", {})
        assert isinstance(linux, dict)
        namespaces = [entry for entry in linux.get("namespaces") or [] if entry.get("type") != "pid"]
        linux["namespaces"] = [*namespaces, {"type": "pid", "path": path}]

    # ------------------------------------------------------------ end

    def destroy(self, grace: float) -> None:
        """End every container, in `grace` seconds by SIGTERM, and unmount everything."""
        containers = self.containers()
        if grace > 0:
            self._terminate(containers, time.monotonic() + grace)
        for container in containers:
            with suppress(OSError, AgentError):
                self.remove_container(container.id, force=True)
        self.processes.close()
        self.storages.remove_all()
        if self._pid_holder is not None:
            os.kill(self._pid_holder, signal.SIGKILL)
            self._pid_holder = None

    @staticmethod
    def _terminate(containers: Iterable[Container], deadline: float) -> None:
        running = [container for container in containers if container.status != STOPPED]
        for container in running:
            with suppress(OSError, AgentError):
                container.signal("", signal.SIGTERM, everybody=False)
        for container in running:
            if container.init is not None:
                with suppress(TimedOutError):
                    container.init.child.wait(max(0.0, deadline - time.monotonic()))


@contextmanager
def opened(fd: int) -> Iterator[int]:
    """Close a descriptor at the end of the block."""
    try:
        yield fd
    finally:
        os.close(fd)


def _resolv_conf(dns: pb.Dns) -> str:
    lines = [f"nameserver {server}" for server in dns.servers]
    if dns.searches:
        lines.append("search " + " ".join(dns.searches))
    if dns.options:
        lines.append("options " + " ".join(dns.options))
    return "".join(f"{line}\n" for line in lines)
