"""Pods as such: one that is made on purpose stays, with or without containers, until it is stopped or removed."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from typing import TYPE_CHECKING, Any

from vmsandbox import records
from vmsandbox.errors import AlreadyExistsError, InvalidArgumentError, SandboxError
from vmsandbox.supervisor import composition, ending, store

if TYPE_CHECKING:
    from vmsandbox.supervisor.sandbox import Sandbox
    from vmsandbox.supervisor.service import Service

log = logging.getLogger(__name__)


async def create(service: Service, request: dict[str, Any]) -> dict[str, Any]:
    """Bring a pod up that has no container yet; answers when its machine runs."""
    if service.spec is not None:
        raise AlreadyExistsError(f"this pod exists already: '{service.spec.id}'")
    try:
        spec = composition.pod_spec(request, network=service.around.settings.network.default)
    except SandboxError as error:
        service.wanted.set_exception(error)
        raise
    service.removing = True  # until it is there, a failure leaves nothing
    store.link_pod(service.around.roots, service.around.paths, spec.id)
    service.want(spec)
    sandbox = await service.running_sandbox()
    service.removing = False
    sandbox.spec = service.spec = dataclasses.replace(spec, established=True)
    sandbox.save("ready")
    return {"id": spec.id}


async def start(service: Service, _request: dict[str, Any]) -> dict[str, Any]:
    """Bring the machine of a stopped pod up again; its containers are started one by one."""
    service.require_lasting()
    assert service.spec is not None
    with service.needed():
        service.want(service.spec)
        await service.running_sandbox()
    return {"id": service.spec.id}


async def stop(service: Service, request: dict[str, Any]) -> dict[str, Any]:
    """Stop every container in order, then the machine; the pod stays on the list."""
    if service.reason is None and service.wanted.done():
        sandbox = await _machine_of(service)
        if sandbox is not None:
            await _stop_all(service, request.get("timeout"))
            sandbox.ended.set()
    return {}


async def _machine_of(service: Service) -> Sandbox | None:
    """The pod's machine; None if it turns out to be lost, and all that ran in it has ended."""
    try:
        return await service.running_sandbox()
    except SandboxError:
        if service.reason is None:
            raise
        return None


async def _stop_all(service: Service, timeout: object) -> None:
    running = [each for each in service.containers.values() if each.status not in ("creating", "stopped")]
    results = await asyncio.gather(
        *(ending.stop_container(service, container, timeout) for container in running), return_exceptions=True
    )
    for container, result in zip(running, results, strict=True):
        if isinstance(result, SandboxError):
            log.warning("%s was not stopped in order: %s", container, result)
        elif isinstance(result, BaseException):
            raise result


async def remove(service: Service, request: dict[str, Any]) -> dict[str, Any]:
    """End a pod and forget it with its containers; refuses while one runs, unless `force` says so."""
    if service.spec is None or service.spec.implicit:
        raise InvalidArgumentError("this pod belongs to its container: 'vmsandbox rm' removes both")
    alive = [each for each in service.containers.values() if each.status != "stopped"]
    if alive and not request.get("force"):
        raise records.pod_in_use(service.spec.name or service.spec.id, [container.document for container in alive])
    service.removing = True
    for container in service.containers.values():
        container.document["autoremove"] = True
    if service.reason is None and service.wanted.done():
        sandbox = await _machine_of(service)
        service.removing = True  # again: whoever had the pod made may have thought it was there to stay
        if sandbox is not None:
            sandbox.ended.set()  # which kills what still runs
    return {}
