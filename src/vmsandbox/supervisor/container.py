"""One container's life in the pod: what it was given, in which order, and how it is given back.

Everything acquired for a container is pushed on its exit stack as it is acquired, so undoing a failed creation
and deleting a finished container are the same code, in reverse order, every step attempted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

from vmsandbox import remains
from vmsandbox.errors import NotFoundError, SandboxError
from vmsandbox.supervisor import shares, slots, store
from vmsandbox.supervisor.aio import together
from vmsandbox.supervisor.giving import Given
from vmsandbox.supervisor.lifecycle import Status, advance
from vmsandbox.supervisor.process import Exit, Process
from vmsandbox.supervisor.sandbox import Demand
from vmsandbox_protocol import agent_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vmsandbox.supervisor.sandbox import Sandbox, Surroundings

log = logging.getLogger(__name__)

#: nodes of the disks of the host that containers are given
DEVICES = "/run/vmsandbox/devices"
#: ids of the host's disks begin with this
HOST_DISK = "host-"
#: seconds the creation of a container may take in the guest
CREATE_TIMEOUT = 120.0


class Container:
    """A container of this pod, from the request to create it until it is forgotten; how it is made, its kind says."""

    def __init__(self, around: Surroundings, document: dict[str, Any], shared: shares.Plan | None = None) -> None:
        self.around = around
        self.id: str = document["id"]
        self.document = document
        self.shared = shared or shares.Plan()
        if self.shared:
            # Noted before anything is mounted.
            document["shares"] = self.shared.document()
        self.lock = asyncio.Lock()
        self.init = Process(
            self.id,
            "",
            terminal=bool(document.get("terminal")),
            standin=document.get("standin"),
        )
        self.execs: dict[str, Process] = {}
        self.stack = Given()
        #: another life of it is being made: its document says "stopped" until it runs
        self.starting = False
        #: it has ended, and what it had in the machine is given back
        self.released = asyncio.Event()
        #: processes that the guest's kernel has killed for want of memory, and what says that there are more
        self.oom_kills = 0
        self._oom_or_end = asyncio.Event()

    def __str__(self) -> str:
        return f"container '{self.document.get('name') or self.id[:12]}'"

    @property
    def short(self) -> str:
        """What names disks and places of the container in the machine."""
        return self.id[:12]

    # ------------------------------------------------------------ state

    @property
    def status(self) -> Status:
        return self.document["status"]  # type: ignore[no-any-return]

    @property
    def autoremove(self) -> bool:
        return bool(self.document.get("autoremove"))

    def advance(self, verb: str) -> None:
        """Change the state as `verb` does, or raise `InvalidStateError`; writes the document."""
        self.document["status"] = advance(str(self), self.status, verb)
        self.save()

    def require(self, verb: str) -> None:
        """Raise `InvalidStateError` unless `verb` makes sense now."""
        advance(str(self), self.status, verb)

    def save(self) -> None:
        store.save_container(self.around.paths, self.id, self.document)

    def note(self) -> None:
        """Write down what has happened already: a full disk does not undo it, and is no reason to end the pod."""
        try:
            self.save()
        except OSError as error:
            log.warning("the document of %s is out of date: %s", self, error)

    def add_exec(self, exec_id: str, *, terminal: bool = False, standin: dict[str, Any] | None = None) -> Process:
        """Know another process; its stand-in is noted so that a later supervisor can judge by it."""
        process = Process(self.id, exec_id, terminal=terminal, standin=standin)
        self.execs[exec_id] = process
        self.document.setdefault("execs", {})[exec_id] = {"terminal": terminal, "standin": standin}
        try:
            self.save()
        except BaseException:
            del self.execs[exec_id], self.document["execs"][exec_id]
            raise
        return process

    def drop_exec(self, process: Process) -> None:
        self.execs.pop(process.exec_id, None)
        if self.document.get("execs", {}).pop(process.exec_id, None) is not None and self.status != "stopped":
            self.note()

    def restore_processes(self) -> None:
        """Know again what an earlier supervisor noted."""
        if "exit" in self.document:
            self.init.finish(Exit.of(self.document["exit"]))
            if not self.init.has_standin():
                self.init.delivered.set()
        for exec_id, noted in (self.document.get("execs") or {}).items():
            process = Process(self.id, exec_id, terminal=bool(noted.get("terminal")), standin=noted.get("standin"))
            process.settled.set()
            self.execs[exec_id] = process

    def process(self, exec_id: str) -> Process:
        if not exec_id:
            return self.init
        try:
            return self.execs[exec_id]
        except KeyError:
            raise NotFoundError(f"no such exec in {self}: '{exec_id}'") from None

    def oom_kills_are(self, count: int) -> None:
        """Note how many processes have been killed; a guest may say so any number of times."""
        if count <= self.oom_kills:
            return
        self.oom_kills = count
        self._oom_or_end.set()
        if not self.document.get("oom_killed"):
            self.document["oom_killed"] = True
            self.note()

    async def oom_or_end(self, seen: int) -> None:
        """Return once more than `seen` processes have been killed, or the container has ended."""
        while self.oom_kills <= seen and self.status != "stopped":
            self._oom_or_end.clear()
            await self._oom_or_end.wait()

    def ended(self, status: Exit) -> None:
        """Record that the init process has ended; its execs ended with it."""
        self._oom_or_end.set()
        if self.status == "stopped":
            return
        self.document["exit"] = status.document()
        self.document["finished"] = time.time()
        self.document["status"] = "stopped"
        self.note()

    # ------------------------------------------------------------ creation

    async def _create_in_guest(
        self, sandbox: Sandbox, request: pb.CreateContainerRequest, demand: Demand, *, began: float
    ) -> None:
        """Have the agent create it, whose disks and shares were begun to be attached at `began`.

        What a container without limits may use beyond the machine's base is there before it can ask for it.
        """
        attached = time.monotonic()
        creating = self._asked_for(sandbox, request)
        if demand == Demand():
            await together(sandbox.give(self.id, demand), creating)
        else:
            await creating
        self.document["phases"] |= {
            "attach": round(attached - began, 4),
            "create": round(time.monotonic() - attached, 4),
        }

    async def _asked_for(self, sandbox: Sandbox, request: pb.CreateContainerRequest) -> None:
        answer = await sandbox.agent.create_container(request, timeout=CREATE_TIMEOUT)
        self.stack.push_async_callback(self._remove_in_guest, sandbox)
        self.document["phases"] = {f"guest_{phase}": micros / 1e6 for phase, micros in answer.phases_us.items()}

    def point(self, number: int | str) -> str:
        """Where the node of the container's disk with this number is in the guest."""
        return f"{DEVICES}/{self.short}-{number}"

    async def _forget_in_guest(self, sandbox: Sandbox, points: Sequence[str]) -> None:
        try:
            await sandbox.agent.remove_storages(points)
        except NotFoundError:
            return

    async def before_start(self, sandbox: Sandbox) -> None:
        """What has to be done when a created container is let run."""

    def demand(self) -> Demand:
        resources = self.document.get("resources") or {}
        return Demand(
            cpus=float(resources.get("cpus") or 0),
            memory_mib=-(-int(resources.get("memory") or 0) >> 20),
            host_cpus=frozenset(resources.get("host_cpus") or ()),
        )

    def stdio(self) -> pb.Stdio:
        size = self.document.get("size") or [0, 0]
        return pb.Stdio(
            terminal=self.init.terminal,
            columns=size[0],
            rows=size[1],
            stdin=bool(self.document.get("stdin")),
            stdout=True,
            stderr=not self.init.terminal,
        )

    # ------------------------------------------------------------ giving back

    async def _remove_in_guest(self, sandbox: Sandbox) -> None:
        try:
            await sandbox.agent.remove_container(self.id, force=True)
        except NotFoundError:
            return

    def outlived(self) -> bool:
        """Whether a file system that the machine has mounted for it goes on when the machine has ended."""
        return not self.autoremove

    async def release_in_guest(self, sandbox: Sandbox) -> None:
        """Unmount what outlives the machine (the writable layer), just before the machine is ended."""
        try:
            await self._remove_in_guest(sandbox)
            if self.document.get("in_slot"):
                await self._forget_in_guest(sandbox, [slots.LAYER_POINT])
        except SandboxError as error:
            log.warning("%s: its writable layer was not unmounted: %s", self, error)

    def has_devices(self, sandbox: Sandbox) -> bool:
        """Whether the machine still has a disk that was this container's alone."""
        present = sandbox.vm.devices()
        disks = self.document.get("disks") or {}
        return any(f"disk-{disk[0]}" in present for kind, disk in disks.items() if not is_shared(kind, disk[0]))

    def adopt(self, sandbox: Sandbox) -> None:
        """Rebuild the exit stack of a container that an earlier supervisor made."""
        present = sandbox.vm.devices()
        disks: Mapping[str, list[str]] = self.document.get("disks") or {}
        shared = self.document.get("shares") or {}
        if shared:
            self.stack.push_async_callback(shares.unbind, self.around.paths.shared_dir, shared["names"])
        self.stack.push_async_callback(sandbox.take_back, self.id)
        sandbox.remember_demand(self.id, self.demand())
        for disk_id, address in [disk for kind, disk in disks.items() if is_shared(kind, disk[0])]:
            if f"disk-{disk_id}" in present:
                sandbox.remember_shared_disk(disk_id, address, user=self.id)
                self.stack.push_async_callback(sandbox.unshare_disk, disk_id, user=self.id)
        own = {kind: disk[0] for kind, disk in disks.items() if not is_shared(kind, disk[0])}
        for disk_id in own.values():
            if f"disk-{disk_id}" in present:
                self.stack.push_async_callback(sandbox.detach_disk, disk_id)
        if self.document.get("in_slot"):
            self.stack.push_async_callback(self._forget_in_guest, sandbox, [slots.LAYER_POINT])
        points = [self.point(kind.removeprefix("device-")) for kind in disks if kind.startswith("device-")]
        if points:
            self.stack.push_async_callback(self._forget_in_guest, sandbox, points)
        if shared:
            sandbox.shares.remember(user=self.id)
            self.stack.push_async_callback(sandbox.shares.detach, shared["fs"], user=self.id)
        self.stack.push_async_callback(self._remove_in_guest, sandbox)

    async def release(self) -> None:
        """Give everything in the VM back, in reverse order; every step is attempted, and what failed is logged."""
        if failed := await self.stack.give_back():
            log.warning("%s was not released cleanly: %s", self, "; ".join(map(str, failed)))

    def forget(self) -> None:
        """Remove what is on disk.  The virtual machine has given everything back, or is gone."""
        remains.forget_container(
            self.around.roots,
            self.id,
            name=str(self.document.get("name") or ""),
            image_id=str((self.document.get("image") or {}).get("id") or ""),
        )


def is_shared(kind: str, disk_id: str) -> bool:
    """Whether a disk of a container's document may be plugged for others of its pod as well."""
    return kind == "image" or disk_id.startswith(HOST_DISK)
