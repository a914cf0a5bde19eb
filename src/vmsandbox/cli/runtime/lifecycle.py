"""`start`, `kill` and `delete`: the life of a container that has been created, as the runtime specification has it.

What a later edit of config.json says changes nothing: everything needed is in the container's document.
"""

from __future__ import annotations

import os

from vmsandbox import cgroups, documents, records
from vmsandbox.cli import client, launch
from vmsandbox.cli.runtime import hooks, known
from vmsandbox.cli.runtime.options import FLAG, SHORT, parse
from vmsandbox.errors import (
    EndingError,
    InvalidArgumentError,
    InvalidStateError,
    NotFoundError,
    TimedOutError,
    UnavailableError,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmsandbox.cli.runtime.main import Options
    from vmsandbox.paths import Roots

# ---------------------------------------------------------------- start


def start_verb(options: Options, argv: list[str]) -> int:
    given = parse(argv, {})
    roots = options.roots()
    start(options, roots, known.find(roots, known.one(given.positional)))
    return 0


def start(options: Options, roots: Roots, container: records.Container) -> None:
    """Let a created container run; poststart hooks that fail are only reported, as the specification says."""
    status = container.status()
    if status == "stopped":
        raise UnavailableError("cannot start a container that has stopped")
    if status == "paused":
        raise UnavailableError("cannot start a container in the paused state")
    if status != "created":
        raise UnavailableError("cannot start an already running container")
    stopped = "cannot start a container that has stopped"
    try:
        known.ask(roots, container, {"verb": "start"}, stopped=stopped, reached=_was_started)
    except InvalidStateError as error:
        if known.find(roots, container.id).status() == "stopped":
            raise UnavailableError(stopped) from error
        raise UnavailableError(f"cannot start an already running container: {error}") from error
    # Not when it is created: conmon, whose child it would be then, ends no earlier than its children.
    launch.found_nursery(roots)
    poststart = (container.document.get("hooks") or {}).get("poststart") or []
    hooks.run_quietly(options, poststart, "poststart", known.state(container, status="running"))


def _was_started(container: records.Container) -> bool:
    return container.status() in ("running", "paused") or "started" in container.document


# ---------------------------------------------------------------- kill


def kill_verb(options: Options, argv: list[str]) -> int:
    given = parse(argv, {"all": FLAG}, short=SHORT)
    if not 1 <= len(given.positional) <= 2:
        raise InvalidArgumentError("kill needs a container id and, if not SIGTERM, a signal")
    roots = options.roots()
    container = known.find(roots, given.positional[0])
    everybody = given.flag("all")
    number = signal_number(given.positional[1] if len(given.positional) == 2 else "SIGTERM")
    if container.status() == "stopped":
        if everybody:
            return 0
        raise known.StoppedError("container not running")
    if not number:
        return 0  # as the system call, which looks and sends nothing
    try:
        known.ask(
            roots,
            container,
            {"verb": "kill", "signal": str(number), "all": everybody},
            stopped="container not running",
            # Most likely by this signal.
            ending=True,
        )
    except (InvalidStateError, NotFoundError):
        if not everybody:
            raise known.StoppedError("container not running") from None
    except UnavailableError:
        # The whole pod is ending.
        if known.find(roots, container.id).status() != "stopped":
            raise
        if not everybody:
            raise known.StoppedError("container not running") from None
    return 0


def signal_number(text: str) -> int:
    """A signal by number or name, with or without ``SIG``."""
    import signal

    if text.isascii() and text.isdigit() and len(text) < 4 and int(text) <= 64:
        return int(text)
    name = "SIG" + text.upper().removeprefix("SIG")
    for base, lowest in (("SIGRTMIN", int(signal.SIGRTMIN)), ("SIGRTMAX", int(signal.SIGRTMAX))):
        rest = name.removeprefix(base)
        if name != rest and (not rest or rest[0] in "+-") and rest[1:].isascii() and (not rest or rest[1:].isdigit()):
            number = lowest + int(rest or 0)
            if int(signal.SIGRTMIN) <= number <= int(signal.SIGRTMAX):
                return number
    found = signal.Signals.__members__.get(name)
    if found is None:
        raise InvalidArgumentError(f"unknown signal {text!r}")
    return int(found)


# ---------------------------------------------------------------- delete


def delete_verb(options: Options, argv: list[str]) -> int:
    given = parse(argv, {"force": FLAG}, short=SHORT)
    roots, container_id = options.roots(), known.one(given.positional)
    force = given.flag("force")
    try:
        container = known.find(roots, container_id)
    except NotFoundError:
        if force:
            return 0
        raise
    except documents.ForeignDocumentError:
        raise
    except documents.DamagedDocumentError as error:
        # Engines have roots of their own.
        raise documents.DamagedDocumentError(f"{error}, given '--root {roots.run_dir}'") from None
    delete(options, roots, container, force=force)
    return 0


def delete(options: Options, roots: Roots, container: records.Container, *, force: bool) -> None:
    """Forget a container that has stopped, or with `force` any; then its poststop hooks are run."""
    from vmsandbox.cli.removal import remove_from_disk

    status = container.status()
    if status not in ("stopped", "creating") and not force:
        if status != "created":
            raise known.StoppedError(f"cannot delete container {container.id} that is not stopped: {status}")
        force = True
    told = known.state(container, status="stopped", pid=0)
    if not _by_supervisor(roots, container, force=force):
        remove_from_disk(roots, container)
    places, above = (container.document.get(name) or [] for name in ("cgroups", "cgroups_above"))
    cgroups.remove(reversed(places), reversed(above))
    poststop = (container.document.get("hooks") or {}).get("poststop") or []
    hooks.run_quietly(options, poststop, "poststop", told)


def _by_supervisor(roots: Roots, container: records.Container, *, force: bool) -> bool:
    """Have the pod's supervisor remove the container; False where none is left to do it."""

    def attempt() -> bool:
        try:
            now = known.find(roots, container.id)
        except NotFoundError:
            return True  # removed, but the answer was lost
        # Its pod may go on without it.
        ended = now.document.get("status") == "stopped" and not known.machine_lives(now.sandbox)
        try:
            sock = launch.connect(now.sandbox) if ended else launch.connect_or_take_over(roots, now.sandbox)
        except (ConnectionRefusedError, FileNotFoundError):
            known.await_supervisor(now.sandbox)
            return False
        with sock:
            try:
                # What the stand-in's end says may not have come there yet: it is stopped, whatever stops it.
                wanted = force or now.status() == "stopped"
                client.request(sock, {"verb": "delete", "container": now.id, "force": wanted})
            except NotFoundError:
                known.await_supervisor(now.sandbox)
                return not os.path.lexists(f"{roots.by_container_dir}/{now.id}")
            except (EndingError, TimedOutError):
                raise
            except UnavailableError:
                # It has been ending with its pod.
                if not known.await_supervisor(now.sandbox):
                    raise
                return not os.path.lexists(f"{roots.by_container_dir}/{now.id}")
            client.wait_for_end(sock)
        if os.path.lexists(f"{roots.by_container_dir}/{now.id}"):
            raise EndingError("the pod's supervisor ended before everything was given back")
        return True

    return client.insisting(attempt)
