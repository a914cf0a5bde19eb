"""One container: an OCI bundle, its init, its execs, and what is released when it goes.

`documents` completes what the host sends of it.
"""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from vmsandbox_agent import clock_offsets, documents, hugepages, programs, scheduling
from vmsandbox_agent import process as processes
from vmsandbox_agent.crun import Crun, CrunError
from vmsandbox_agent.errors import (
    AgentError,
    AlreadyExistsError,
    InvalidArgumentError,
    InvalidStateError,
    UnsupportedError,
)
from vmsandbox_agent.layout import put
from vmsandbox_agent.process import Ending, Process, Processes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vmsandbox_agent.cgroup import Cgroups, Stats
    from vmsandbox_agent.reaper import Exit
    from vmsandbox_protocol import agent_pb2 as pb

CREATED, RUNNING, PAUSED, STOPPED = "created", "running", "paused", "stopped"
_SIGKILL = 9
#: seconds for processes to be gone after SIGKILL
_KILL_TIMEOUT = 20.0


class Container:
    """Obtain one from `create`; it stays until `remove`."""

    def __init__(
        self,
        container_id: str,
        *,
        bundle: Path,
        spec: dict[str, Any],
        group: str,
        crun: Crun,
        cgroups: Cgroups,
        table: Processes,
    ) -> None:
        self.id = container_id
        self.bundle = bundle
        self.group = group
        self.phases_us: dict[str, int] = {}
        self._spec = spec
        self._crun = crun
        self._cgroups = cgroups
        self._table = table
        self._lock = threading.RLock()
        self._paused = False
        self._root = -1
        #: its time namespace, if it has one of its own
        self._clocks = -1
        self.init: Process | None = None

    # ------------------------------------------------------------ life

    def create(self, request: pb.CreateContainerRequest, ended: Callable[[Process], None]) -> None:
        """Create the container, and start it if asked; on failure nothing of it is left."""
        with self._lock, ExitStack() as undo:
            self.bundle.mkdir(parents=True)
            undo.callback(_remove_flat, self.bundle)
            root_path = str((self._spec.get("root") or {}).get("path") or "")
            try:
                self._root = os.open(root_path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as error:
                raise InvalidArgumentError(f"root '{root_path}' cannot be used: {error.strerror}") from error
            undo.callback(self._close_root)
            documents.complete(self._spec, request, root=self._root, group=self.group)
            undo.callback(self._close_clocks)
            self._clocks = clock_offsets.take(self._spec.get("linux") or {})
            if self._clocks >= 0:
                self._crun.clocks[self.bundle] = f"/proc/{os.getpid()}/fd/{self._clocks}"
            put(self.bundle / "config.json", json.dumps(self._spec))
            begun = time.monotonic_ns()
            undo.callback(self._delete)
            self._allow((self._spec.get("linux") or {}).get("resources") or {})
            process = self._spec.get("process") or {}
            at_once = request.start and not scheduling.asked(process) and self._is_executable_as_seen_from_outside()
            self._create_init(request, ended, at_once=at_once)
            self.phases_us["create"] = (time.monotonic_ns() - begun) // 1000
            if request.start and not at_once:
                self.start()
            undo.pop_all()

    def _is_executable_as_seen_from_outside(self) -> bool:
        """Whether the program can be executed; one on a volume of the container's is only seen in the container."""
        try:
            programs.check(self._root, self._spec.get("process") or {})
        except AgentError:
            return False
        return True

    def _create_init(
        self, request: pb.CreateContainerRequest, ended: Callable[[Process], None], *, at_once: bool
    ) -> None:
        """Create the container, and start it `at_once` if that needs no further look at its program."""
        spec_process = self._spec.get("process") or {}
        make = self._crun.run if at_once else self._crun.create
        kills = self._kills_nearby()
        with processes.plumbed(request.stdio, self.bundle, "init") as plumbing:
            try:
                child = make(
                    self.id,
                    self.bundle,
                    stdio=plumbing.inner,
                    console_socket=plumbing.console.path if plumbing.console else None,
                    hooked=bool((self._spec.get("hooks") or {}).get("startContainer")),
                )
            except CrunError:
                # crun says why in words only; the usual reasons can be seen.
                from vmsandbox_agent import reasons

                reasons.of_container(
                    self._root,
                    self._spec,
                    group=self._parent(),
                    scratch=self.bundle / "scratch",
                    out_of_memory=self._kills_nearby() > kills,
                )
                programs.check(self._root, spec_process)
                raise
            try:
                if not at_once:
                    self._check_program(child.pid, spec_process)
                    scheduling.apply(spec_process, child.pid)
                streams = plumbing.connected()
            except BaseException:
                child.kill(_SIGKILL)
                child.wait(_KILL_TIMEOUT)
                raise
        self.init = Process((self.id, ""), child, streams)
        self.init.started = at_once
        self._follow(self.init, ended)

    def start(self) -> None:
        with self._lock:
            self._expect(CREATED, wanted="start")
            assert self.init is not None
            self._crun.start(self.id, self.bundle)
            self.init.started = True

    def remove(self, *, force: bool) -> None:
        """Forget a stopped container, or with `force` kill it first."""
        with self._lock:
            if self.status in (RUNNING, PAUSED, CREATED):
                if not force and self.status != CREATED:
                    raise InvalidStateError(f"container '{self.id}'", state=self.status, wanted="remove")
                self.kill_all()
            self._delete()
            self._close_root()
            self._close_clocks()
            _remove_flat(self.bundle)

    def kill_all(self) -> None:
        """SIGKILL to every process, and wait until they are gone."""
        self._cgroups.kill(self.group)
        for process in self._table.of(self.id):
            process.child.kill(_SIGKILL)
        for process in self._table.of(self.id):
            process.child.wait(_KILL_TIMEOUT)

    def _delete(self) -> None:
        """Make crun and the process table forget the container, whatever is left of it."""
        self._cgroups.kill(self.group)
        with suppress(CrunError):
            self._crun.delete(self.id, self.bundle)
        for process in self._table.of(self.id):
            with suppress(AgentError):
                process.child.kill(_SIGKILL)
                process.child.wait(_KILL_TIMEOUT)
            self._table.forget(process)
        if self.init is not None:
            self._table.forget(self.init)

    def _close_root(self) -> None:
        if self._root >= 0:
            os.close(self._root)
            self._root = -1

    def _close_clocks(self) -> None:
        if self._clocks >= 0:
            del self._crun.clocks[self.bundle]
            os.close(self._clocks)
            self._clocks = -1

    @property
    def status(self) -> str:
        if self.init is None or not self.init.alive:
            return STOPPED
        if not self.init.started:
            return CREATED
        return PAUSED if self._paused else RUNNING

    def _expect(self, *states: str, wanted: str) -> None:
        if self.status not in states:
            raise InvalidStateError(f"container '{self.id}'", state=self.status, wanted=wanted)

    # ------------------------------------------------------------ processes

    def exec(self, request: pb.ExecRequest, ended: Callable[[Process], None]) -> Process:
        """Make and start another process; answers when it runs."""
        with self._lock:
            wanted_states = (CREATED, RUNNING, PAUSED) if request.ignore_paused else (CREATED, RUNNING)
            self._expect(*wanted_states, wanted="run a process in")
            assert self.init is not None
            if self._table.has(self.id, request.exec_id):
                raise AlreadyExistsError(f"process '{request.exec_id}' of container '{self.id}' exists already")
            document = documents.of_exec(request, self._spec, root=self._root)
            # A process without an environment gets init's from crun.
            environment = document["env"] or (self._spec.get("process") or {}).get("env")
            self._check_program(self.init.child.pid, {**document, "env": environment})
            name = f"exec-{request.exec_id}"
            path = self.bundle / f"{name}.json"
            put(path, json.dumps(document))
            was_paused = self._paused
            if was_paused:  # crun runs nothing in a frozen group
                self._crun.resume(self.id, self.bundle)
            try:
                with processes.plumbed(request.stdio, self.bundle, name) as plumbing:
                    child = self._crun.exec(
                        self.id,
                        self.bundle,
                        name,
                        path,
                        stdio=plumbing.inner,
                        console_socket=plumbing.console.path if plumbing.console else None,
                        document=document,
                    )
                    try:
                        scheduling.complete(document, child.pid)
                        streams = plumbing.connected()
                    except BaseException:
                        child.kill(_SIGKILL)
                        raise
            except CrunError:
                self._expect(*wanted_states, wanted="run a process in")  # it may have ended meanwhile
                self._look_for_reasons(document)
                raise
            finally:
                if was_paused:
                    with suppress(CrunError):  # it ended
                        self._crun.pause(self.id, self.bundle)
                # By name: a pattern that is new each time would be a tenth of what an exec costs here.
                for kind in ("json", "pid", "log"):
                    (self.bundle / f"{name}.{kind}").unlink(missing_ok=True)
            process = Process((self.id, request.exec_id), child, streams)
            process.started = True
            if request.stdio.terminal and request.stdio.columns:
                streams.resize(request.stdio.columns, request.stdio.rows)
            self._follow(process, ended)
            return process

    def signal(self, exec_id: str, number: int, *, everybody: bool) -> None:
        if not 0 <= number <= 64:
            raise InvalidArgumentError(f"signal {number} does not exist")
        if not everybody:
            self._table.get(self.id, exec_id).signal(number)
            return
        if self.status == STOPPED and not self._cgroups.processes(self.group):
            raise InvalidStateError(f"container '{self.id}'", state=STOPPED, wanted="signal")
        if number == _SIGKILL:
            self._cgroups.kill(self.group)
            return
        for pid in self._cgroups.processes(self.group):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _follow(self, process: Process, ended: Callable[[Process], None]) -> None:
        kills_before = self._cgroups.oom_kills(self.group)

        def end(status: Exit) -> None:
            by_kernel = status.code == 128 + _SIGKILL and self._cgroups.oom_kills(self.group) > kills_before
            if process is self.init and not self._has_own_pid_namespace():
                self._cgroups.kill(self.group)  # nobody else does, where init is not the namespace's
            process.end(Ending(status, by_kernel))
            ended(process)

        self._table.add(process)
        process.child.when_ended(end)

    # ------------------------------------------------------------ resources

    def pause(self) -> None:
        with self._lock:
            self._expect(RUNNING, wanted="pause")
            self._crun.pause(self.id, self.bundle)
            self._paused = True

    def resume(self) -> None:
        with self._lock:
            self._expect(PAUSED, wanted="resume")
            self._crun.resume(self.id, self.bundle)
            self._paused = False

    def update(self, resources_json: bytes) -> None:
        """Apply OCI LinuxResources, all of them or none: crun stops at the first that the kernel refuses."""
        with self._lock:
            self._expect(CREATED, RUNNING, PAUSED, wanted="update")
            path = self.bundle / "resources.json"
            resources = documents.parsed(resources_json, "resources")
            path.write_text(json.dumps(resources))
            self._allow(resources)
            before = self._cgroups.limits(self.group)
            try:
                self._crun.update(self.id, self.bundle, path)
            except CrunError:
                self._cgroups.restore(self.group, before)
                from vmsandbox_agent import reasons

                reasons.of_resources(resources, group=self._parent())
                raise

    def _allow(self, resources: dict[str, Any]) -> None:
        """Prepare for resources; of what this kernel does not have crun would only name a file."""
        block_io = resources.get("blockIO") or {}
        weights = [name for name in ("weight", "weightDevice") if block_io.get(name)]
        if weights and not self._cgroups.has_io_weights(self.group.rpartition("/")[0]):
            raise UnsupportedError(
                f"'linux.resources.blockIO.{weights[0]}' is not supported: "
                "the guest's kernel has no weights of block I/O"
            )
        hugepages.allow(resources)

    def stats(self) -> Stats:
        return self._cgroups.stats(self.group)

    def oom_kills(self) -> int:
        return self._cgroups.oom_kills(self.group)

    def processes(self) -> list[int]:
        return self._cgroups.processes(self.group)

    def open_root(self) -> int:
        """A descriptor of the container's root directory, with its mounts while it lives."""
        if self.init is not None and self.init.alive:
            with suppress(OSError):
                return os.open(f"/proc/{self.init.child.pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        return os.dup(self._root)

    # ------------------------------------------------------------ documents

    def _check_program(self, pid: int, document: dict[str, Any]) -> None:
        try:
            root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return
        try:
            programs.check(root, document)
        finally:
            os.close(root)

    def _look_for_reasons(self, document: dict[str, Any]) -> None:
        from vmsandbox_agent import reasons

        root = self.open_root()
        try:
            reasons.of_process(root, document, self._spec.get("linux") or {})
        finally:
            os.close(root)

    def _parent(self) -> Path:
        """The directory of control groups that the container's is in."""
        from vmsandbox_agent.cgroup import MOUNT

        return MOUNT / self.group.lstrip("/").rpartition("/")[0]

    def _kills_nearby(self) -> int:
        """How often memory has run out in the groups beside ours, and in ours; 0 if it has no limit of its own."""
        resources = (self._spec.get("linux") or {}).get("resources") or {}
        limited = (resources.get("memory") or {}).get("limit")
        return self._cgroups.oom_kills(self.group.rpartition("/")[0]) if limited else 0

    def _has_own_pid_namespace(self) -> bool:
        namespaces = (self._spec.get("linux") or {}).get("namespaces") or []
        return any(entry.get("type") == "pid" and not entry.get("path") for entry in namespaces)


def _remove_flat(directory: Path) -> None:
    """Remove a directory that has no others in it, as far as it can be."""
    with suppress(OSError):
        for name in os.listdir(directory):
            (directory / name).unlink()
        directory.rmdir()
