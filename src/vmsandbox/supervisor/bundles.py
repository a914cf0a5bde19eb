"""Containers that an engine describes by an OCI bundle, instead of a user by an image and options.

The root file system and every bind mount are directories and files of the host, so they all go through the pod's
shared directory.  The engine keeps the container's output and writable layer, so here is neither a log nor a disk.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from typing import TYPE_CHECKING, Any

from vmsandbox import lent
from vmsandbox.errors import (
    AlreadyExistsError,
    InvalidArgumentError,
    InvalidBundleError,
    SandboxError,
    UnavailableError,
    UnsupportedError,
)
from vmsandbox.oci import capabilities, limits, nodes, translate
from vmsandbox.oci.annotations import Role, role
from vmsandbox.oci.texts import Volume
from vmsandbox.resources import disks, share
from vmsandbox.resources.network.options import NetworkOptions
from vmsandbox.supervisor import bundled, creation, labels, shares
from vmsandbox.supervisor.regulation import wider
from vmsandbox.supervisor.sandbox import Demand, SandboxSpec

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from vmsandbox.oci.bundle import Bundle
    from vmsandbox.oci.translate import Translated
    from vmsandbox.supervisor.sandbox import Surroundings
    from vmsandbox.supervisor.service import Service

log = logging.getLogger(__name__)

MIB = 1 << 20


async def create(service: Service, request: dict[str, Any]) -> dict[str, Any]:
    """Create the container of a bundle; the first one of a pod brings the pod up.

    The request names ``id``, ``bundle``, ``pod`` (the pod's id), ``netns``, ``standin``, ``cgroups``, ``cgroups_above``
    and ``size``.
    """
    container_id = str(request.get("id"))
    if container_id in service.containers:
        raise AlreadyExistsError(f"a container with id '{container_id}' already exists in this pod")
    service.require_lasting()
    around = service.around
    with service.needed():
        try:
            # In a thread: the bundle may lie on a file system that does not answer.
            bundle = await asyncio.to_thread(_loaded, str(request.get("bundle")))
            labels.require_known(bundle.spec.process, bundle.spec.linux.mount_label)
            place = role(bundle.spec.annotations, container_id=container_id)
            root = await asyncio.to_thread(_block_root, around, bundle)
            parts = await asyncio.to_thread(_translated, around, bundle, place, root)
            spec = service.spec or pod_spec(request, bundle, parts)
            _check_sysctls(parts, spec)
            if place.kind == "container":
                await asyncio.to_thread(_check_network, str(request.get("netns")), spec)
            document = _document(request, bundle, place, parts)
            shared_fs = around.settings.sandbox.shared_fs
            _share_plan(parts, container_id, shared_fs, with_root=root is None)
            taken = await bundled.taken(around, container_id, root, needed=shared_fs == shares.NONE)
            plan = _share_plan(parts, container_id, shared_fs, with_root=taken is None)
            service.want(spec)
        except BaseException as error:
            if service.spec is None and not service.wanted.done():
                known = isinstance(error, SandboxError)
                service.wanted.set_exception(error if known else UnavailableError(f"no pod was described: {error!r}"))
            raise
        container = bundled.BundleContainer(around, document, plan, root=taken)
        try:
            await creation.admit(service, container, lambda: container.create_bundle(service.sandbox, parts))
        except BaseException:
            await container.release()
            raise
    asked = bundle.document.get("process")
    return {
        "id": container_id,
        "warnings": [*capabilities.complaints(parts.document["process"]), *labels.complaints(asked, spec)],
    }


def pod_spec(request: dict[str, Any], bundle: Bundle, parts: Translated) -> SandboxSpec:
    """The pod that a first container brings up."""
    netns = request.get("netns")
    if not isinstance(netns, str) or not netns.startswith("/"):
        raise InvalidArgumentError("the request names no network namespace")
    process = bundle.spec.process
    return SandboxSpec(
        id=str(request.get("pod")),
        hostname=bundle.spec.hostname or os.uname().nodename,
        # Directories come with every container.
        shareable=True,
        network=NetworkOptions(kind="namespace", path=netns).document(),
        sysctls=parts.sysctls,
        cgroups=tuple(request.get("cgroups") or ()),
        apparmor=labels.profile(process.apparmor_profile) if process else "",
        selinux=process.selinux_label if process else "",
    )


def _check_sysctls(parts: Translated, spec: SandboxSpec) -> None:
    for name, value in parts.sysctls.items():
        if spec.sysctls.get(name) != value:
            raise UnsupportedError(
                f"'linux.sysctl' sets '{name}', which is the pod's: its first container has to set it"
            )


def _check_network(path: str, spec: SandboxSpec) -> None:
    """Refuse a member another network than that of its pod, which it would have all the same.  Blocks."""
    pods = str(spec.network.get("path") or "")
    if path == pods:
        return
    try:
        theirs = os.stat(pods)
    except OSError:
        return  # it has no name any more
    try:
        asked = os.stat(path)
    except OSError as error:
        raise InvalidBundleError(f"cannot use the network namespace '{path}': {error.strerror}") from error
    if not os.path.samestat(asked, theirs):
        raise UnsupportedError(
            f"'linux.namespaces' joins the network namespace '{path}', which is not the pod's: a pod has one network "
            "for all"
        )


def _block_root(around: Surroundings, bundle: Bundle) -> dict[str, Any] | None:
    """The disk that the bundle's root is on, if it is to be plugged.  Blocks."""
    if around.settings.sandbox.disable_block_device_use:
        return None
    root = lent.find(str(bundle.rootfs))
    if root is not None:
        root["read_only"] = root["read_only"] or "ro" in root["options"]
    return root


def _translated(around: Surroundings, bundle: Bundle, place: Role, root: dict[str, Any] | None) -> Translated:
    """The guest's side of the bundle, its disks checked.  Blocks."""
    cache = around.roots.run / "cache"
    numbers = (root["numbers"][0], root["numbers"][1]) if root else None
    parts = translate.translated(bundle, kind=place.kind, cache=cache, root=numbers)
    for path in parts.left_out:
        log.info("'%s' is a device of the host, and this privileged container gets the machine's instead", path)
    for disk in parts.disks:
        disks.find(disk.numbers, member=disk.member, read_only=disk.read_only)
    return parts


def _share_plan(parts: Translated, container_id: str, shared_fs: str, *, with_root: bool) -> shares.Plan:
    """What has to be shared: the bind mounts, and before them the root unless it is plugged."""
    sources = parts.sources if with_root else parts.sources[1:]
    if sources and shared_fs == shares.NONE:
        raise UnsupportedError(
            f"cannot share '{sources[0].path}': 'sandbox.shared_fs' is 'none', and this container needs 'virtio-fs' or "
            "'9p'"
        )
    return shares.Plan(
        shared_fs=shared_fs,
        container_id=container_id,
        volumes=tuple(
            Volume(source=source.path, destination=source.destination, read_only=source.read_only) for source in sources
        ),
        names=tuple(share.name_for(container_id, source.path) for source in sources),
    )


def _document(request: dict[str, Any], bundle: Bundle, place: Role, parts: Translated) -> dict[str, Any]:
    """The first state of the container's document: what `state` and `list` tell, and what later verbs need."""
    process = parts.document["process"]
    limited = (bundle.document.get("linux") or {}).get("resources") or {}
    bundled.require_mems(limited)
    return {
        "id": str(request.get("id")),
        "name": "",
        "kind": bundled.KIND,
        "sandbox": str(request.get("pod")),
        "role": place.kind,
        "status": "creating",
        "created": time.time(),
        "terminal": bool(process.get("terminal")),
        "stdin": True,
        "size": request.get("size"),
        "standin": request.get("standin"),
        "oci_version": bundle.spec.oci_version,
        "bundle": str(bundle.directory),
        "rootfs": str(bundle.rootfs),
        "root_readonly": bundle.spec.root.readonly,
        "annotations": dict(bundle.spec.annotations),
        "hooks": {
            name: bundle.document["hooks"].get(name) or []
            for name in ("poststart", "poststop")
            if bundle.document.get("hooks")
        },
        "cgroups": request.get("cgroups") or [],
        "cgroups_above": request.get("cgroups_above") or [],
        "process": process,
        "args": process["args"],
        "resources": {
            **bundled.demand_of(parts.document["linux"].get("resources") or {}),
            "host_cpus": bundled.host_cpus(limited),
        },
    }


def _loaded(directory: str) -> Bundle:
    # Late, because pods that no engine makes have nothing for pydantic to check.
    from vmsandbox.oci import bundle

    return bundle.load(directory)


async def update(service: Service, request: dict[str, Any]) -> dict[str, Any]:
    """Change limits by an OCI LinuxResources document; what it leaves out or sets to 0 stays."""
    container = service.container(request)
    text = json.dumps(request.get("resources")).encode()
    from vmsandbox.oci.document import checked
    from vmsandbox.oci.linux import Resources

    checked(Resources, text, name="resources")
    given = json.loads(text)
    resources, host_cpus = limits.guest_resources(given), bundled.host_cpus(given)
    bundled.require_mems(given)
    if isinstance(container, bundled.BundleContainer):
        resources = nodes.placed(resources, container.plugged())
    asked = bundled.demand_of(resources)
    sandbox = await service.running_sandbox()
    async with container.lock:
        container.require("update")
        if not resources and not host_cpus:
            return {}
        before = container.demand()
        quota_said = "quota" in (resources.get("cpu") or {})
        limit_said = "limit" in (resources.get("memory") or {})
        after = Demand(
            cpus=asked["cpus"] if quota_said else before.cpus,
            memory_mib=-(-asked["memory"] // MIB) if limit_said else before.memory_mib,
            host_cpus=frozenset(host_cpus) or before.host_cpus,
        )
        await sandbox.give(container.id, wider(before, after, service.around.settings.sandbox))
        try:
            if resources:
                await sandbox.agent.update_container(container.id, json.dumps(resources).encode())
        except BaseException:
            await sandbox.give(container.id, before)
            raise
        known = container.document.setdefault("resources", {})
        known["host_cpus"] = sorted(after.host_cpus)
        known["cpus"] = after.cpus
        known["memory"] = asked["memory"] if limit_said else known.get("memory") or 0
        container.save()
        await sandbox.give(container.id, after)
    return {}


#: requests of engines
VERBS: dict[str, Callable[[Service, dict[str, Any]], Awaitable[dict[str, Any]]]] = {
    "create-bundle": create,
    "update-resources": update,
}
