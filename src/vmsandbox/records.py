"""What is on disk about pods and containers: documents, names, and how to find, judge and forget them.

Only a supervisor writes documents, and before it answers; every other process reads them and judges by the stand-in
(its pid together with its start time).  A damaged document is named in an error and never spoils the others.
Stdlib only, and without pathlib or dataclasses: `ps` is this module and little else.
"""

from __future__ import annotations

import os

from vmsandbox import plainjson
from vmsandbox.errors import (
    AlreadyExistsError,
    AmbiguousError,
    InvalidArgumentError,
    InvalidStateError,
    NotFoundError,
    SandboxError,
)
from vmsandbox.paths import Roots, SandboxPaths

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

#: Written into every document; a larger number was written by a newer version of the product.
VERSION = 1
#: No document of ours comes near this; a larger file is foreign.
MAX_BYTES = 4 * 1024 * 1024
NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")
MAX_NAME = 128


class DamagedDocumentError(SandboxError):
    """A document is truncated, foreign, unreadable or from a newer version."""

    code = "damaged-document"


class ForeignDocumentError(DamagedDocumentError):
    """A document that may be whole, but not for us: from a newer version, or unreadable.  Nothing may remove it."""

    code = "foreign-document"


def write_document(path: str, document: dict[str, Any]) -> None:
    """Replace the document at `path` atomically and durably (write, fsync, rename)."""
    import json

    data = json.dumps({"version": VERSION, **document}, separators=(",", ":")).encode()
    temporary = f"{path}.{os.getpid()}.tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, path) from error  # a full disk does not say where it is
        raise


def read_document(path: str) -> dict[str, Any]:
    """Read a document; `NotFoundError` if there is none, `DamagedDocumentError` naming it if it is no good."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise NotFoundError(f"no document '{path}'") from None
    except OSError as error:
        raise ForeignDocumentError(
            f"cannot read '{path}': {error.strerror}; it is left alone until it can be read"
        ) from error
    if len(data) > MAX_BYTES:
        raise DamagedDocumentError(f"'{path}' is not a document of ours: larger than {MAX_BYTES} bytes")
    try:
        document = plainjson.loads(data)
    except (ValueError, RecursionError):
        raise DamagedDocumentError(f"'{path}' is damaged: not valid JSON; 'vmsandbox gc' removes it") from None
    if not isinstance(document, dict) or not isinstance(document.get("version"), int):
        raise DamagedDocumentError(f"'{path}' is not a document of ours; 'vmsandbox gc' removes it")
    if document["version"] > VERSION:
        raise ForeignDocumentError(
            f"'{path}' was written by a newer vmsandbox (document version {document['version']}, known {VERSION}): "
            "use that one for it"
        )
    return document


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


def read_shaped(path: str, shape: dict[str, Any]) -> dict[str, Any]:
    """As `read_document`; what is in it but of another type than its readers take is damage as well."""
    document = read_document(path)
    wrong = _misfit(document, shape)
    if wrong:
        raise DamagedDocumentError(f"'{path}' is damaged: '{wrong}' is of the wrong type; 'vmsandbox gc' removes it")
    return document


def _misfit(value: object, shape: object) -> str:
    """The key of the first value that does not fit, `.` for the value itself, empty if all do."""
    if value is None:
        return ""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return "."
        for key, inner in shape.items():
            wrong = _misfit(value.get(key), inner)
            if wrong:
                return key if wrong == "." else f"{key}.{wrong}"
        return ""
    if isinstance(shape, list):
        fits = isinstance(value, list) and not any(_misfit(item, shape[0]) for item in value)
        return "" if fits else "."
    kinds = (int, float) if shape is float else shape
    return "" if isinstance(value, kinds) else "."  # type: ignore[arg-type]


# ---------------------------------------------------------------- processes


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it is gone or only a zombie is left."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b") ")[2].split()
    except OSError:
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
    return _listed(roots.by_container_dir)


def _listed(directory: str) -> list[str]:
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
        document = read_shaped(sandbox.container_file(container_id), CONTAINER_SHAPE)
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
    fits = [known for known in _listed(directory) if known.startswith(reference)]
    if len(fits) > 1:
        listed = ", ".join(fit[:16] for fit in fits[:8])
        raise AmbiguousError(f"'{reference}' is ambiguous: it fits {listed}; give more of the id")
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
    return _listed(roots.by_pod_dir)


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
        document = read_shaped(sandbox.document_file, POD_SHAPE)
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
        f"pod '{pod}'", state=f"used by running containers ({named}): stop them first or use '--force'", wanted="remove"
    )


def pod_id_of(sandbox: SandboxPaths) -> str:
    """The id of the pod in a directory if it was made on purpose, else empty; whatever its document says."""
    sandboxes, short = os.path.split(sandbox.dir)
    known = _listed(Roots(os.path.dirname(sandboxes), "").by_pod_dir)
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


# ---------------------------------------------------------------- forgetting


def mounts_below(path: str) -> list[str]:
    """What is mounted at or below `path` in this process' view, in the order in which it was mounted."""
    top = os.path.realpath(path)
    with open("/proc/self/mountinfo", "rb") as file:
        lines = file.read().splitlines()
    found = []
    for line in lines:
        point = line.split(b" ", 5)[4]
        if b"\\" in point:
            for code, byte in ((b"\\040", b" "), (b"\\011", b"\t"), (b"\\012", b"\n"), (b"\\134", b"\\")):
                point = point.replace(code, byte)
        place = os.fsdecode(point)
        if place == top or place.startswith(top + "/"):
            found.append(place)
    return found


def unmount_below(path: str) -> None:
    """Detach everything that is mounted at or below `path`, whoever still uses it."""
    left = mounts_below(path)
    if not left:
        return
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    detach_nofollow = 2 | 8
    while left:
        # The one mounted first carries the others away with it, if it is the lowest.
        place = min(left, key=len)
        if libc.umount2(os.fsencode(place), detach_nofollow) != 0:
            raise SandboxError(f"cannot unmount '{place}': {os.strerror(ctypes.get_errno())}")
        left = mounts_below(path)


def close_shared(sandbox: SandboxPaths) -> bool:
    """Undo what a pod has shared with its machine, which must be gone; says whether there was anything."""
    if not os.path.lexists(sandbox.shared_dir):
        return False
    unmount_below(sandbox.shared_dir)
    remove_tree(sandbox.shared_dir)
    return True


def is_served(sandbox: SandboxPaths) -> bool:
    """Whether a supervisor accepts connections on the pod's control socket."""
    from vmsandbox.plainsocket import UnixSocket

    with UnixSocket() as sock:
        return sock.connect_ex(sandbox.control_file) == 0


def remove_tree(path: str) -> None:
    """Remove a directory of ours with all that is in it; one that is already gone is fine.

    Refuses to touch anything while something is mounted below: that would be somebody else's files.
    """
    if not os.path.lexists(path):
        return
    mounted = mounts_below(path)
    if mounted:
        raise SandboxError(f"cannot remove '{path}': '{mounted[0]}' is still mounted; 'vmsandbox gc' unmounts it")
    _remove(path)


def _remove(path: str) -> None:
    try:
        entries = list(os.scandir(path))
    except FileNotFoundError:
        return
    except NotADirectoryError:
        os.unlink(path)
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            _remove(entry.path)
        else:
            _unlink(entry.path)
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return


def _unlink(path: str) -> None:
    if not os.path.lexists(path):
        return  # a file system that is read-only refuses to remove even what is not there
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


def forget_container(roots: Roots, container_id: str, *, name: str, image_id: str) -> None:
    """Remove everything on disk of a container that no longer runs; safe to repeat.

    The symlink goes last: until then a later `rm` or `gc` still finds what is left.
    """
    try:
        sandbox: SandboxPaths | None = sandbox_of(roots, container_id)
    except NotFoundError:
        sandbox = None
    remove_tree(f"{roots.container_data_dir}/{container_id}")
    if image_id:
        _unlink(f"{roots.data_dir}/images/refs/{image_id}/{container_id}")
    if sandbox is not None:
        _unlink(sandbox.container_file(container_id))
    if name:
        release_name(roots, name, container_id)
    _unlink(f"{roots.by_container_dir}/{container_id}")


def forget_pod(roots: Roots, sandbox: SandboxPaths) -> None:
    """Remove everything on disk of a pod that was made on purpose and whose containers are forgotten; repeatable.

    The symlink goes last, as a container's does.
    """
    pod_id = pod_id_of(sandbox)
    _remove_sandbox(sandbox)
    if not pod_id:
        return
    for name in _listed(roots.names_dir):
        release_name(roots, name, pod_id)
    _unlink(f"{roots.by_pod_dir}/{pod_id}")


def forget_sandbox_if_empty(sandbox: SandboxPaths) -> bool:
    """Remove a pod directory in which no container's document is left; says whether it did.

    A pod that was made on purpose stays: only `forget_pod` removes it.
    """
    if pod_id_of(sandbox):
        return False
    try:
        if any(entry.endswith(".json") for entry in os.listdir(sandbox.containers_dir)):
            return False
    except FileNotFoundError:
        pass
    _remove_sandbox(sandbox)
    return True


def _remove_sandbox(sandbox: SandboxPaths) -> None:
    """Remove a pod's directory, and what still runs of a machine: with it the last trace would go."""
    if os.path.isdir(f"{sandbox.dir}/vm"):
        from vmsandbox import machines

        machines.end_all(sandbox.dir)
    close_shared(sandbox)
    remove_tree(sandbox.dir)
