"""Containers as engines name them: by their whole id, with runc's words for those that are not there.

`state` is this and little else, and engines ask it often: what only other verbs need is imported by them.
"""

from __future__ import annotations

import os
import stat

from vmsandbox import documents, plainjson, records
from vmsandbox.errors import (
    CommandNotExecutableError,
    CommandNotFoundError,
    InvalidArgumentError,
    InvalidBundleError,
    InvalidStateError,
    NotFoundError,
    SandboxError,
    UnavailableError,
    is_shortage,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vmsandbox.paths import Roots, SandboxPaths

ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.+-")
MAX_ID = 128
#: how a supervisor is called in /proc
SUPERVISOR = "vmsandbox-super"
#: seconds until a supervisor that ends must have ended
END_TIMEOUT = 60
MAX_DOCUMENT = 16 * 1024 * 1024


class StoppedError(SandboxError):
    """The container has ended; the message is runc's."""


def check_id(container_id: str) -> str:
    """An id that is safe as a file name; raises InvalidArgumentError with runc's words."""
    if not container_id:
        raise InvalidArgumentError("container id cannot be empty")
    if len(container_id) > MAX_ID or not set(container_id) <= ID_CHARACTERS or not container_id[0].isalnum():
        raise InvalidArgumentError(f"invalid container ID format: '{container_id[:MAX_ID]}'")
    return container_id


def pod_id(container_id: str) -> str:
    """The id of the pod whose first container has this id.

    Names that engines choose may begin alike, and pods' directories are named by the first digits.
    """
    import hashlib

    return hashlib.sha256(container_id.encode()).hexdigest()


def one(positional: list[str]) -> str:
    """The container id that has to be the only positional."""
    if not positional:
        raise InvalidArgumentError("a container id is needed")
    if len(positional) > 1:
        raise InvalidArgumentError(f"exactly one container id is needed, and not also '{positional[1][:MAX_ID]}'")
    return check_id(positional[0])


def find(roots: Roots, container_id: str) -> records.Container:
    """The container with this id; NotFoundError with runc's words."""
    try:
        container = records.load(roots, check_id(container_id))
    except NotFoundError:
        raise NotFoundError("container does not exist") from None
    if container.document.get("kind") != "bundle":
        raise NotFoundError("container does not exist")
    return container


def pid_of(container: records.Container) -> int:
    """The stand-in's pid, 0 once it has ended."""
    if container.status() in ("stopped", "creating"):
        return 0
    return int((container.document.get("standin") or {}).get("pid") or 0)


def state(container: records.Container, *, status: str = "", pid: int | None = None) -> dict[str, Any]:
    """The state of the runtime specification, as `state` prints it and hooks get it."""
    document = container.document
    told: dict[str, Any] = {
        "ociVersion": document["oci_version"],
        "id": container.id,
        "pid": pid_of(container) if pid is None else pid,
        "status": status or container.status(),
        "bundle": document["bundle"],
    }
    if document.get("annotations"):
        told["annotations"] = document["annotations"]
    return told


def ask(
    roots: Roots,
    container: records.Container,
    request: dict[str, Any],
    *,
    stopped: str,
    reached: Callable[[records.Container], bool] = lambda _: False,
    ending: bool = False,
) -> dict[str, Any]:
    """Send a request about a container to its pod; `stopped` is what is said of one that has ended.

    A supervisor that breaks off may have done what it was asked for.  It, or the one that follows, is asked again
    unless the container has `reached` what was wanted, or with `ending` its end; the answer is empty then.
    """
    from vmsandbox.cli import client, launch

    again = False

    def attempt() -> dict[str, Any]:
        nonlocal again, container
        if again:
            container = find(roots, container.id)
            if reached(container) or (ending and container.status() == "stopped"):
                return {}
        if container.status() == "stopped":
            raise StoppedError(stopped)
        try:
            sock = launch.connect_or_take_over(roots, container.sandbox)
        except FileNotFoundError:
            raise UnavailableError(stopped) from None
        with sock:
            repeated, again = again, True
            try:
                return client.request(sock, {**request, "container": container.id})
            except (InvalidStateError, NotFoundError):
                # The first request was under way still when this one came.
                if repeated and (ending or reached(find(roots, container.id))):
                    return {}
                raise

    return client.insisting(attempt)


def machine_lives(sandbox: SandboxPaths) -> bool:
    """Whether the pod's machine runs, and may still hold what was a container's."""
    try:
        vm = part(documents.read(sandbox.document_file), "vm")
    except SandboxError:
        return False
    return records.is_alive(vm.get("pid"), vm.get("start_time"))


def await_supervisor(sandbox: SandboxPaths) -> bool:
    """Wait until a supervisor that takes no requests any more has released everything; says whether it has."""
    try:
        pid = int(part(documents.read(sandbox.document_file), "supervisor").get("pid") or 0)
        handle = os.pidfd_open(pid)
    except (SandboxError, OSError, ValueError) as error:
        if isinstance(error, OSError) and is_shortage(error):
            raise
        return True
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            ours = file.read().startswith(SUPERVISOR)
        if ours:
            import select

            poll = select.poll()
            poll.register(handle, select.POLLIN)
            return bool(poll.poll(END_TIMEOUT * 1000))
    except OSError:
        pass
    finally:
        os.close(handle)
    return True


# ---------------------------------------------------------------- documents of engines


def read_document(path: str, *, what: str) -> dict[str, Any]:
    """A JSON object in a regular file (``-``: on stdin), bounded; InvalidBundleError names it."""
    try:
        fd = 0 if path == "-" else os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise InvalidBundleError(f"{what} '{path}' does not exist") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InvalidBundleError(f"cannot read {what} '{path}': {reason.lower()}") from None
    with open(fd, "rb", closefd=fd != 0) as file:
        if fd and not stat.S_ISREG(os.fstat(fd).st_mode):
            raise InvalidBundleError(f"{what} '{path}' is not a regular file")
        text = file.read(MAX_DOCUMENT + 1)
    if len(text) > MAX_DOCUMENT:
        raise InvalidBundleError(f"{what} '{path}' is larger than {MAX_DOCUMENT} bytes")
    try:
        document = plainjson.loads(text)
    except (ValueError, RecursionError):
        raise InvalidBundleError(f"{what} '{path}' is not valid JSON") from None
    if not isinstance(document, dict):
        raise InvalidBundleError(f"{what} '{path}' is not a JSON object")
    return document


def part(document: dict[str, Any], name: str) -> dict[str, Any]:
    """A member that is an object; one that is missing or of another type counts as empty and is complained of later."""
    value = document.get(name)
    return value if isinstance(value, dict) else {}


def entries(document: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """A member that is a list of objects, likewise."""
    value = document.get(name)
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def worded(error: SandboxError, args: object) -> SandboxError:
    """An error about a container's program in the words that engines look for."""
    program = str(args[0]) if isinstance(args, list) and args else ""
    start = "unable to start container process: exec: "
    if isinstance(error, CommandNotFoundError):
        why = f"stat {program}: no such file or directory" if "/" in program else "executable file not found in $PATH"
        return CommandNotFoundError(f'{start}"{program}": {why}')
    if isinstance(error, CommandNotExecutableError):
        # docker looks for the second half only, and so does podman.
        what = "is a directory: permission denied" if "directory" in str(error) else "permission denied"
        return CommandNotExecutableError(f'{start}"{program}": {what}')
    return error
