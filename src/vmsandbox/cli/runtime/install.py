"""`install` and `uninstall`: make an engine know this runtime, and forget it again.

What the user has in the engine's configuration stays as it is, byte for byte where the format allows it: podman gets a
drop-in of ours, containerd a marked block at the end of its file; docker's JSON has neither drop-ins nor comments, so
the file as it was is kept beside it.  Nothing is written that is not complete and readable again.
"""

from __future__ import annotations

import json
import os
import sys

from vmsandbox.cli.runtime.options import FLAG, VALUE, parse
from vmsandbox.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError, SandboxError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vmsandbox.cli.runtime.main import Options

    Add = Callable[[str, str | None, str], list["Change"]]
    Remove = Callable[[str, str | None], list["Change"]]

NAME = "vmsandbox"
PROGRAM = "vmsandbox-runtime"
MAX_BYTES = 4 * 1024 * 1024
BEGIN = "# vmsandbox-runtime install: begin"
END = "# vmsandbox-runtime install: end"
PODMAN_DROP_IN = "/etc/containers/containers.conf.d/vmsandbox.conf"
#: what podman reads before drop-ins; the last that says something wins
PODMAN_FILES = ("/usr/share/containers/containers.conf", "/etc/containers/containers.conf")
DOCKER_FILE = "/etc/docker/daemon.json"
CONTAINERD_FILE = "/etc/containerd/config.toml"
#: podman's own list of runtimes that log in JSON, which a drop-in replaces
JSON_RUNTIMES = ["crun", "runc", "kata", "runsc", "krun"]
CGROUP_DRIVER = "native.cgroupdriver="
#: where containerd's CRI plugin looks for runtimes, by the version of its configuration
CRI = {
    1: "plugins.cri",
    2: 'plugins."io.containerd.grpc.v1.cri"',
    3: 'plugins."io.containerd.cri.v1.runtime"',
}


class Change:
    """What a file is to be, and what to tell the user; `after` is None for a file that is to go."""

    __slots__ = ("after", "before", "notes", "path")

    def __init__(self, path: str, before: str | None, after: str | None, notes: list[str] | None = None) -> None:
        self.path = path
        self.before = before
        self.after = after
        self.notes = notes or []


def install_verb(_options: Options, argv: list[str]) -> int:
    return _run(argv, "install")


def uninstall_verb(_options: Options, argv: list[str]) -> int:
    return _run(argv, "uninstall")


def _run(argv: list[str], verb: str) -> int:
    given = parse(argv, {"dry-run": FLAG, "file": VALUE, "binary": VALUE})
    if len(given.positional) != 1 or given.positional[0] not in ENGINES:
        raise InvalidArgumentError(f"{verb} needs the name of an engine: {', '.join(sorted(ENGINES))}")
    engine = given.positional[0]
    add, remove, default, told, forgotten = ENGINES[engine]
    hint = told if verb == "install" else forgotten
    path = os.path.realpath(given.text("file") or default)
    before = _read(path)
    changes = add(path, before, _binary(given.text("binary"))) if verb == "install" else remove(path, before)
    notes = [note for change in changes for note in change.notes]
    changes = [change for change in changes if change.before != change.after]
    for change in changes:
        if given.flag("dry-run"):
            print(_difference(change), end="")
        else:
            _write(change)
            print(f"{'wrote' if change.after is not None else 'removed'} {change.path}")
    if not changes:
        print(f"nothing to change in {path}")
    elif not given.flag("dry-run") and hint:
        notes.append(hint)
    for note in notes:
        print(note)
    return 0


def _binary(given: str) -> str:
    """The absolute path that the engine is to call: what was called now, unless it is said."""
    path = given or sys.argv[0]
    if "/" not in path or not os.access(path, os.X_OK):
        found = [f"{place}/{PROGRAM}" for place in os.environ.get("PATH", os.defpath).split(":") if place]
        path = "" if given else next((each for each in found if os.access(each, os.X_OK)), "")
    if not path:
        raise NotFoundError(f"'{given or PROGRAM}' is not a program that can be run: name it with '--binary PATH'")
    path = os.path.abspath(path)
    if not path.isprintable() or '"' in path or "\\" in path:
        raise InvalidArgumentError(f"'{path}' cannot be written into configuration files: choose a plainer path")
    return path


# ---------------------------------------------------------------- podman


def _add_podman(path: str, before: str | None, binary: str) -> list[Change]:
    lists, manager = JSON_RUNTIMES, ""
    for file in PODMAN_FILES:
        engine = _toml(file, _read(file)).get("engine") or {}
        lists = engine.get("runtime_supports_json") or lists
        manager = engine.get("cgroup_manager") or manager
    lines = [
        "# Written by 'vmsandbox-runtime install podman'; 'vmsandbox-runtime uninstall podman' removes it.",
        "[engine]",
        f"runtime_supports_json = {json.dumps([*(each for each in lists if each != NAME), NAME])}",
    ]
    notes = []
    if not manager:
        lines.append('cgroup_manager = "cgroupfs"')
        notes.append("podman uses the cgroup manager 'cgroupfs' from now on, as this runtime needs it")
    elif manager != "cgroupfs":
        notes.append(f"podman is configured for '{manager}': run it with '--cgroup-manager cgroupfs' for this runtime")
    lines += ["[engine.runtimes]", f'{NAME} = ["{binary}"]', ""]
    return [Change(path, before, "\n".join(lines), notes)]


def _remove_podman(path: str, before: str | None) -> list[Change]:
    if before is not None and not before.startswith("# Written by 'vmsandbox-runtime install podman'"):
        raise InvalidArgumentError(f"'{path}' was not written by 'install': remove it yourself if it is not needed")
    return [Change(path, before, None)]


# ---------------------------------------------------------------- docker


def _add_docker(path: str, before: str | None, binary: str) -> list[Change]:
    kept = path + ".before-vmsandbox"
    document = _json(path, before)
    wanted, notes = _with_runtime(path, document, binary)
    if wanted == document:
        return [Change(path, before, before, notes)]
    backup = _read(kept)
    changes = [Change(path, before, json.dumps(wanted, indent=2) + "\n", notes)]
    if NAME not in (document.get("runtimes") or {}):
        # An older copy is of no use any more: it does not know what was changed since.
        changes.insert(0, Change(kept, backup, before or ""))
    return changes


def _with_runtime(path: str, document: dict[str, Any], binary: str) -> tuple[dict[str, Any], list[str]]:
    runtimes, options = document.get("runtimes") or {}, document.get("exec-opts") or []
    if not isinstance(runtimes, dict) or not isinstance(options, list):
        raise InvalidArgumentError(f"'{path}' is not a configuration of docker: 'runtimes' or 'exec-opts' is wrong")
    wanted = {**document, "runtimes": {**runtimes, NAME: {"path": binary}}}
    drivers = [option for option in options if str(option).startswith(CGROUP_DRIVER)]
    if not drivers:
        wanted["exec-opts"] = [*options, f"{CGROUP_DRIVER}cgroupfs"]
    elif drivers[-1] != f"{CGROUP_DRIVER}cgroupfs":
        return wanted, [f"docker is configured for '{drivers[-1]}': this runtime needs '{CGROUP_DRIVER}cgroupfs'"]
    return wanted, []


def _remove_docker(path: str, before: str | None) -> list[Change]:
    kept = path + ".before-vmsandbox"
    backup, document = _read(kept), _json(path, before)
    entry = (document.get("runtimes") or {}).get(NAME)
    changes = [Change(kept, backup, None)]
    if entry is None:
        return [Change(path, before, before), *changes]
    original = _json(kept, backup)
    if backup is not None and _with_runtime(path, original, str(entry.get("path")))[0] == document:
        # Nobody changed anything else since: it is as it was, to the byte.
        return [Change(path, before, backup or None), *changes]
    document = {**document, "runtimes": {name: each for name, each in document["runtimes"].items() if name != NAME}}
    if not document["runtimes"]:
        del document["runtimes"]
    added = f"{CGROUP_DRIVER}cgroupfs"
    if backup is not None and added not in (original.get("exec-opts") or []):
        document["exec-opts"] = [option for option in document.get("exec-opts") or [] if option != added]
        if not document["exec-opts"]:
            del document["exec-opts"]
    return [Change(path, before, json.dumps(document, indent=2) + "\n"), *changes]


# ---------------------------------------------------------------- containerd


def _add_containerd(path: str, before: str | None, binary: str) -> list[Change]:
    text = before if before is not None else f"{BEGIN}, and this file\nversion = 2\n{END}\n"
    text = _without_block(text, keep_file=True)
    document = _toml(path, text)
    version = document.get("version", 1)
    if version not in CRI:
        raise InvalidArgumentError(f"'{path}' has version '{version}', which is not known: 1, 2 and 3 are")
    table = f"{CRI[version]}.containerd.runtimes.{NAME}"
    block = [
        BEGIN,
        f"[{table}]",
        '  runtime_type = "io.containerd.runc.v2"',
        f"  [{table}.options]",
        f'    BinaryName = "{binary}"',
        "    SystemdCgroup = false",
        END,
        "",
    ]
    gap = "" if text.endswith("\n") or not text else "\n"
    after = text + gap + "\n".join(block)
    try:
        _toml(path, after)
    except InvalidArgumentError:
        raise AlreadyExistsError(
            f"'{path}' configures a runtime '{NAME}' already, or its CRI plugin in one line: add [{table}] yourself"
        ) from None
    return [Change(path, before, after)]


def _remove_containerd(path: str, before: str | None) -> list[Change]:
    after = None if before is None else _without_block(before, keep_file=False)
    return [Change(path, before, after or None if before else before)]


def _without_block(text: str, *, keep_file: bool) -> str:
    """The text without what `install` added; with `keep_file` what made the file is no part of that."""
    kept, inside = [], False
    for line in text.splitlines(keepends=True):
        if line.startswith(BEGIN) and not (keep_file and "this file" in line):
            inside = True
        elif inside:
            inside = not line.startswith(END)
        else:
            kept.append(line)
    return "".join(kept)


# ---------------------------------------------------------------- files


def _read(path: str) -> str | None:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SandboxError(f"cannot read '{path}': {(error.strerror or '').lower()}") from error
    if len(data) > MAX_BYTES:
        raise InvalidArgumentError(f"'{path}' is larger than {MAX_BYTES} bytes: it is not touched")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise InvalidArgumentError(f"'{path}' is not UTF-8: it is not touched") from None


def _json(path: str, text: str | None) -> dict[str, Any]:
    try:
        document = json.loads(text) if text and text.strip() else {}
    except (ValueError, RecursionError):
        raise InvalidArgumentError(f"'{path}' is not valid JSON: mend it first") from None
    if not isinstance(document, dict):
        raise InvalidArgumentError(f"'{path}' is not a JSON object: mend it first")
    return document


def _toml(path: str, text: str | None) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(text or "")
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"'{path}' is not valid TOML: {error}") from None


def _difference(change: Change) -> str:
    import difflib

    before, after = (text.splitlines(keepends=True) if text else [] for text in (change.before, change.after))
    return "".join(difflib.unified_diff(before, after, change.path, change.path if change.after else os.devnull))


def _write(change: Change) -> None:
    """Replace or remove a file at once; its owner and mode stay."""
    try:
        if change.after is None:
            os.unlink(change.path)
            return
        os.makedirs(os.path.dirname(change.path), mode=0o755, exist_ok=True)
        temporary = f"{change.path}.{os.getpid()}.tmp"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            with open(fd, "w", encoding="utf-8", newline="") as file:
                if os.path.exists(change.path):
                    like = os.stat(change.path)
                    os.fchown(fd, like.st_uid, like.st_gid)
                    os.fchmod(fd, like.st_mode & 0o7777)
                file.write(change.after)
                file.flush()
                os.fsync(fd)
            os.rename(temporary, change.path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise SandboxError(f"cannot write '{change.path}': {(error.strerror or '').lower()}") from error


RESTART = "containerd reads it when it is restarted: 'systemctl restart containerd'"
#: engine -> how it is told, how that is undone, its file, and what makes it take the one and the other to heart
ENGINES: dict[str, tuple[Add, Remove, str, str, str]] = {
    "podman": (_add_podman, _remove_podman, PODMAN_DROP_IN, "", ""),
    "docker": (
        _add_docker,
        _remove_docker,
        DOCKER_FILE,
        "dockerd reads it on SIGHUP: 'systemctl reload docker'",
        "dockerd forgets it when it is restarted: 'systemctl restart docker'",
    ),
    "containerd": (_add_containerd, _remove_containerd, CONTAINERD_FILE, RESTART, RESTART),
}
