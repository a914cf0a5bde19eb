"""From a client's request to what the pod's parts need: pod, document, spec, exec.

Requests are untrusted in form though not in intent: whatever is missing or of another type is an
InvalidArgumentError that names it.
"""

from __future__ import annotations

import dataclasses
import json
import string
import time
from typing import TYPE_CHECKING, Any

from vmsandbox.errors import InvalidArgumentError
from vmsandbox.oci import compose, options
from vmsandbox.resources import disks
from vmsandbox.resources.network.options import requested
from vmsandbox.supervisor import bundled, shares
from vmsandbox.supervisor.sandbox import SandboxSpec
from vmsandbox_protocol import agent_pb2 as pb

if TYPE_CHECKING:
    from vmsandbox.oci.compose import Composed
    from vmsandbox.oci.options import RunOptions
    from vmsandbox.resources.images.document import Image
    from vmsandbox.supervisor.sandbox import Surroundings

ID_CHARACTERS = frozenset(string.ascii_letters + string.digits + "_.-")
MAX_ID = 128
#: namespaces that containers of a pod share unless asked otherwise; the network they always do
DEFAULT_SHARE = ("ipc", "uts")
SHAREABLE = ("ipc", "net", "pid", "uts")
HOSTNAME_CHARACTERS = frozenset(string.ascii_letters + string.digits + "-")


def identifier(request: dict[str, Any], key: str) -> str:
    """An id that is safe as a file name."""
    value = request.get(key)
    if not isinstance(value, str) or not 0 < len(value) <= MAX_ID or not set(value) <= ID_CHARACTERS:
        raise InvalidArgumentError(f"'{key}' is not a valid id: '{str(value)[:MAX_ID]}'")
    if not value[0].isalnum():
        raise InvalidArgumentError(f"'{key}' has to start with a letter or digit: '{value}'")
    return value


def sandbox_spec(request: dict[str, Any], chosen: RunOptions | None = None, *, network: str = "default") -> SandboxSpec:
    """The pod that a container's request brings up; `chosen` are the options of that container.

    `network` is what the pod gets that names none.
    """
    pod = request.get("sandbox")
    if not isinstance(pod, dict):
        raise InvalidArgumentError("the request names no pod")
    implicit = bool(pod.get("implicit", True))
    shared_fs = pod.get("shared_fs") or None
    if shared_fs not in (None, shares.VIRTIO_FS, shares.NINEP, shares.NONE):
        raise InvalidArgumentError(f"shared_fs '{shared_fs}' is unknown: choose 'virtio-fs', '9p' or 'none'")
    return SandboxSpec(
        id=identifier(pod, "id"),
        name=str(pod.get("name") or ""),
        implicit=implicit,
        hostname=str(pod.get("hostname") or identifier(pod, "id")[:12]),
        accel=pod.get("accel") or None,
        # Nobody knows yet what the later containers of an explicit pod will share.
        shareable=not implicit or bool(chosen and chosen.volumes),
        shared_fs=shared_fs,
        template=str(pod.get("template") or ""),
        network=requested(pod.get("network") or {}, default=network).document(),
        aliases=(str(request["name"]),) if implicit and request.get("name") else (),
        sysctls={name: value for name, value in (chosen.sysctls if chosen else {}).items() if is_of_pod(name)},
    )


def pod_spec(request: dict[str, Any], *, network: str) -> SandboxSpec:
    """The pod that `pod create` asks for, without a container to begin with."""
    given = dict(request.get("sandbox") or {})
    name, share = str(given.get("name") or ""), given.get("share")
    pod_id = identifier(given, "id")
    limits = options.run_options(
        {key: given[key] for key in ("sysctls", "shm_size", "hostname") if given.get(key) is not None}
    )
    foreign = sorted(sysctl for sysctl in limits.sysctls if not is_of_pod(sysctl))
    if foreign:
        raise InvalidArgumentError(f"sysctl '{foreign[0]}' is no network's: give it to the container")
    made = sandbox_spec(
        {"sandbox": {**given, "implicit": False, "hostname": limits.hostname or _hostname(name) or pod_id[:12]}},
        limits,
        network=network,
    )
    shared = DEFAULT_SHARE if share is None else _shared(share)
    return dataclasses.replace(made, share=shared, shm_bytes=limits.shm_bytes or 0, aliases=(name,) if name else ())


def _shared(given: object) -> tuple[str, ...]:
    if not isinstance(given, list | tuple) or not all(isinstance(each, str) for each in given):
        raise InvalidArgumentError("option 'share' has to be a list of texts")
    for kind in given:
        if kind not in SHAREABLE:
            raise InvalidArgumentError(f"namespace '{kind}' cannot be shared: choose 'ipc', 'pid', 'uts' or 'none'")
    return tuple(sorted(set(given) - {"net"}))


def _hostname(name: str) -> str:
    """A pod's name where it can be a host's."""
    return name if len(name) <= 63 and set(name) <= HOSTNAME_CHARACTERS else ""


def note_pod(document: dict[str, Any], spec: SandboxSpec) -> None:
    """Note in a container's document which pod it belongs to, if that is more than its own machine."""
    document["sandbox"] = spec.id
    if not spec.implicit:
        document["pod_name"] = spec.name or spec.id[:12]


def is_of_pod(sysctl: str) -> bool:
    """Whether a setting is the network's, which belongs to the pod and not to one container."""
    return sysctl.replace("/", ".").startswith("net.")


def share_plan(around: Surroundings, spec: SandboxSpec, chosen: RunOptions, *, container_id: str) -> shares.Plan:
    """What a container of the pod `spec` shares with the host, its disks checked.  Blocks: it looks at the sources."""
    for disk in chosen.disks:
        disks.check(disk.source, read_only=disk.read_only)
    return shares.planned(container_id, chosen.volumes, spec.shared_fs or around.settings.sandbox.shared_fs)


def container_document(request: dict[str, Any]) -> dict[str, Any]:
    """The first state of a container's document."""
    given = request.get("options")
    if not isinstance(given, dict):
        raise InvalidArgumentError("the request has no options")
    return {
        "id": identifier(request, "id"),
        "name": str(request.get("name") or ""),
        "sandbox": str((request.get("sandbox") or {}).get("id") or ""),
        "status": "creating",
        "created": time.time(),
        "autoremove": bool(request.get("autoremove")),
        "terminal": bool(given.get("tty")),
        "stdin": bool(request.get("stdin")),
        "size": request.get("size"),
        "standin": request.get("standin"),
        "options": given,
        "cwd": str(request.get("cwd") or "/"),
        "image_name": str(request.get("image") or ""),
        "scratch_mib": request.get("scratch_mib"),
    }


def run_options(request: dict[str, Any]) -> RunOptions:
    """The checked options of a request, relative paths taken from the client's directory."""
    return options.run_options(request["options"], cwd=str(request.get("cwd") or "/"))


def without_pods(chosen: RunOptions, spec: SandboxSpec) -> RunOptions:
    """The options of a container without what its pod was given of them."""
    own = {name: value for name, value in chosen.sysctls.items() if name not in spec.sysctls}
    if "ipc" in spec.share and chosen.shm_bytes is not None:
        raise InvalidArgumentError("the containers of this pod share /dev/shm: give '--shm-size' to 'pod create'")
    return dataclasses.replace(chosen, sysctls=own)


def compose_spec(
    around: Surroundings,
    image: Image,
    chosen: RunOptions,
    *,
    container_id: str,
    rootfs: str,
    shared: shares.Plan,
    pod: SandboxSpec,
) -> Composed:
    """The container's OCI spec for use inside the guest."""
    container = around.settings.container
    defaults = compose.Defaults(
        shm_bytes=container.shm_size_mib << 20,
        pids_limit=container.pids_limit,
        no_new_privileges=container.no_new_privileges,
        seccomp=container.seccomp,
    )
    return compose.compose(
        image.config,
        chosen,
        rootfs=rootfs,
        container_id=container_id,
        defaults=defaults,
        volume_sources=shared.sources(),
        shared_namespaces={kind: "" for kind in pod.share if kind in ("ipc", "uts")},
        pod_hostname=pod.hostname,
        cache=around.roots.run / "cache",
    )


def describe(document: dict[str, Any], image: Image, result: Composed, chosen: RunOptions) -> None:
    """Note in a container's document what was made of its image and options."""
    process = result.spec["process"]
    known = (document.get("image") or {}).get("name")
    document["image"] = {"id": image.id, "name": document.pop("image_name", "") or known or image.title}
    document["args"] = process["args"]
    document["process"] = {key: process[key] for key in ("args", "env", "cwd")}
    document["labels"] = result.labels
    document["stop_signal"] = result.stop_signal
    document["resources"] = {"cpus": chosen.cpus or 0, "memory": chosen.memory_bytes or 0}


def exec_request(request: dict[str, Any], document: dict[str, Any]) -> pb.ExecRequest:
    """What the agent is asked for when a process is added to the container of `document`."""
    if isinstance(request.get("process"), dict):
        return bundled.exec_request(request, document)
    given = request.get("options")
    if not isinstance(given, dict):
        raise InvalidArgumentError("the request has no options")
    chosen = options.exec_options(given)
    result = compose.compose_exec(chosen, document)
    columns, rows = request.get("size") or (0, 0)
    return pb.ExecRequest(
        container_id=document["id"],
        exec_id=identifier(request, "exec"),
        process_json=json.dumps(result.process).encode(),
        stdio=pb.Stdio(
            terminal=chosen.tty,
            columns=columns,
            rows=rows,
            stdin=bool(request.get("stdin")),
            stdout=True,
            stderr=not chosen.tty,
        ),
        user=result.user,
        default_home=result.default_home,
        inherit=True,
    )
