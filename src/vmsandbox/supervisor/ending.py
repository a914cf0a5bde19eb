"""Containers that end: kill, stop, delete, and giving back what they had."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any

from vmsandbox.errors import InvalidStateError, NotFoundError, SandboxError, TimedOutError, UnavailableError
from vmsandbox.oci import signals
from vmsandbox.supervisor import regulation

if TYPE_CHECKING:
    from vmsandbox.supervisor.container import Container
    from vmsandbox.supervisor.sandbox import Sandbox
    from vmsandbox.supervisor.service import Service

log = logging.getLogger(__name__)

#: seconds until SIGKILL must have ended a process, before the container counts as stuck
KILL_TIMEOUT = 30.0
#: seconds until a container that has ended is released, unless its stand-in is stuck
LET_GO_TIMEOUT = 10.0
SIGKILL = 9


async def settled(service: Service, request: dict[str, Any]) -> Container:
    """The container that a request is about, once it is made or made to run again; what is not there cannot end.

    Raises `NotFoundError` if that fails, which leaves nothing of a new one.
    """
    container = service.container(request)
    while (container.status == "creating" or container.starting) and not container.init.failed:
        await container.init.settled.wait()
        container = service.container(request)
    if container.init.failed:
        # An earlier supervisor died while it made this one, which goes when the machine is taken over, or with it.
        with contextlib.suppress(SandboxError):
            await service.running_sandbox()
        raise NotFoundError(f"{container} was never made: whoever was making it died")
    return container


async def kill(service: Service, request: dict[str, Any]) -> dict[str, Any]:
    """Send a signal to a container's init process, or to all of its processes."""
    container = service.container(request)
    container.require("kill")
    # The machine that answers goes with its last container, which may be this one.
    with service.needed():
        sandbox = await service.running_sandbox()
        await sandbox.agent.signal(
            container.id,
            str(request.get("exec") or ""),
            signals.parse(str(request.get("signal") or "KILL")),
            all=bool(request.get("all")),
        )
    return {}


async def stop(service: Service, request: dict[str, Any]) -> dict[str, Any]:
    """Signal, wait, SIGKILL; a stopped container is fine.  What it had is given back before the answer."""
    container = await settled(service, request)
    await stop_container(service, container, request.get("timeout"))
    try:
        async with asyncio.timeout(LET_GO_TIMEOUT):
            await container.init.delivered.wait()
            if not service.implicit():
                await container.released.wait()
    except TimeoutError:
        pass  # somebody does not take its output; the rest follows when they do
    service.end_if_idle()
    return {}


async def stop_container(service: Service, container: Container, timeout: object) -> None:
    """End a container in order; `timeout` seconds (None: the configured ones; -1: for ever) before SIGKILL."""
    if container.status == "stopped":
        return
    sandbox = await _machine_of(service, container)
    if sandbox is None:
        return
    if container.status == "created":
        await kill_and_wait(service, sandbox, container)  # nothing of its own runs that could obey
        return
    given = timeout if isinstance(timeout, int | float) else None
    grace = float(service.around.settings.sandbox.grace_seconds if given is None else given)
    deadline = None if grace == -1 else max(0.0, grace)
    await _signal_quietly(sandbox, container, int(container.document.get("stop_signal") or 15))
    if container.status == "paused":
        await regulation.resume(container, sandbox, {})  # it cannot obey otherwise
    try:
        async with asyncio.timeout(deadline):
            await container.init.exited.wait()
    except TimeoutError:
        await kill_and_wait(service, sandbox, container)


async def _machine_of(service: Service, container: Container) -> Sandbox | None:
    """The machine in which a container has to be ended; None if it is lost, and the container has ended with it."""
    try:
        return await service.running_sandbox()
    except SandboxError:
        if container.status != "stopped":
            raise
        return None


async def _signal_quietly(sandbox: Sandbox, container: Container, number: int) -> None:
    try:
        await sandbox.agent.signal(container.id, "", number, all=number == SIGKILL)
    except (NotFoundError, InvalidStateError):
        return  # it has ended by itself
    except UnavailableError as error:
        # Its machine is ending, most likely, and it with that: who waits for it hears so, or that the time is up.
        log.info("%s: the signal %d was not sent: %s", container, number, error)


async def kill_and_wait(service: Service, sandbox: Sandbox, container: Container) -> None:
    """SIGKILL to all of a container; `TimedOutError` if that does not end it."""
    if container.status == "paused":
        await sandbox.agent.resume(container.id)
    await _signal_quietly(sandbox, container, SIGKILL)
    try:
        async with asyncio.timeout(KILL_TIMEOUT):
            await container.init.exited.wait()
    except TimeoutError:
        last = f"'kill {sandbox.vm.pid}'" if service.implicit() else "'vmsandbox pod rm -f'"
        raise TimedOutError(
            f"{container} did not end within {KILL_TIMEOUT:g} s of SIGKILL: {last} ends its virtual machine"
        ) from None


async def delete(service: Service, request: dict[str, Any]) -> dict[str, Any]:
    """Forget a stopped container, or with `force` any."""
    service.container(request)
    try:
        container = await settled(service, request)
    except NotFoundError:
        if request.get("force"):
            return {}  # it went by itself meanwhile
        raise
    if container.status != "stopped":
        if not request.get("force"):
            container.require("delete")
        sandbox = await _machine_of(service, container)
        if sandbox is not None:
            await kill_and_wait(service, sandbox, container)
    if service.wanted.done():
        # While the machine is being taken over it is not known yet what the container has in it.
        with contextlib.suppress(SandboxError):
            await service.running_sandbox()
    async with container.lock:
        container.document["autoremove"] = True
        if service.implicit() or service.reason is not None or not service.sandbox.done():
            container.init.delivered.set()
            service.end_if_idle()
        if not service.ending() and service.sandbox.done():
            await remove(service, container)
    return {}


async def remove(service: Service, container: Container) -> None:
    """Give back what a container has, and forget it."""
    await container.release()
    container.forget()
    container.released.set()
    service.containers.pop(container.id, None)


def retire_later(service: Service, container: Container) -> None:
    """In a pod that goes on without it, a container that has ended gives back what it had."""
    if not service.implicit():
        service.spawn(_retire(service, container), name=f"retire {container}")


async def _retire(service: Service, container: Container) -> None:
    await container.init.exited.wait()
    for process in (container.init, *list(container.execs.values())):
        await process.delivered.wait()
    async with container.lock:
        if service.containers.get(container.id) is not container or service.ending():
            return
        if container.autoremove:
            await remove(service, container)
            return
        await container.release()
        container.document.pop("disks", None)
        container.note()
        container.released.set()
