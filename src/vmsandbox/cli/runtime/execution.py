"""`exec`: another process in a container that runs."""

from __future__ import annotations

import os

from vmsandbox.cli import client, launch, standin
from vmsandbox.cli.runtime import known, standins
from vmsandbox.cli.runtime.options import FLAG, VALUE, VALUES, Parsed, parse
from vmsandbox.errors import InvalidArgumentError, SandboxError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmsandbox.cli.runtime.main import Options

KNOWN = {
    "process": VALUE,
    "console-socket": VALUE,
    "pid-file": VALUE,
    "cwd": VALUE,
    "env": VALUES,
    "tty": FLAG,
    "user": VALUE,
    "additional-gids": VALUES,
    "detach": FLAG,
    "no-new-privs": FLAG,
    "cap": VALUES,
    "preserve-fds": VALUE,
    "ignore-paused": FLAG,
    "apparmor": VALUE,
    "process-label": VALUE,
    "cgroup": VALUES,
}
REFUSED = {
    "preserve-fds": "open files cannot be passed into a virtual machine",
    "apparmor": "a profile of the host's kernel does not confine what runs on the guest's",
    "process-label": "a label of the host's kernel does not confine what runs on the guest's",
    "cgroup": "the container's cgroup is the guest's, and below it there are only those that the container makes",
}
SHORT = {"p": "process", "e": "env", "t": "tty", "u": "user", "g": "additional-gids", "d": "detach", "c": "cap"}


def exec_verb(options: Options, argv: list[str]) -> int:
    """Run a process; in the foreground the exit code is its own."""
    from vmsandbox.cli.runtime.main import warn

    # Options may follow the id, but what follows the program is the program's.
    given = parse(argv, KNOWN, short=SHORT, stop_after=2)
    if not given.positional:
        raise InvalidArgumentError("exec needs a container id")
    for name, why in REFUSED.items():
        if given.text(name) not in ("", "0"):
            raise UnsupportedError(f"'--{name}' is not supported: {why}")
    roots = options.roots()
    container = known.find(roots, given.positional[0])
    status = container.status()
    if status == "stopped":
        raise known.StoppedError("cannot exec in a stopped container")
    if status == "paused" and not given.flag("ignore-paused"):
        raise known.StoppedError("cannot exec in a paused container (use --ignore-paused to override)")
    process = _process(given, container.document.get("process") or {})
    terminal, detached = process.get("terminal") is True, given.flag("detach")
    console = given.text("console-socket")
    standins.check_console(terminal=terminal, console_socket=console, detached=detached)
    exec_id = os.urandom(16).hex()
    request = {
        "verb": "exec",
        "container": container.id,
        "exec": exec_id,
        "process": process,
        "tty": terminal,
        "size": standins.window_size(process, foreground=not detached),
        "ignore_paused": given.flag("ignore-paused"),
    }
    plan = standin.Plan(
        container.id,
        exec_id,
        stdin=True,
        stdout=True,
        terminal=terminal,
        command=standins.shown(process.get("args")),
        cgroups=container.document.get("cgroups") or [],
    )
    with launch.connect_or_take_over(roots, container.sandbox) as sock:
        standing = standins.fork(
            roots,
            container.sandbox,
            plan,
            netns=None,
            console_socket=console,
            size=standins.console_size(process),
            orphan=detached,
        )
        request["standin"] = standing.document()
        try:
            warn(options, client.request_once(roots, container.sandbox, sock, request))
            standing.announce(given.text("pid-file"))
        except SandboxError as error:
            standing.end()
            raise known.worded(error, process.get("args")) from error
    return 0 if detached else standing.wait()


def _process(given: Parsed, base: dict[str, Any]) -> dict[str, Any]:
    """The process object: of a file, or the container's own with what the options change."""
    if given.given("process"):
        return known.read_document(given.text("process"), what="process")
    if len(given.positional) < 2:
        raise InvalidArgumentError("exec needs a command or '--process'")
    process = {key: value for key, value in base.items() if key != "consoleSize"}
    process["args"] = given.positional[1:]
    process["terminal"] = given.flag("tty")
    process["env"] = [*(base.get("env") or []), *given.texts("env")]
    if given.text("cwd"):
        process["cwd"] = given.text("cwd")
    if given.flag("no-new-privs"):
        process["noNewPrivileges"] = True
    user = dict(base.get("user") or {})
    if given.text("user"):
        uid, colon, gid = given.text("user").partition(":")
        user["uid"] = _number(uid, "user")
        if colon:
            user["gid"] = _number(gid, "user")
    for text in given.texts("additional-gids"):
        user["additionalGids"] = [*(user.get("additionalGids") or []), _number(text, "additional-gids")]
    process["user"] = user
    if given.texts("cap"):
        process["capabilities"] = _with_capabilities(base.get("capabilities") or {}, given.texts("cap"))
    return process


def _with_capabilities(base: dict[str, Any], more: list[str]) -> dict[str, Any]:
    """Sets with more capabilities, as runc has them: a program of another user than root gets none by this alone.

    What is added is not inheritable, and only what is can be ambient.
    """
    sets = dict(base)
    inheritable = sets.get("inheritable") or []
    for kind in ("bounding", "effective", "permitted", "ambient"):
        added = [each for each in more if kind != "ambient" or each in inheritable]
        sets[kind] = [*dict.fromkeys([*(sets.get(kind) or []), *added])]
    return sets


def _number(text: str, option: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 10:
        raise InvalidArgumentError(f"'--{option}' needs numbers, not '{text[:64]}'")
    return int(text)
