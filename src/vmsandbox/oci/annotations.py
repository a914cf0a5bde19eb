"""Which container of which pod: what engines say in annotations.

containerd's and cri-o's CRI plugins mark the sandbox (pause) container and its members; podman marks members only, with
the id of the pod's infra container, which itself looks like any container.  Stdlib only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vmsandbox.errors import InvalidBundleError

if TYPE_CHECKING:
    from collections.abc import Mapping

#: (type, sandbox's id), by engine
_KEYS = (
    ("io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-id"),
    ("io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri-o.SandboxID"),
)
_NAMES = ("io.kubernetes.cri.sandbox-name", "io.kubernetes.cri-o.KubeName")
_NAMESPACES = ("io.kubernetes.cri.sandbox-namespace", "io.kubernetes.cri-o.Namespace")
_UIDS = ("io.kubernetes.cri.sandbox-uid", "io.kubernetes.pod.uid")
_SIZES = {
    "cpu_period": "io.kubernetes.cri.sandbox-cpu-period",
    "cpu_quota": "io.kubernetes.cri.sandbox-cpu-quota",
    "cpu_shares": "io.kubernetes.cri.sandbox-cpu-shares",
    "memory_bytes": "io.kubernetes.cri.sandbox-memory",
}

Kind = Literal["single", "sandbox", "container"]


@dataclass(frozen=True, kw_only=True)
class Role:
    """A container's place.

    ``single``: a pod of its own, which may get members later (podman's infra container); ``sandbox``: the pod's first
    container, which only holds it; ``container``: a member of the pod whose sandbox container has the id `sandbox_id`.
    """

    kind: Kind
    sandbox_id: str
    pod_name: str = ""
    pod_namespace: str = ""
    pod_uid: str = ""
    #: what the engine says all containers of the pod will ask for together; 0: nothing said
    cpu_quota: int = 0
    cpu_period: int = 0
    cpu_shares: int = 0
    memory_bytes: int = 0


def role(annotations: Mapping[str, str], *, container_id: str) -> Role:
    """The place of the container `container_id`.

    Raises InvalidBundleError if the annotations contradict themselves.
    """
    for type_key, id_key in _KEYS:
        kind = annotations.get(type_key, "")
        if not kind:
            continue
        if kind not in ("sandbox", "container"):
            raise InvalidBundleError(f"annotation '{type_key}' is '{kind}': known are 'sandbox' and 'container'")
        sandbox_id = annotations.get(id_key, "") or (container_id if kind == "sandbox" else "")
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", sandbox_id):
            raise InvalidBundleError(f"annotation '{id_key}' is '{sandbox_id}', which is no id of a sandbox")
        if kind == "sandbox" and sandbox_id != container_id:
            raise InvalidBundleError(
                f"annotation '{id_key}' is '{sandbox_id}', but the sandbox container's id is '{container_id}'"
            )
        return Role(
            kind="sandbox" if kind == "sandbox" else "container",
            sandbox_id=sandbox_id,
            pod_name=_first(annotations, _NAMES),
            pod_namespace=_first(annotations, _NAMESPACES),
            pod_uid=_first(annotations, _UIDS),
            **{field: _number(annotations, key) for field, key in _SIZES.items()},
        )
    return Role(kind="single", sandbox_id=container_id)


def _first(annotations: Mapping[str, str], keys: tuple[str, ...]) -> str:
    return next((annotations[key] for key in keys if annotations.get(key)), "")


def _number(annotations: Mapping[str, str], key: str) -> int:
    """A number of the engine's; one that is negative (no quota) counts as nothing said."""
    text = annotations.get(key, "0")
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        raise InvalidBundleError(f"annotation '{key}' is '{text}' but has to be a number")
    return max(0, int(text))
