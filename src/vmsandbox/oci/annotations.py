"""Which container of which pod: what engines say in annotations.

containerd's and cri-o's CRI plugins mark the sandbox (pause) container and its members; podman marks members only, with
the id of the pod's infra container, which itself looks like any container.  Stdlib only.
"""

from __future__ import annotations

from vmsandbox.errors import InvalidBundleError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Literal

    Kind = Literal["single", "sandbox", "container"]

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

_ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")
_MAX_ID, _MAX_DIGITS = 128, 18


class Role:
    """A container's place.

    ``single``: a pod of its own, which may get members later (podman's infra container); ``sandbox``: the pod's first
    container, which only holds it; ``container``: a member of the pod whose sandbox container has the id `sandbox_id`.
    """

    __slots__ = (
        "cpu_period",
        "cpu_quota",
        "cpu_shares",
        "kind",
        "memory_bytes",
        "pod_name",
        "pod_namespace",
        "pod_uid",
        "sandbox_id",
    )

    def __init__(
        self,
        *,
        kind: Kind,
        sandbox_id: str,
        pod_name: str = "",
        pod_namespace: str = "",
        pod_uid: str = "",
        cpu_quota: int = 0,
        cpu_period: int = 0,
        cpu_shares: int = 0,
        memory_bytes: int = 0,
    ) -> None:
        self.kind = kind
        self.sandbox_id = sandbox_id
        self.pod_name = pod_name
        self.pod_namespace = pod_namespace
        self.pod_uid = pod_uid
        #: what the engine says all containers of the pod will ask for together; 0: nothing said
        self.cpu_quota = cpu_quota
        self.cpu_period = cpu_period
        self.cpu_shares = cpu_shares
        self.memory_bytes = memory_bytes

    def document(self) -> dict[str, str | int]:
        """All of it, by name."""
        return {name: getattr(self, name) for name in self.__slots__}


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
        if not _is_id(sandbox_id):
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


def _is_id(text: str) -> bool:
    return 0 < len(text) <= _MAX_ID and set(text) <= _ID_CHARACTERS and text[0] not in ".-"


def _first(annotations: Mapping[str, str], keys: tuple[str, ...]) -> str:
    return next((annotations[key] for key in keys if annotations.get(key)), "")


def _number(annotations: Mapping[str, str], key: str) -> int:
    """A number of the engine's; one that is negative (no quota) counts as nothing said."""
    text = annotations.get(key, "0")
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= _MAX_DIGITS):
        raise InvalidBundleError(f"annotation '{key}' is '{text}' but has to be a number")
    return max(0, int(text))
