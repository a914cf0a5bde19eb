"""What is on disk about pods and containers: their names, and how to find and judge them.

Only a supervisor writes their documents, and before it answers; every other process reads them and judges by the
stand-in (its pid together with its start time).
Stdlib only, and without pathlib or dataclasses: `ps` is this module and little else.
"""

from __future__ import annotations

import os

from vmsandbox import documents
from vmsandbox.errors import (
    AlreadyExistsError,
    AmbiguousError,
    InvalidArgumentError,
    InvalidStateError,
    NotFoundError,
    SandboxError,
    is_shortage,
)
from vmsandbox.paths import Roots, SandboxPaths

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")
MAX_NAME = 128

#: what readers rely on; what is absent or null is fine
_IDENTITY: dict[str, Any] = {"pid": int, "start_time": int}
CONTAINER_SHAPE: dict[str, Any] = {
    "id": str,
    "name": str,
    "sandbox": str,
    "pod_name": str,
    "status": str,
    "created": float,
    "started": float,
    "finished": float,
    "standin": _IDENTITY,
    "args": [str],
    "image": {"id": str, "name": str},
    "exit": {"code": int},
}
POD_SHAPE: dict[str, Any] = {
    "id": str,
    "name": str,
    "status": str,
    "created": float,
    "vm": _IDENTITY,
    "supervisor": {"pid": int},
}


# ---------------------------------------------------------------- processes


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it is gone or only a zombie is left.

    Who has no descriptor left to look with gets the `OSError`.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b") ")[2].split()
    except OSError as error:
        if is_shortage(error):
            raise
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def is_alive(pid: object, started: object) -> bool:
    """Whether the process that had `pid` at `started` still runs; anything but two positive ints is False."""
    return isinstance(pid, int) and pid > 0 and isinstance(started, int) and start_time(pid) == started


# ---------------------------------------------------------------- looking up


class _Known:
    """Whatever has an id, perhaps a name, and a document in a pod's directory."""

    __slots__ = ("document", "id", "sandbox")

    def __init__(self, known_id: str, sandbox: SandboxPaths, document: dict[str, Any]) -> None:
        self.id = known_id
        self.sandbox = sandbox
        self.document = document

    @property
    def name(self) -> str:
        return str(self.document.get("name", ""))


class Container(_Known):
    """A container's document and where it is."""

    __slots__ = ()

    def status(self) -> str:
        """The stored status while its stand-in lives, else `stopped`."""
        status = str(self.document.get("status", "unknown"))
        if status in ("created", "running", "paused"):
            standin = self.document.get("standin") or {}
            if not is_alive(standin.get("pid"), standin.get("start_time")):
                return "stopped"
        return status


def container_ids(roots: Roots) -> list[str]:
    return listed(roots.by_container_dir)


def listed(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except FileNotFoundError:
        return []


def sandbox_of(roots: Roots, container_id: str) -> SandboxPaths:
    """The pod directory of a container, by one readlink."""
    try:
        target = os.readlink(f"{roots.by_container_dir}/{container_id}")
    except OSError:
        raise NotFoundError(f"no such container: '{container_id}'") from None
    return SandboxPaths(os.path.normpath(os.path.join(roots.by_container_dir, target)))


def load(roots: Roots, container_id: str) -> Container:
    sandbox = sandbox_of(roots, container_id)
    try:
        document = documents.read_shaped(sandbox.container_file(container_id), CONTAINER_SHAPE)
    except NotFoundError:
        raise NotFoundError(f"no such container: '{container_id}'") from None
    return Container(container_id, sandbox, document)


def containers(roots: Roots) -> Iterator[Container | SandboxError]:
    """Every container, oldest first as far as known; a damaged one comes as its error."""
    for container_id in container_ids(roots):
        try:
            yield load(roots, container_id)
        except NotFoundError:
            continue  # being made or removed right now
        except SandboxError as error:
            yield error


def resolve(roots: Roots, reference: str) -> str:
    """The id that a name, an id or a unique prefix of an id of a container stands for."""
    return _resolved(roots, reference, roots.by_container_dir, what="container", listing="vmsandbox ps -a")


def _resolved(roots: Roots, reference: str, directory: str, *, what: str, listing: str) -> str:
    if "/" in reference or reference in ("", ".", ".."):
        raise NotFoundError(f"no such {what}: '{reference}'")
    try:
        holder = os.readlink(f"{roots.names_dir}/{reference}")
        if os.path.lexists(f"{directory}/{holder}"):
            return holder
    except OSError:
        pass
    if os.path.lexists(f"{directory}/{reference}"):
        return reference
    fits = [known for known in listed(directory) if known.startswith(reference)]
    if len(fits) > 1:
        candidates = ", ".join(fit[:16] for fit in fits[:8])
        raise AmbiguousError(f"'{reference}' is ambiguous: it fits {candidates}; give more of the id")
    if not fits:
        raise NotFoundError(f"no such {what}: '{reference}'; '{listing}' lists them")
    return fits[0]


# ---------------------------------------------------------------- pods


class Pod(_Known):
    """The document of a pod that was made on purpose, and where it is."""

    __slots__ = ()

    def status(self) -> str:
        """``running`` while its machine lives, ``creating`` before, else ``stopped``."""
        vm = self.document.get("vm") or {}
        if not is_alive(vm.get("pid"), vm.get("start_time")):
            return "stopped"
        return "running" if self.document.get("status") == "ready" else "creating"

    def containers(self, roots: Roots) -> list[Container | SandboxError]:
        """Its containers, a damaged one as its error."""
        try:
            names = sorted(os.listdir(self.sandbox.containers_dir))
        except FileNotFoundError:
            return []
        found: list[Container | SandboxError] = []
        for name in names:
            if name.endswith(".json"):
                try:
                    found.append(load(roots, name.removesuffix(".json")))
                except SandboxError as error:
                    found.append(error)
        return found


def pod_ids(roots: Roots) -> list[str]:
    return listed(roots.by_pod_dir)


def resolve_pod(roots: Roots, reference: str) -> str:
    """The id that a name, an id or a unique prefix of an id of a pod stands for."""
    return _resolved(roots, reference, roots.by_pod_dir, what="pod", listing="vmsandbox pod ls")


def load_pod(roots: Roots, pod_id: str) -> Pod:
    """A pod by its id; one whose machine was never started has an empty document."""
    try:
        target = os.readlink(f"{roots.by_pod_dir}/{pod_id}")
    except OSError:
        raise NotFoundError(f"no such pod: '{pod_id}'; 'vmsandbox pod ls' lists them") from None
    sandbox = SandboxPaths(os.path.normpath(os.path.join(roots.by_pod_dir, target)))
    try:
        document = documents.read_shaped(sandbox.document_file, POD_SHAPE)
    except NotFoundError:
        document = {"id": pod_id, "implicit": False}
    return Pod(pod_id, sandbox, document)


def pods(roots: Roots) -> Iterator[Pod | SandboxError]:
    """Every pod that was made on purpose; a damaged one comes as its error."""
    for pod_id in pod_ids(roots):
        try:
            yield load_pod(roots, pod_id)
        except NotFoundError:
            continue
        except SandboxError as error:
            yield error


def pod_in_use(pod: str, alive: list[dict[str, Any]]) -> InvalidStateError:
    """Why a pod is not removed: the documents of its containers that run."""
    named = ", ".join(f"'{each.get('name') or str(each.get('id'))[:SHOWN_ID]}'" for each in alive[:8])
    return InvalidStateError(
        f"pod '{pod}'",
        state=f"used by running containers ({named})",
        wanted="remove",
        remedy="stop them first or use '--force'",
    )


def pod_id_of(sandbox: SandboxPaths) -> str:
    """The id of the pod in a directory if it was made on purpose, else empty; whatever its document says."""
    sandboxes, short = os.path.split(sandbox.dir)
    known = listed(Roots(os.path.dirname(sandboxes), "").by_pod_dir)
    return next((pod_id for pod_id in known if pod_id[:SHOWN_ID] == short), "")


# ---------------------------------------------------------------- names


def check_name(name: str) -> None:
    if not name or len(name) > MAX_NAME or not set(name) <= NAME_CHARACTERS or not name[0].isalnum():
        raise InvalidArgumentError(
            f"invalid name '{name[:MAX_NAME]}': letters, digits, '_', '.', '-', starting with a letter or digit, "
            f"at most {MAX_NAME}"
        )


def reserve_name(roots: Roots, name: str, holder: str) -> None:
    """Take a name for an id, or say who holds it.  A name whose holder was never finished is taken over."""
    check_name(name)
    os.makedirs(roots.names_dir, mode=0o700, exist_ok=True)
    path = f"{roots.names_dir}/{name}"
    try:
        os.symlink(holder, path)
    except FileExistsError:
        raise AlreadyExistsError(
            f"the name '{name}' is in use by '{os.readlink(path)[:SHOWN_ID]}': remove that one or choose another name"
        ) from None


def release_name(roots: Roots, name: str, holder: str) -> None:
    """Give a name back, if `holder` still holds it."""
    path = f"{roots.names_dir}/{name}"
    try:
        if os.readlink(path) == holder:
            os.unlink(path)
    except OSError:
        return


#: hex digits of an id shown to people
SHOWN_ID = 12
