"""`create` and `run`: a container is made of a bundle, or nothing is left of it.

Its stand-in comes before itself, since hooks on the host are told a pid while the container is being made.
"""

from __future__ import annotations

import os

from vmsandbox import cgroups, lent, remains
from vmsandbox.cli import client, launch, standin
from vmsandbox.cli.runtime import hooks, known, standins
from vmsandbox.cli.runtime.known import entries, part
from vmsandbox.cli.runtime.options import FLAG, SHORT, VALUE, parse
from vmsandbox.errors import (
    AlreadyExistsError,
    InvalidBundleError,
    InvalidStateError,
    NotFoundError,
    SandboxError,
    UnsupportedError,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmsandbox import records
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
    from vmsandbox.cli.runtime import lifecycle

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
        lifecycle.start(options, roots, known.find(roots, container_id))
    except BaseException:
        lifecycle.delete(options, roots, known.find(roots, container_id), force=True)
        raise
    if detached:
        return 0
    code = standing.wait()
    if not given.flag("keep"):
        lifecycle.delete(options, roots, known.find(roots, container_id), force=True)
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
    from vmsandbox.cli.runtime import lifecycle
    from vmsandbox.cli.runtime.main import report

    if os.path.lexists(f"{roots.by_container_dir}/{plan.id}"):
        try:
            lifecycle.delete(options, roots, known.find(roots, plan.id), force=True)
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
        hooks.run_quietly(options, plan.poststop, "poststop", plan.state(0, status="stopped"))


def _sweep(sandbox: SandboxPaths) -> None:
    """Remove what a supervisor left that never had a pod."""
    if os.path.isdir(sandbox.dir):
        with launch.locked(sandbox):
            if not os.path.exists(sandbox.document_file):
                remains.forget_sandbox_if_empty(sandbox)
