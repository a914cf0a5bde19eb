"""Containers that come to be: run, create, start, and start again."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import time
from typing import TYPE_CHECKING, Any

from vmsandbox.errors import AlreadyExistsError, InvalidArgumentError, InvalidStateError, SandboxError, UnavailableError
from vmsandbox.resources.images.store import ImageStore
from vmsandbox.supervisor import (
    agreement,
    bundled,
    composition,
    ending,
    execution,
    parents,
    processors,
    slots,
    store,
    template,
)
from vmsandbox.supervisor.imaged import ImageContainer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from vmsandbox.oci.compose import Composed
    from vmsandbox.oci.options import RunOptions
    from vmsandbox.resources.images.document import Image
    from vmsandbox.supervisor.container import Container
    from vmsandbox.supervisor.sandbox import SandboxSpec
    from vmsandbox.supervisor.service import Service

#: of a container's document: what it had in the machine, and how its last life ended
HAD = frozenset({"disks", "devices", "phases", "execs", "shares", "in_slot"})
ENDED = frozenset({"exit", "finished", "oom_killed"})


async def create(service: Service, request: dict[str, Any]) -> dict[str, Any]:
    """Make a container that `start` starts."""
    return await run(service, request, start=False)


async def run(service: Service, request: dict[str, Any], *, start: bool = True) -> dict[str, Any]:
    """Create a container and, with `start`, start it; brings the pod up if this is its first."""
    document = composition.container_document(request)
    container_id = document["id"]
    if container_id in service.containers:
        raise AlreadyExistsError(f"a container with id '{container_id}' already exists in this pod")
    service.require_lasting()
    with service.needed():
        try:
            image = ImageStore(service.around.roots).resolve(str(request["image"]))
            options = composition.run_options(request)
            processors.require_quota(options.cpus, service.around.settings.sandbox)
            spec = _pod_of(service, request, options)
            composition.note_pod(document, spec)
            container, composed, options = await _composed(service, spec, document, image, options)
            if service.spec is None and spec.implicit:
                spec = _with_slots(service, spec, container, image, options)

            async def creating() -> None:
                container.hold(image)  # the machine's slot has its layer there
                service.want(spec)
                in_slot = spec.layer == str(container.layer)
                await service.tidy.wait()
                await container.create(service.sandbox, image, composed, options, start=start, in_slot=in_slot)

            await admit(service, container, creating, verb="run" if start else "create")
        except Exception as error:
            if service.spec is None and not service.wanted.done():
                # Nobody will want this pod: it ends now, and its client does not wait until it has been idle.
                service.wanted.set_exception(error if isinstance(error, SandboxError) else UnavailableError(str(error)))
            raise
    return {"id": container_id, "pid": (container.init.standin or {}).get("pid", 0)}


async def admit(
    service: Service, container: Container, creating: Callable[[], Awaitable[None]], *, verb: str = "create"
) -> None:
    """Know a container from the moment on in which its creation begins; if that fails, forget it."""
    service.containers[container.id] = container
    service.notify()
    try:
        store.link_container(service.around.roots, service.around.paths, container.id)
        container.save()
        await creating()
        _settle(service, container, verb)
    except BaseException:
        container.init.fail()
        container.released.set()
        service.containers.pop(container.id, None)
        service.gone.add(container.id)
        service.notify()
        container.forget()
        raise


def _pod_of(service: Service, request: dict[str, Any], options: RunOptions) -> SandboxSpec:
    """The pod that is there, or the one that the first container's request describes."""
    if service.spec is not None:
        return service.spec
    spec = composition.sandbox_spec(request, options, network=service.around.settings.network.default)
    if not spec.implicit:
        raise InvalidArgumentError(f"no such pod: '{spec.id}'; 'vmsandbox pod create' makes one")
    return spec


def _with_slots(
    service: Service, spec: SandboxSpec, container: ImageContainer, image: Image, options: RunOptions
) -> SandboxSpec:
    """The pod with its first container's disks there from the start, as far as its template has room for them."""
    usual = container.layer_mib == service.around.settings.container.scratch_size_mib
    return dataclasses.replace(
        spec,
        image=str(image.erofs) if slots.holds(image.erofs) else "",
        layer=str(container.layer) if usual and not options.read_only else "",
        layer_mib=container.layer_mib,
    )


async def _composed(
    service: Service, spec: SandboxSpec, document: dict[str, Any], image: Image, options: RunOptions
) -> tuple[ImageContainer, Composed, RunOptions]:
    """What a container is given, and its spec; nothing is done yet."""
    around = service.around
    options = composition.without_pods(options, spec)
    # In a thread, because the sources may lie on a file system that does not answer.
    shared = await asyncio.to_thread(composition.share_plan, around, spec, options, container_id=document["id"])
    container = ImageContainer(around, document, shared)
    composed = composition.compose_spec(
        around, image, options, container_id=container.id, rootfs=container.rootfs, shared=shared, pod=spec
    )
    composition.describe(document, image, composed, options)
    return container, composed, options


def _settle(service: Service, container: Container, verb: str) -> None:
    if verb != "create":
        container.document["started"] = time.time()
        for key in ENDED:
            container.document.pop(key, None)
    container.advance(verb)
    _want_template(service)
    execution.watch(service, container.init)
    container.init.settled.set()
    if container.init.exit is not None:
        container.ended(container.init.exit)
    ending.retire_later(service, container)


def _want_template(service: Service) -> None:
    """A pod that booted cold for want of a template has it made for the next ones, once it runs itself."""
    sandbox = service.sandbox.result()
    around = service.around
    mode = sandbox.spec.template or around.settings.sandbox.template
    if not sandbox.template_key:
        return
    if mode == "auto" and template.missing(around, sandbox.template_key):
        template.build_in_background(around, around.config_file, sandbox.spec.accel, explicit=not sandbox.spec.implicit)
    elif sandbox.vm.config.parent is None and parents.is_wanted(around, sandbox.vm.config, sandbox.vm.accel):
        parents.wish(around.roots, parents.Wish.of(around, sandbox.spec, sandbox.template_key))


async def start(service: Service, request: dict[str, Any]) -> dict[str, Any]:
    """Let a created container run, or a stopped one run again."""
    container = service.container(request)
    if container.status == "stopped":
        try:
            if container.starting or container.document.get("kind") == bundled.KIND:
                state = "being started" if container.starting else "stopped"
                raise InvalidStateError(str(container), state=state, wanted="start")
            return await _start_again(service, container, request)
        except BaseException:
            service.unwanted.add(int((request.get("standin") or {}).get("pid") or 0))
            service.notify()
            raise
    # A program may have ended before its start is answered.
    with service.needed():
        await _start_created(service, container)
    return {}


async def _start_created(service: Service, container: Container) -> None:
    async with container.lock:
        # Who takes a pod over learns only then whether it runs already.
        sandbox = await service.running_sandbox()
        if container.status != "created":
            raise InvalidStateError(str(container), state=container.status, wanted="start")
        await container.before_start(sandbox)
        starting = functools.partial(sandbox.agent.start_container, container.id)
        await agreement.changed(sandbox.agent, container, starting, into="started")
        container.document["started"] = time.time()
        if container.init.exit is None:
            container.advance("start")
        else:
            container.save()


async def _start_again(service: Service, old: Container, request: dict[str, Any]) -> dict[str, Any]:
    """Give a stopped container another life, on its writable layer and with its log.

    Until it runs its document says that it is stopped, so that a death in between costs nothing of it.
    """
    service.require_lasting()
    assert service.spec is not None
    document = {key: value for key, value in old.document.items() if key not in HAD}
    document["standin"] = request.get("standin")
    with service.needed():
        async with old.lock:
            if service.containers.get(old.id) is not old:
                raise InvalidStateError(str(old), state="being started or removed", wanted="start")
            try:
                image = ImageStore(service.around.roots).resolve(str((document.get("image") or {}).get("id")))
                options = composition.run_options(document)
                fresh, composed, options = await _composed(service, service.spec, document, image, options)
                if not service.wanted.done():
                    # Its layer was written to: no template's copy can be in its place.
                    here = str(image.erofs) if service.spec.implicit and slots.holds(image.erofs) else ""
                    service.want(dataclasses.replace(service.spec, image=here, layer=""))
                # The last of its output and its exit first: the new stand-in is for the new life alone.
                await old.init.delivered.wait()
                await old.release()
                await service.tidy.wait()
                fresh.starting = True
                service.containers[old.id] = fresh
                service.notify()
                await fresh.create(service.sandbox, image, composed, options, start=True)
                _settle(service, fresh, "start")
                fresh.starting = False
            except BaseException:
                fallen = service.containers.get(old.id)
                if fallen is not None and fallen is not old:
                    fallen.init.fail()
                    fallen.released.set()
                    service.containers[old.id] = old
                old.released.set()
                old.note()
                raise
    return {}
