"""Processes in running containers: execs, the stand-ins that carry their stdio, and the guest's events."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from vmsandbox import wire
from vmsandbox.errors import AlreadyExistsError, NotFoundError, SandboxError, UnavailableError
from vmsandbox.oci import capabilities
from vmsandbox.supervisor import bundled, composition, labels
from vmsandbox.supervisor.streams import Link, exit_of

if TYPE_CHECKING:
    from vmsandbox.supervisor.container import Container
    from vmsandbox.supervisor.process import Process
    from vmsandbox.supervisor.sandbox import Sandbox
    from vmsandbox.supervisor.service import Service
    from vmsandbox_protocol import agent_pb2 as pb

log = logging.getLogger(__name__)

#: seconds an exec may take to start in the guest
EXEC_TIMEOUT = 60.0
#: seconds between a broken event stream and the next try
EVENTS_PAUSE = 0.2
SIGKILL = 9


async def exec_(service: Service, request: dict[str, Any]) -> dict[str, Any]:
    """Start another process in a running container."""
    container = service.container(request)
    # The agent lets a paused container go on for as long as it takes to add the process.
    if container.status != "paused" or request.get("ignore_paused") is not True:
        container.require("exec")
    exec_id = composition.identifier(request, "exec")
    if exec_id in container.execs:
        raise AlreadyExistsError(f"an exec with id '{exec_id}' already exists in {container}")
    process = container.add_exec(exec_id, terminal=bool(request.get("tty")), standin=request.get("standin"))
    service.notify()
    try:
        sandbox = await service.running_sandbox()
        asked = composition.exec_request(request, container.document)
        async with service.starting:
            await sandbox.agent.exec(asked, timeout=EXEC_TIMEOUT)
    except BaseException:
        container.drop_exec(process)
        process.fail()
        service.gone.add(exec_id)
        service.notify()
        raise
    process.settled.set()
    watch(service, process)
    service.spawn(retire(service, container, process), name=f"retire {process}")
    described = request.get("process")
    return {
        "exec": exec_id,
        "warnings": [*capabilities.complaints(described), *labels.complaints(described, sandbox.spec)],
    }


async def retire(service: Service, container: Container, process: Process) -> None:
    """Forget an exec once its status and output are where they belong."""
    await process.exited.wait()
    await process.delivered.wait()
    container.drop_exec(process)
    if service.reason is None and container.status != "stopped":
        try:
            await (await service.running_sandbox()).agent.acknowledge(container.id, process.exec_id)
        except SandboxError as error:
            log.info("%s was not acknowledged: %s", process, error)
    service.end_if_idle()


# ---------------------------------------------------------------- stand-ins


def watch(service: Service, process: Process) -> None:
    """Have the process killed if its stand-in is."""

    async def died(process: Process) -> None:
        await _standin_died(service, process)

    service.spawn(process.watch_standin(died), name=f"watch stand-in of {process}")


async def _standin_died(service: Service, process: Process) -> None:
    """Whoever kills the stand-in means the process it stands for; one that has ended has nobody left to hear of it."""
    if process.reported is not None:
        service.finish(process, process.reported)
        return
    log.info("the stand-in of %s is gone: killing the process", process)
    try:
        sandbox = await service.running_sandbox()
        await sandbox.agent.signal(process.container_id, process.exec_id, SIGKILL, all=not process.exec_id)
    except SandboxError as error:
        log.info("%s could not be killed: %s", process, error)
    service.end_if_idle()


async def attach(
    service: Service, hello: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Carry a stand-in's stdio; it may come before the process exists, and again after a break."""
    process = await _expected(service, hello)
    if process is None:
        writer.write(wire.encode_message({"unknown": True}))
        return
    container = service.containers[process.container_id]
    process.standin = hello.get("standin")
    if not process.exec_id and container.document.get("kind") != bundled.KIND:
        log_settings = service.around.settings.container
        directory = f"{service.around.roots.container_data_dir}/{container.id}"
        place = {
            "path": f"{directory}/log",
            "max_bytes": log_settings.log_max_size_mib << 20,
            "files": log_settings.log_max_files,
        }
        writer.write(wire.encode_message({"log": place}))
    agent = (await service.running_sandbox()).agent if process.exit is None else None
    await Link(process, reader, writer, hello, ended=service.finish).serve(agent)
    if process.exit is not None and process.delivered.is_set():
        service.end_if_idle()


async def _expected(service: Service, hello: dict[str, Any]) -> Process | None:
    """The process a stand-in is for, once it is known; None if it never comes."""
    container_id, exec_id = str(hello.get("container")), str(hello.get("exec") or "")
    standin = int((hello.get("standin") or {}).get("pid") or 0)
    try:
        async with asyncio.timeout(EXEC_TIMEOUT):
            while True:
                container = service.containers.get(container_id)
                if container is not None and (not exec_id or exec_id in container.execs):
                    process = container.process(exec_id)
                    # One that has ended has had its stand-in: this one waits for the container's next life.
                    if process.exit is None or (process.standin or {}).get("pid") in (None, standin):
                        break
                given_up = container_id in service.gone or exec_id in service.gone or standin in service.unwanted
                if service.over or service.reason is not None or given_up:
                    return None
                await service.changed()
    except TimeoutError:
        return None  # its client was killed before it asked for anything
    await process.settled.wait()
    return None if process.failed else process


# ---------------------------------------------------------------- what the guest tells


async def watch_events(service: Service, sandbox: Sandbox) -> None:
    """Exits whose stand-in is gone, and OOM kills; the agent repeats what was missed in a broken connection."""
    while True:
        try:
            async for event in sandbox.agent.events():
                _event(service, event)
        except UnavailableError as error:
            # The machine's own end, if that is what it is, is noticed beside this.
            log.info("events of the guest are interrupted: %s", error)
        await asyncio.sleep(EVENTS_PAUSE)


def _event(service: Service, event: pb.Event) -> None:
    container = service.containers.get(event.container_id)
    if container is None:
        return
    if event.WhichOneof("what") == "oom":
        container.oom_kills_are(event.oom.count)
    else:
        _exit_event(service, container, event)


def _exit_event(service: Service, container: Container, event: pb.Event) -> None:
    """An exit that the agent reports, of a process that is still known."""
    try:
        process = container.process(event.exec_id)
    except NotFoundError:
        return
    service.report(process, exit_of(event.exited))
