"""What a supervisor knows and holds: the pod, its containers, and who still needs them.  Free of any one face.

The verbs themselves are beside it: `creation`, `execution`, `ending`, `regulation` and `podding`.  The control socket
calls them through `dispatch`, later CRI and shim will.
A verb checks and changes a container's state without an `await` between, and takes the container's lock where it
lasts longer.  A failed request answers its caller and harms nobody else.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vmsandbox import documents, lent, remains
from vmsandbox.errors import EndingError, InvalidArgumentError, NotFoundError, SandboxError, UnavailableError
from vmsandbox.supervisor import (
    agreement,
    bundled,
    bundles,
    copying,
    creation,
    ending,
    execution,
    podding,
    regulation,
    store,
)
from vmsandbox.supervisor.process import LOST_CODE, Exit, Process
from vmsandbox.supervisor.streams import exit_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator

    from vmsandbox.supervisor.container import Container
    from vmsandbox.supervisor.sandbox import Sandbox, SandboxSpec, Surroundings

log = logging.getLogger(__name__)

SIGKILL = 9
#: execs that the guest starts at once; others wait, however many there are
STARTING = 8


class Service:
    """What can be done with one pod and its containers."""

    def __init__(self, around: Surroundings, tasks: asyncio.TaskGroup) -> None:
        self.around = around
        self.tasks = tasks
        self.containers: dict[str, Container] = {}
        #: what pod this is, once somebody said so
        self.spec: SandboxSpec | None = None
        #: set by the first request that needs the machine: what pod to bring up
        self.wanted: asyncio.Future[SandboxSpec] = asyncio.get_running_loop().create_future()
        self.sandbox: asyncio.Future[Sandbox] = asyncio.get_running_loop().create_future()
        #: nothing that an earlier machine left on the host is in the way of what is made for the next
        self.tidy = asyncio.Event()
        self.tidy.set()
        self.reason: SandboxError | None = None
        #: the pod is over, and nothing new will come about in it
        self.over = False
        #: nothing of the pod is to stay when it ends
        self.removing = False
        #: requests that may still need the pod
        self._busy = 0
        self._change = asyncio.Event()
        #: ids whose creation failed, or that were removed: nobody need wait for them
        self.gone: set[str] = set()
        #: whoever had an implicit pod made does not want it any more
        self._given_up = asyncio.Event()
        #: execs that are being started in the guest: more at once only make each slower
        self.starting = asyncio.Semaphore(STARTING)
        #: stand-ins whose process never came to be
        self.unwanted: set[int] = set()
        self._background: set[asyncio.Task[None]] = set()
        #: those of an earlier supervisor: what was asked of this one is not to be judged by them
        self._inherited: list[Container] = []

    def spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> None:
        """Do something beside, until the pod ends."""
        task = self.tasks.create_task(work, name=name)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def notify(self) -> None:
        """Wake whoever waits for a container or process to become known."""
        self._change.set()
        self._change = asyncio.Event()

    async def changed(self) -> None:
        """Wait for the next `notify`."""
        await self._change.wait()

    @contextmanager
    def needed(self) -> Iterator[None]:
        """The pod does not end during the block for want of a running container."""
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1
            self.end_if_idle()

    # ------------------------------------------------------------ the pod

    def want(self, spec: SandboxSpec) -> None:
        """Have the pod's machine brought up, if that was not asked before."""
        self.spec = spec
        if not self.wanted.done():
            self.wanted.set_result(spec)

    def ready(self, sandbox: Sandbox) -> None:
        self.sandbox.set_result(sandbox)
        self.end_if_idle()

    def give_up(self) -> None:
        """What a container was to be made for is over: if the machine is only for that, it need not come up."""
        if self.implicit() and not self.sandbox.done():
            self._given_up.set()

    async def given_up(self) -> None:
        """Wait for `give_up`, and raise that as the error that ends the pod."""
        await self._given_up.wait()
        raise UnavailableError("whoever asked for the pod gave it up before its virtual machine was there")

    def lost(self, error: SandboxError) -> None:
        """The pod is gone: every container is stopped with the reason, every waiter hears of it."""
        self.reason = error
        self.tidy.set()
        self.notify()
        if not self.sandbox.done():
            self.sandbox.set_exception(error)
            self.sandbox.exception()  # retrieved: a pod that nobody waits for any more is no error
        self.end_processes(str(error))

    def close(self) -> None:
        """The pod is over: who waits for a process that has not come about waits in vain."""
        self.over = True
        self.notify()

    def end_processes(self, reason: str) -> None:
        """The machine is gone, and all that ran in it."""
        for container in self.containers.values():
            for process in [*container.execs.values(), container.init]:
                if container.status == "creating" or process.failed:
                    continue
                self.finish(process, Exit(code=LOST_CODE, signal=SIGKILL, time_ns=time.time_ns(), reason=reason))

    async def running_sandbox(self) -> Sandbox:
        return await asyncio.shield(self.sandbox)

    def implicit(self) -> bool:
        """Whether the pod goes with its last container."""
        return self.spec is None or self.spec.implicit

    def ending(self) -> bool:
        """Whether the pod is on its way out."""
        if self.reason is not None or not self.sandbox.done():
            return self.reason is not None
        return self.sandbox.result().ended.is_set()

    def require_lasting(self) -> None:
        """Raise `EndingError` if the pod is on its way out: what is to start needs another one."""
        if self.ending():
            raise EndingError("the pod's virtual machine is ending: try again when it has ended")

    def restore(self, spec: SandboxSpec) -> None:
        """Take the containers of an earlier supervisor over from their documents."""
        self.spec = spec
        directory = self.around.paths.containers_dir
        for entry in sorted(os.listdir(directory)):
            if not entry.endswith(".json"):
                continue
            try:
                document = documents.read(f"{directory}/{entry}")
                container = bundled.container_of(self.around, document)
            except (SandboxError, KeyError) as error:
                log.warning("a container cannot be taken over: %s", error)
                continue
            self.containers[container.id] = container
            self._inherited.append(container)
            container.restore_processes()
            if container.status == "creating":
                # Nobody waits for it any more, and nobody knows how far it came.
                container.init.fail()
                continue
            container.init.settled.set()
            for process in (container.init, *container.execs.values()):
                execution.watch(self, process)
            for process in container.execs.values():
                self.spawn(execution.retire(self, container, process), name=f"retire {process}")

    async def take_over(self, sandbox: Sandbox) -> None:
        """Bring the containers' documents and the guest's own view together."""
        known = {row.container_id: row for row in await sandbox.agent.containers()}
        adopted = []
        for container in self._inherited:
            if container.status == "stopped" and container.id not in known and not container.has_devices(sandbox):
                continue
            container.adopt(sandbox)
            adopted.append(container)
        # Only now is it known who else uses what one of them gives back.
        for container in adopted:
            if self.containers.get(container.id) is not container:
                # It was started again or removed meanwhile: what its last life has in the machine is in the way.
                await container.release()
                continue
            row = known.get(container.id)
            if container.status == "creating" or (row is None and container.status != "stopped"):
                await ending.remove(self, container)
                continue
            if row is not None:
                agreement.take(container, row)
            for state in row.processes if row is not None else ():
                process = container.init if not state.exec_id else container.execs.get(state.exec_id)
                if process is None:
                    process = container.add_exec(state.exec_id)
                    process.settled.set()
                    self.spawn(execution.retire(self, container, process), name=f"retire {process}")
                if state.HasField("exit"):
                    self.report(process, exit_of(state.exit))
            ending.retire_later(self, container)
        self.notify()

    async def wind_down(self, sandbox: Sandbox) -> None:
        """Before the machine goes: file systems of containers that are not only its own get unmounted."""
        for container in self.containers.values():
            if container.status != "stopped":
                await self._stop_at_end(sandbox, container)
            if container.outlived():
                await container.release_in_guest(sandbox)

    async def _stop_at_end(self, sandbox: Sandbox, container: Container) -> None:
        """The pod was told to end while a container runs: it is killed and says why."""
        try:
            await ending.kill_and_wait(self, sandbox, container)
        except SandboxError as error:
            log.warning("%s: %s", container, error)

    async def settle(self) -> None:
        """Wait until the last output and every exit is where it belongs."""
        for container in self.containers.values():
            for process in (container.init, *container.execs.values()):
                if process.exit is not None and process.has_standin():
                    await process.delivered.wait()
        for task in self._background:
            task.cancel()

    def clean_up(self) -> None:
        """Leave on disk what stays listed, and nothing else."""
        for container in self.containers.values():
            if container.autoremove or self.removing or container.status == "creating":
                container.forget()
        paths = self.around.paths
        remains.remove_tree(str(paths.vm))
        remains.close_shared(paths)
        for complaint in lent.give_back_all(paths):
            log.warning("%s", complaint)
        if self.removing:
            remains.forget_pod(self.around.roots, paths)
        elif not remains.forget_sandbox_if_empty(paths) and os.path.exists(paths.document_file):
            document = documents.read(paths.document_file)
            document.pop("vm", None)
            document |= {"status": "stopped", "reason": str(self.reason) if self.reason else ""}
            try:
                store.save_sandbox(paths, document)
            except OSError as error:
                log.warning("the pod's document is out of date: %s", error)

    def end_if_idle(self) -> None:
        """An implicit pod ends with its last container."""
        if not self.sandbox.done() or self.sandbox.exception() is not None or self._busy:
            return
        sandbox = self.sandbox.result()
        if not sandbox.spec.implicit:
            return
        for container in self.containers.values():
            if container.status != "stopped" or not container.init.delivered.is_set():
                return
            if any(not process.delivered.is_set() for process in container.execs.values()):
                return
        sandbox.ended.set()

    def report(self, process: Process, status: Exit) -> None:
        """The agent says beside the process' streams that it has ended.

        An attached stand-in hears it behind the last of its output.  Should it die before it has, this
        is how the process ended: the agent does not say it again.
        """
        if process.has_standin() and not process.delivered.is_set():
            process.reported = status
            return
        self.finish(process, status)

    def finish(self, process: Process, status: Exit) -> None:
        """A process has ended, as the agent says or because the pod is lost."""
        if not process.finish(status):
            return
        container = self.containers.get(process.container_id)
        if container is not None and process is container.init:
            container.ended(status)
        self.end_if_idle()

    async def departed(self, container_id: str) -> None:
        """Wait until a container has ended and what it had in the machine is given back."""
        container = self.containers.get(container_id)
        if container is not None:
            await container.released.wait()

    # ------------------------------------------------------------ looking

    async def copy(
        self, request: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> dict[str, Any]:
        """Carry an archive into or out of a container."""
        container = self.container(request)
        return await copying.serve(container, await self.running_sandbox(), request, reader, writer)

    async def wait(self, request: dict[str, Any]) -> dict[str, Any]:
        """The exit of a container's init process, when it has ended."""
        container = self.container(request)
        await container.init.exited.wait()
        assert container.init.exit is not None
        return {"exit": container.init.exit.document()}

    async def inspect(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"container": self.container(request).document}

    async def console(self, _request: dict[str, Any]) -> dict[str, Any]:
        """What the guest's kernel and agent printed; a clone's have printed the rest where it was cloned from."""
        vm = (await self.running_sandbox()).vm
        return {"console": vm.console(), "clone": vm.config.restore is not None}

    async def ping(self, _request: dict[str, Any]) -> dict[str, Any]:
        """Answers when the pod is up."""
        sandbox = await self.running_sandbox()
        return {"pid": os.getpid(), "vm": sandbox.vm.pid, "phases": sandbox.phases}

    def container(self, request: dict[str, Any]) -> Container:
        """The container that a request is about."""
        container_id = str(request.get("container"))
        try:
            return self.containers[container_id]
        except KeyError:
            raise NotFoundError(f"no such container in this pod: '{container_id}'") from None

    async def dispatch(self, request: dict[str, Any]) -> dict[str, Any]:
        """Carry out one request from the control socket."""
        verb = str(request.get("verb"))
        if verb not in VERBS and verb not in regulation.VERBS:
            raise InvalidArgumentError(
                f"unknown request '{verb}': the pod was started by another version of vmsandbox, stop and start it"
            )
        if self.reason is not None and verb in NEW:
            raise EndingError(f"the pod is gone: {self.reason}", detail=self.reason.detail)
        if self.reason is not None and verb not in AFTERWARDS:
            raise UnavailableError(f"the pod is gone: {self.reason}", detail=self.reason.detail)
        if verb in regulation.VERBS:
            return await regulation.VERBS[verb](self.container(request), await self.running_sandbox(), request)
        return await VERBS[verb](self, request)


#: what a request may name, beside the verbs of `regulation`; everything else is refused
VERBS: dict[str, Callable[[Service, dict[str, Any]], Awaitable[dict[str, Any]]]] = {
    "run": creation.run,
    "create": creation.create,
    "start": creation.start,
    "exec": execution.exec_,
    "kill": ending.kill,
    "stop": ending.stop,
    "delete": ending.delete,
    "wait": Service.wait,
    "inspect": Service.inspect,
    "console": Service.console,
    "ping": Service.ping,
    **bundles.VERBS,
    "pod-create": podding.create,
    "pod-start": podding.start,
    "pod-stop": podding.stop,
    "pod-remove": podding.remove,
}
#: what can be asked of a pod that is gone
AFTERWARDS = frozenset({"inspect", "wait", "delete", "stop", "pod-stop", "pod-remove"})
#: what another supervisor can do instead of one whose pod is gone
NEW = frozenset({"run", "create", "start", "pod-start"})
