"""`create`, `start`, `run`, `kill` and `delete`: a container's life, as the runtime specification has it.

What a later edit of config.json says changes nothing: everything needed is in the container's document.
"""

from __future__ import annotations

import os

from vmsandbox import cgroups, documents, lent, records, remains
from vmsandbox.cli import client, launch, standin
from vmsandbox.cli.runtime import hooks, known, standins
from vmsandbox.cli.runtime.known import entries, part
from vmsandbox.cli.runtime.options import FLAG, VALUE, parse
from vmsandbox.errors import (
    AlreadyExistsError,
    EndingError,
    InvalidArgumentError,
    InvalidBundleError,
    InvalidStateError,
    NotFoundError,
    SandboxError,
    TimedOutError,
    UnavailableError,
    UnsupportedError,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmsandbox.cli.runtime.main import Options
    from vmsandbox.paths import Roots, SandboxPaths

CREATE = {
    "bundle": VALUE,
    "console-socket": VALUE,
    "pid-file": VALUE,
    "preserve-fds": VALUE,
    "no-pivot": FLAG,
    "no-new-keyring": FLAG,
}
SHORT = {"b": "bundle", "f": "force", "d": "detach", "a": "all"}
#: hooks that are run before the supervisor has looked at the bundle
EARLY = ("prestart", "createRuntime", "createContainer")


class Plan:
    """What is to be created: read from the command line and the bundle, nothing done yet."""

    def __init__(self, roots: Roots, container_id: str, bundle: str, *, systemd: bool = False) -> None:
        from vmsandbox.oci.annotations import role

        self.id = container_id
        self.bundle = os.path.abspath(bundle or os.curdir)
        self.config = known.read_document(f"{self.bundle}/config.json", what="spec")
        self.process = part(self.config, "process")
        self.terminal = self.process.get("terminal") is True
        annotations = {str(key): str(value) for key, value in part(self.config, "annotations").items()}
        self.role = role(annotations, container_id=container_id)
        self.annotations = annotations
        linux = part(self.config, "linux")
        networks = [each for each in entries(linux, "namespaces") if each.get("type") == "network"]
        self.netns = str(networks[0].get("path") or "") if networks else None
        self.cgroups = cgroups.directories(str(linux.get("cgroupsPath") or ""), container_id, systemd=systemd)
        given = part(self.config, "hooks")
        #: run on the host while the container is made
        self.hooks = {name: hooks.checked(entries(given, name), name) for name in EARLY}
        #: what undoes those, should the container not come about
        self.poststop = hooks.checked(entries(given, "poststop"), "poststop")
        self.root = os.path.normpath(os.path.join(self.bundle, str(part(self.config, "root").get("path") or "")))
        if not os.path.isdir(self.root):
            raise InvalidBundleError(f"'root.path' is '{self.root}', which is not a directory")
        self.member = self.role.kind == "container"
        if self.member:
            self.pod_container: records.Container | None = self._pod_container(roots)
            self.sandbox = self.pod_container.sandbox
            self.pod = str(self.pod_container.document.get("sandbox"))
        else:
            self.pod_container = None
            self.pod = known.pod_id(container_id)
            self.sandbox = roots.sandbox(self.pod)

    def _pod_container(self, roots: Roots) -> records.Container:
        try:
            found = known.find(roots, self.role.sandbox_id)
        except NotFoundError:
            raise NotFoundError(f"the pod's first container '{self.role.sandbox_id}' is not known") from None
        if found.status() == "stopped":
            raise InvalidStateError(
                f"container '{self.id}'", state="without a pod: its first container has ended", wanted="create"
            )
        return found

    def standin_root(self) -> str:
        """What the stand-in sees of files: a root that goes to the virtual machine with its disk must not be held."""
        return standin.EMPTY if lent.find(self.root) else self.root

    def state(self, pid: int, *, status: str = "creating") -> dict[str, Any]:
        """What hooks are told while the container is being made, or of one that was not."""
        return {
            "ociVersion": str(self.config.get("ociVersion") or ""),
            "id": self.id,
            "status": status,
            "pid": pid,
            "bundle": self.bundle,
            **({"annotations": self.annotations} if self.annotations else {}),
        }


def create_verb(options: Options, argv: list[str]) -> int:
    given = parse(argv, CREATE, short=SHORT)
    roots, container_id = options.roots(), known.one(given.positional)
    _refuse_descriptors(given.text("preserve-fds"))
    _require_free(roots, container_id)
    plan = Plan(roots, container_id, given.text("bundle"), systemd=options.systemd_cgroup)
    console = given.text("console-socket")
    standins.check_console(terminal=plan.terminal, console_socket=console, detached=True)
    create(options, roots, plan, console_socket=console, pid_file=given.text("pid-file"))
    return 0


def run_verb(options: Options, argv: list[str]) -> int:
    """Create, start and, unless detached, wait and delete; the exit code is the container's."""
    given = parse(argv, {**CREATE, "detach": FLAG, "keep": FLAG, "no-subreaper": FLAG}, short=SHORT)
    roots, container_id = options.roots(), known.one(given.positional)
    _refuse_descriptors(given.text("preserve-fds"))
    _require_free(roots, container_id)
    plan = Plan(roots, container_id, given.text("bundle"), systemd=options.systemd_cgroup)
    console, detached = given.text("console-socket"), given.flag("detach")
    standins.check_console(terminal=plan.terminal, console_socket=console, detached=detached)
    standing = create(
        options, roots, plan, console_socket=console, pid_file=given.text("pid-file"), foreground=not detached
    )
    try:
        start(options, roots, known.find(roots, container_id))
    except BaseException:
        delete(options, roots, known.find(roots, container_id), force=True)
        raise
    if detached:
        return 0
    code = standing.wait()
    if not given.flag("keep"):
        delete(options, roots, known.find(roots, container_id), force=True)
    return code


def _refuse_descriptors(count: str) -> None:
    if count not in ("", "0"):
        raise UnsupportedError(
            f"'--preserve-fds {count}' is not supported: open files cannot be passed into a virtual machine"
        )


def _require_free(roots: Roots, container_id: str) -> None:
    if os.path.lexists(f"{roots.by_container_dir}/{container_id}"):
        raise AlreadyExistsError("container with given ID already exists")


def create(
    options: Options,
    roots: Roots,
    plan: Plan,
    *,
    console_socket: str,
    pid_file: str,
    foreground: bool = False,
) -> standins.Standing:
    """Make the container; answers its stand-in.  If it fails nothing is left."""
    from vmsandbox.cli.runtime.main import warn

    made = cgroups.make(plan.cgroups)
    hooked = any(plan.hooks.values())
    try:
        sandbox = plan.sandbox if plan.member else _started(options, roots, plan, made.places)
        with launch.connect_or_take_over(roots, sandbox) as sock:
            standing = standins.fork(
                roots,
                sandbox,
                standin.Plan(
                    plan.id,
                    stdin=True,
                    stdout=True,
                    terminal=plan.terminal,
                    root=plan.standin_root(),
                    command=standins.shown(plan.process.get("args")),
                    cgroups=made.places,
                ),
                netns=plan.netns,
                console_socket=console_socket,
                size=standins.console_size(plan.process),
                orphan=not foreground,
            )
            try:
                if hooked:
                    standing.await_ready()
                for name in ("prestart", "createRuntime"):
                    hooks.run(plan.hooks[name], name, plan.state(standing.pid))
                hooks.run_inside(plan.hooks["createContainer"], "createContainer", plan.state(standing.pid))
                warn(options, client.request(sock, _request(plan, standing, made, foreground=foreground)))
                standing.announce(pid_file)
            except BaseException as error:
                standing.end()
                _undo(options, roots, plan, sock, sandbox, hooked=hooked)
                if isinstance(error, SandboxError):
                    raise known.worded(error, plan.process.get("args")) from error
                raise
    except BaseException:
        cgroups.remove(reversed(made.places), reversed(made.above))
        raise
    return standing


def _started(options: Options, roots: Roots, plan: Plan, places: list[str]) -> SandboxPaths:
    """Start the supervisor of a new pod, in the cgroup where everything of its machine will be."""
    sandbox = launch.make_run_directory(roots, plan.pod)
    try:
        with launch.locked(sandbox), launch.listen(sandbox) as listener:
            arguments = options.supervisor_arguments()
            launch.spawn_supervisor(roots, sandbox, listener, arguments=arguments, nursed=True, cgroups=places)
    except BaseException:
        remains.remove_tree(sandbox.dir)
        raise
    return sandbox


def _request(plan: Plan, standing: standins.Standing, made: cgroups.Made, *, foreground: bool) -> dict[str, Any]:
    return {
        "verb": "create-bundle",
        "id": plan.id,
        "bundle": plan.bundle,
        "pod": plan.pod,
        # The stand-in is in it, whether it was made for it or joined.
        "netns": f"/proc/{standing.pid}/ns/net" if not plan.netns else os.path.abspath(plan.netns),
        "standin": standing.document(),
        "cgroups": made.places,
        "cgroups_above": made.above,
        "size": standins.window_size(plan.process, foreground=foreground),
    }


def _undo(
    options: Options,
    roots: Roots,
    plan: Plan,
    sock: Any,  # noqa: ANN401
    sandbox: SandboxPaths,
    *,
    hooked: bool,
) -> None:
    """Leave nothing of a container that could not be made; with `hooked`, hooks have begun to make something for it."""
    from vmsandbox.cli.runtime.main import report

    if os.path.lexists(f"{roots.by_container_dir}/{plan.id}"):
        try:
            delete(options, roots, known.find(roots, plan.id), force=True)
            hooked = False  # what is made is undone with it
        except SandboxError as error:
            report(
                options,
                f"container {plan.id} could not be removed: {error}: try 'delete --force {plan.id}'",
                level="warning",
            )
    if not plan.member:
        sock.shutdown(1)
        client.wait_for_end(sock)
        _sweep(sandbox)
    if hooked:
        _run_quietly(options, plan.poststop, "poststop", plan.state(0, status="stopped"))


def _run_quietly(options: Options, what: list[dict[str, Any]], name: str, state: dict[str, Any]) -> None:
    """Run hooks whose failure changes nothing any more; it is only reported."""
    from vmsandbox.cli.runtime.main import report

    for failed in hooks.run_all(what, name, state):
        report(options, str(failed), level="warning")


def _sweep(sandbox: SandboxPaths) -> None:
    """Remove what a supervisor left that never had a pod."""
    if os.path.isdir(sandbox.dir):
        with launch.locked(sandbox):
            if not os.path.exists(sandbox.document_file):
                remains.forget_sandbox_if_empty(sandbox)


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
    _run_quietly(options, poststart, "poststart", known.state(container, status="running"))


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
    _run_quietly(options, poststop, "poststop", told)


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
