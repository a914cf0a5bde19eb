"""The verbs of a pod, free of any one face: the control socket calls them, later CRI and shim will.

A verb checks and changes a container's state without an `await` between, and takes the container's lock where it
lasts longer.  A failed request answers its caller and harms nobody else.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import TYPE_CHECKING, Any

from vmsandbox import records, wire
from vmsandbox.errors import (
    AlreadyExistsError,
    InvalidArgumentError,
    NotFoundError,
    SandboxError,
    TimedOutError,
    UnavailableError,
)
from vmsandbox.oci import signals
from vmsandbox.resources.images.store import ImageStore
from vmsandbox.supervisor import composition, copying, regulation, store, template
from vmsandbox.supervisor.container import Container
from vmsandbox.supervisor.process import LOST_CODE, Exit, Process
from vmsandbox.supervisor.streams import Link, exit_of

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from vmsandbox.supervisor.sandbox import Sandbox, SandboxSpec, Surroundings
    from vmsandbox_protocol import agent_pb2 as pb

log = logging.getLogger(__name__)

#: seconds until SIGKILL must have ended a process, before the container counts as stuck
KILL_TIMEOUT = 30.0
#: seconds an exec may take to start in the guest
EXEC_TIMEOUT = 60.0
#: seconds between a broken event stream and the next try
EVENTS_PAUSE = 0.2
SIGKILL = 9


class Service:
    """What can be done with one pod and its containers."""

    def __init__(self, around: Surroundings, tasks: asyncio.TaskGroup) -> None:
        self.around = around
        self.tasks = tasks
        self.containers: dict[str, Container] = {}
        #: set by the first request (or the document, on adoption): what pod to bring up
        self.wanted: asyncio.Future[SandboxSpec] = asyncio.get_running_loop().create_future()
        self.sandbox: asyncio.Future[Sandbox] = asyncio.get_running_loop().create_future()
        #: requests that may still need the pod
        self._busy = 0
        self.reason: SandboxError | None = None
        self._change = asyncio.Event()
        #: ids whose creation failed, or that were removed: nobody need wait for them
        self._gone: set[str] = set()
        self._background: set[asyncio.Task[None]] = set()

    def _spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> None:
        task = self.tasks.create_task(work, name=name)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _notify(self) -> None:
        """Wake whoever waits for a container or process to become known."""
        self._change.set()
        self._change = asyncio.Event()

    # ------------------------------------------------------------ the pod

    def ready(self, sandbox: Sandbox) -> None:
        self.sandbox.set_result(sandbox)
        self._end_if_idle()

    def lost(self, error: SandboxError) -> None:
        """The pod is gone: every container is stopped with the reason, every waiter hears of it."""
        self.reason = error
        self._notify()
        if not self.sandbox.done():
            self.sandbox.set_exception(error)
            self.sandbox.exception()  # retrieved: a pod that nobody waits for any more is no error
        for container in self.containers.values():
            for process in [*container.execs.values(), container.init]:
                if container.status == "creating" or process.failed:
                    continue
                self.finish(process, Exit(code=LOST_CODE, signal=SIGKILL, time_ns=time.time_ns(), reason=str(error)))

    async def _running_sandbox(self) -> Sandbox:
        return await asyncio.shield(self.sandbox)

    def implicit(self) -> bool:
        """Whether the pod goes with its last container."""
        return not self.wanted.done() or self.wanted.exception() is not None or self.wanted.result().implicit

    def ending(self) -> bool:
        """Whether the pod is on its way out."""
        if self.reason is not None or not self.sandbox.done():
            return self.reason is not None
        return self.sandbox.result().ended.is_set()

    def restore(self, spec: SandboxSpec) -> None:
        """Take the containers of an earlier supervisor over from their documents."""
        self.wanted.set_result(spec)
        directory = self.around.paths.containers_dir
        for entry in sorted(os.listdir(directory)):
            if not entry.endswith(".json"):
                continue
            try:
                document = records.read_document(f"{directory}/{entry}")
                container = Container(self.around, document)
            except (SandboxError, KeyError) as error:
                log.warning("a container cannot be taken over: %s", error)
                continue
            self.containers[container.id] = container
            container.restore_processes()
            if container.status == "creating":
                # Nobody waits for it any more, and nobody knows how far it came.
                container.init.fail()
                continue
            container.init.settled.set()
            for process in (container.init, *container.execs.values()):
                self._watch(process)
            for process in container.execs.values():
                self._spawn(self._retire(container, process), name=f"retire {process}")

    async def take_over(self, sandbox: Sandbox) -> None:
        """Bring the containers' documents and the guest's own view together."""
        known = {row.container_id: row for row in await sandbox.agent.containers()}
        for container in list(self.containers.values()):
            if container.status == "stopped" and container.id not in known:
                continue
            container.adopt(sandbox)
            row = known.get(container.id)
            if container.status == "creating" or row is None:
                await self._remove(container)
                continue
            for state in row.processes:
                process = container.init if not state.exec_id else container.execs.get(state.exec_id)
                if process is None:
                    process = container.add_exec(state.exec_id)
                    process.settled.set()
                    self._spawn(self._retire(container, process), name=f"retire {process}")
                if state.HasField("exit") and not process.has_standin():
                    self.finish(process, exit_of(state.exit))
        self._notify()

    async def wind_down(self, sandbox: Sandbox) -> None:
        """Before the machine goes: containers that stay on the list get their disks unmounted."""
        for container in self.containers.values():
            if container.status != "stopped":
                await self._stop_at_end(sandbox, container)
            if not container.autoremove:
                await container.release_in_guest(sandbox)

    async def _stop_at_end(self, sandbox: Sandbox, container: Container) -> None:
        """The pod was told to end while a container runs: it is killed and says why."""
        try:
            await self._kill_and_wait(sandbox, container)
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
            if container.autoremove or container.status == "creating":
                container.forget()
        paths = self.around.paths
        records.remove_tree(str(paths.vm))
        records.close_shared(paths)
        if not records.forget_sandbox_if_empty(paths) and os.path.exists(paths.document_file):
            document = records.read_document(paths.document_file)
            document.pop("vm", None)
            store.save_sandbox(
                paths, {**document, "status": "stopped", "reason": str(self.reason) if self.reason else ""}
            )

    def _end_if_idle(self) -> None:
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

    # ------------------------------------------------------------ run and create

    async def run(self, request: dict[str, Any], *, start: bool = True) -> dict[str, Any]:
        """Create a container and, with `start`, start it; brings the pod up if this is its first."""
        document = composition.container_document(request)
        container_id = document["id"]
        if container_id in self.containers:
            raise AlreadyExistsError(f"a container with id '{container_id}' already exists in this pod")
        self._busy += 1
        try:
            image = ImageStore(self.around.roots).resolve(str(request["image"]))
            options = composition.run_options(request)
            default = self.around.settings.network.default
            wanted = self.wanted
            spec = wanted.result() if wanted.done() else composition.sandbox_spec(request, options, network=default)
            options = composition.without_pods(options, spec)
            # In a thread, because the sources may lie on a file system that does not answer.
            shared = await asyncio.to_thread(
                composition.share_plan, self.around, spec, options, container_id=container_id
            )
            container = Container(self.around, document, shared)
            composed = composition.compose_spec(
                self.around, image, options, container_id=container_id, rootfs=container.rootfs, shared=shared
            )
            composition.describe(document, image, composed, options)
            if not self.wanted.done():
                self.wanted.set_result(spec)
            self.containers[container_id] = container
            self._notify()
            try:
                store.link_container(self.around.roots, self.around.paths, container_id)
                container.save()
                await container.create(self.sandbox, image, composed, options, start=start)
                self._settle_created(container, start=start)
            except BaseException:
                container.init.fail()
                del self.containers[container_id]
                self._gone.add(container_id)
                self._notify()
                container.forget()
                raise
        except BaseException as error:
            if not self.wanted.done() and isinstance(error, SandboxError):
                self.wanted.set_exception(error)
            raise
        finally:
            self._busy -= 1
            self._end_if_idle()
        return {"id": container_id, "pid": (container.init.standin or {}).get("pid", 0)}

    def _settle_created(self, container: Container, *, start: bool) -> None:
        if start:
            container.document["started"] = time.time()
        container.advance("run" if start else "create")
        self._want_template()
        self._watch(container.init)
        container.init.settled.set()

    def _want_template(self) -> None:
        """A pod that booted cold for want of a template has it made for the next ones, once it runs itself."""
        sandbox = self.sandbox.result()
        mode = sandbox.spec.template or self.around.settings.sandbox.template
        if mode == "auto" and sandbox.template_key and template.missing(self.around, sandbox.template_key):
            template.build_in_background(self.around, self.around.config_file, sandbox.spec.accel)

    def _watch(self, process: Process) -> None:
        self._spawn(process.watch_standin(self._standin_died), name=f"watch stand-in of {process}")

    async def _standin_died(self, process: Process) -> None:
        """Whoever kills the stand-in means the process it stands for."""
        log.info("the stand-in of %s is gone: killing the process", process)
        try:
            sandbox = await self._running_sandbox()
            await sandbox.agent.signal(process.container_id, process.exec_id, SIGKILL, all=not process.exec_id)
        except SandboxError as error:
            log.info("%s could not be killed: %s", process, error)
        self._end_if_idle()

    async def start(self, request: dict[str, Any]) -> dict[str, Any]:
        container = self._container(request)
        async with container.lock:
            container.require("start")
            await (await self._running_sandbox()).agent.start_container(container.id)
            container.document["started"] = time.time()
            container.advance("start")
        return {}

    # ------------------------------------------------------------ processes

    async def exec(self, request: dict[str, Any]) -> dict[str, Any]:
        """Start another process in a running container."""
        container = self._container(request)
        container.require("exec")
        exec_id = composition.identifier(request, "exec")
        if exec_id in container.execs:
            raise AlreadyExistsError(f"an exec with id '{exec_id}' already exists in {container}")
        process = container.add_exec(exec_id, terminal=bool(request.get("tty")), standin=request.get("standin"))
        self._notify()
        try:
            sandbox = await self._running_sandbox()
            await sandbox.agent.exec(composition.exec_request(request, container.document), timeout=EXEC_TIMEOUT)
        except BaseException:
            container.drop_exec(process)
            process.fail()
            self._gone.add(exec_id)
            self._notify()
            raise
        process.settled.set()
        self._watch(process)
        self._spawn(self._retire(container, process), name=f"retire {process}")
        return {"exec": exec_id}

    async def _retire(self, container: Container, process: Process) -> None:
        """Forget an exec once its status and output are where they belong."""
        await process.exited.wait()
        await process.delivered.wait()
        container.drop_exec(process)
        if self.reason is None and container.status != "stopped":
            try:
                await (await self._running_sandbox()).agent.acknowledge(container.id, process.exec_id)
            except SandboxError as error:
                log.info("%s was not acknowledged: %s", process, error)
        self._end_if_idle()

    async def attach(self, hello: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry a stand-in's stdio; it may come before the process exists, and again after a break."""
        process = await self._expected(hello)
        if process is None:
            writer.write(wire.encode_message({"unknown": True}))
            return
        container = self.containers[process.container_id]
        process.standin = hello.get("standin")
        if not process.exec_id:
            log_settings = self.around.settings.container
            directory = f"{self.around.roots.container_data_dir}/{container.id}"
            place = {
                "path": f"{directory}/log",
                "max_bytes": log_settings.log_max_size_mib << 20,
                "files": log_settings.log_max_files,
            }
            writer.write(wire.encode_message({"log": place}))
        agent = (await self._running_sandbox()).agent if process.exit is None else None
        await Link(process, reader, writer, hello, ended=self.finish).serve(agent)
        if process.exit is not None and process.delivered.is_set():
            self._end_if_idle()

    async def _expected(self, hello: dict[str, Any]) -> Process | None:
        """The process a stand-in is for, once it is known; None if it never comes."""
        container_id, exec_id = str(hello.get("container")), str(hello.get("exec") or "")
        async with asyncio.timeout(EXEC_TIMEOUT):
            while True:
                container = self.containers.get(container_id)
                if container is not None and (not exec_id or exec_id in container.execs):
                    process = container.process(exec_id)
                    break
                if self.reason is not None or container_id in self._gone or exec_id in self._gone:
                    return None
                await self._change.wait()
        await process.settled.wait()
        return None if process.failed else process

    def finish(self, process: Process, status: Exit) -> None:
        """A process has ended, as the agent says or because the pod is lost."""
        if not process.finish(status):
            return
        container = self.containers[process.container_id]
        if process is container.init:
            container.ended(status)
        self._end_if_idle()

    async def watch_events(self, sandbox: Sandbox) -> None:
        """Exits whose stand-in is gone, and OOM kills; the agent repeats what was missed in a broken connection."""
        while True:
            try:
                async for event in sandbox.agent.events():
                    await self._event(event)
            except UnavailableError as error:
                # The machine's own end, if that is what it is, is noticed beside this.
                log.info("events of the guest are interrupted: %s", error)
            await asyncio.sleep(EVENTS_PAUSE)

    async def _event(self, event: pb.Event) -> None:
        container = self.containers.get(event.container_id)
        if container is None:
            return
        if event.WhichOneof("what") == "oom":
            if not container.document.get("oom_killed"):  # a guest may tell of any number
                container.document["oom_killed"] = True
                container.save()
        else:
            await self._exit_event(container, event)

    async def _exit_event(self, container: Container, event: pb.Event) -> None:
        """An exit that the agent reports; an attached stand-in hears it behind the last of its output."""
        try:
            process = container.process(event.exec_id)
        except NotFoundError:
            return
        if process.has_standin() and not process.delivered.is_set():
            return
        self.finish(process, exit_of(event.exited))

    # ------------------------------------------------------------ ending

    async def kill(self, request: dict[str, Any]) -> dict[str, Any]:
        container = self._container(request)
        container.require("kill")
        sandbox = await self._running_sandbox()
        await sandbox.agent.signal(
            container.id,
            str(request.get("exec") or ""),
            signals.parse(str(request.get("signal") or "KILL")),
            all=bool(request.get("all")),
        )
        return {}

    async def stop(self, request: dict[str, Any]) -> dict[str, Any]:
        """Signal, wait, SIGKILL; a stopped container is fine."""
        container = self._container(request)
        if container.status == "stopped":
            return {}
        sandbox = await self._running_sandbox()
        if container.status == "created":
            await self._kill_and_wait(sandbox, container)  # nothing of its own runs that could obey
            return {}
        timeout = request.get("timeout")
        grace = float(self.around.settings.sandbox.grace_seconds if timeout is None else timeout)
        await self._signal_quietly(sandbox, container, int(container.document.get("stop_signal") or 15))
        if container.status == "paused":
            await regulation.resume(container, sandbox, request)  # it cannot obey otherwise
        try:
            async with asyncio.timeout(grace):
                await container.init.exited.wait()
        except TimeoutError:
            await self._kill_and_wait(sandbox, container)
        return {}

    async def _signal_quietly(self, sandbox: Sandbox, container: Container, number: int) -> None:
        try:
            await sandbox.agent.signal(container.id, "", number, all=number == SIGKILL)
        except NotFoundError:
            return

    async def _kill_and_wait(self, sandbox: Sandbox, container: Container) -> None:
        if container.status == "paused":
            await sandbox.agent.resume(container.id)
        await self._signal_quietly(sandbox, container, SIGKILL)
        try:
            async with asyncio.timeout(KILL_TIMEOUT):
                await container.init.exited.wait()
        except TimeoutError:
            raise TimedOutError(
                f"{container} did not end within {KILL_TIMEOUT:g} s of SIGKILL: "
                "'vmsandbox pod stop' ends its virtual machine"
            ) from None

    async def delete(self, request: dict[str, Any]) -> dict[str, Any]:
        """Forget a stopped container, or with `force` any."""
        container = self._container(request)
        if container.status != "stopped":
            if not request.get("force"):
                container.require("delete")
            await self._kill_and_wait(await self._running_sandbox(), container)
        async with container.lock:
            container.document["autoremove"] = True
            if self.implicit() or self.reason is not None:
                container.init.delivered.set()
                self._end_if_idle()
            else:
                await self._remove(container)
        return {}

    async def _remove(self, container: Container) -> None:
        await container.release()
        container.forget()
        self.containers.pop(container.id, None)

    async def wait(self, request: dict[str, Any]) -> dict[str, Any]:
        """The exit of a container's init process, when it has ended."""
        container = self._container(request)
        await container.init.exited.wait()
        assert container.init.exit is not None
        return {"exit": container.init.exit.document()}

    async def copy(
        self, request: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> dict[str, Any]:
        """Carry an archive into or out of a container."""
        container = self._container(request)
        return await copying.serve(container, await self._running_sandbox(), request, reader, writer)

    # ------------------------------------------------------------ looking

    async def inspect(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"container": self._container(request).document}

    async def console(self, _request: dict[str, Any]) -> dict[str, Any]:
        """What the guest's kernel and agent printed."""
        return {"console": (await self._running_sandbox()).vm.console()}

    async def ping(self, _request: dict[str, Any]) -> dict[str, Any]:
        """Answers when the pod is up."""
        sandbox = await self._running_sandbox()
        return {"pid": os.getpid(), "vm": sandbox.vm.pid, "phases": sandbox.phases}

    def _container(self, request: dict[str, Any]) -> Container:
        container_id = str(request.get("container"))
        try:
            return self.containers[container_id]
        except KeyError:
            raise NotFoundError(f"no such container in this pod: '{container_id}'") from None

    #: what a request may name; everything else is refused
    VERBS = frozenset(
        {"run", "create", "start", "exec", "kill", "stop", "delete", "wait", "inspect", "console", "ping"}
    )

    async def dispatch(self, request: dict[str, Any]) -> dict[str, Any]:
        """Carry out one request from the control socket."""
        verb = str(request.get("verb"))
        if verb not in self.VERBS and verb not in regulation.VERBS:
            raise InvalidArgumentError(f"unknown request '{verb}'")
        if verb == "create":
            return await self.run(request, start=False)
        if self.reason is not None and verb not in ("inspect", "wait", "delete", "stop"):
            raise UnavailableError(f"the pod is gone: {self.reason}", detail=self.reason.detail)
        if verb in regulation.VERBS:
            return await regulation.VERBS[verb](self._container(request), await self._running_sandbox(), request)
        handler = getattr(self, verb)
        answer: dict[str, Any] = await handler(request)
        return answer
