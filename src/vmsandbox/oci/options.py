"""What a user asks of a container or of an exec, as typed and checked values.

Clients send options as one JSON object whose members are named like the fields here and hold what the user typed
(`{"memory": "512m", "volumes": ["./src:/src:ro"]}`); `run_options` and `exec_options` turn it into values or refuse
it with an error that names the option.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from vmsandbox.errors import InvalidArgumentError
from vmsandbox.oci import signals, texts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vmsandbox.oci.texts import Disk, Tmpfs, Ulimit, Volume

#: option as typed -> field that holds it in bytes
_TYPED = {"memory": "memory_bytes", "shm_size": "shm_bytes"}
#: docker's lower bound: below it not even a shell starts
LEAST_MEMORY = 6 * 2**20
#: no honest command line is larger
MOST_TEXTS = 100_000


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device node of the guest, offered to the container."""

    path: str
    #: "b" or "c"
    type: str
    major: int
    minor: int
    mode: int = 0o660
    uid: int = 0
    gid: int = 0
    #: of "rwm"
    access: str = "rwm"


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What the user asks of a container; absent values leave the choice to the image or the configuration."""

    args: tuple[str, ...] = ()
    #: replaces the image's entrypoint and drops its command; empty: none; None: the image's
    entrypoint: tuple[str, ...] | None = None
    #: ``KEY=VALUE``, or ``KEY`` for the client's value
    env: tuple[str, ...] = ()
    client_env: Mapping[str, str] = field(default_factory=dict)
    workdir: str = ""
    user: str = ""
    groups: tuple[int, ...] = ()
    tty: bool = False
    hostname: str = ""
    domainname: str = ""
    read_only: bool = False
    tmpfs: tuple[Tmpfs, ...] = ()
    volumes: tuple[Volume, ...] = ()
    disks: tuple[Disk, ...] = ()
    memory_bytes: int | None = None
    #: 0: no limit
    cpus: float | None = None
    #: 0: the kernel's own
    cpu_shares: int | None = None
    cpuset_cpus: str = ""
    #: 0: no limit; None: the configured one
    pids_limit: int | None = None
    shm_bytes: int | None = None
    oom_score_adj: int = 0
    ulimits: tuple[Ulimit, ...] = ()
    sysctls: Mapping[str, str] = field(default_factory=dict)
    cap_add: tuple[str, ...] = ()
    cap_drop: tuple[str, ...] = ()
    privileged: bool = False
    #: None: the configured one
    no_new_privileges: bool | None = None
    #: "default", "unconfined" or a path; empty: the configured one
    seccomp: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    #: number; None: the image's
    stop_signal: int | None = None


@dataclass(frozen=True, kw_only=True)
class ExecOptions:
    """What the user asks of a further process in a container."""

    args: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    client_env: Mapping[str, str] = field(default_factory=dict)
    workdir: str = ""
    user: str = ""
    tty: bool = False
    privileged: bool = False


def run_options(document: Mapping[str, object], *, cwd: str = "/") -> RunOptions:
    """Options of a container from what a client sent; relative sources of volumes are below `cwd`.

    Besides the fields of `RunOptions`, ``memory`` and ``shm_size`` take sizes as text, ``mounts`` takes ``--mount``
    texts (joined with ``volumes`` and ``tmpfs``), and labels and sysctls may be lists of ``KEY=VALUE``.
    Raises InvalidArgumentError or UnsupportedError.
    """
    values = dict(document)
    for typed, name in _TYPED.items():
        if typed in values:
            values[name] = values.pop(typed)
    mounts = [texts.mount(text, cwd=cwd) for text in _texts(values.pop("mounts", ()), "mounts")]
    taken: dict[str, Any] = _taken(RunOptions, values)
    volumes = [texts.volume(text, cwd=cwd) for text in taken.get("volumes", ())]
    tmpfs = [texts.tmpfs(text) for text in taken.get("tmpfs", ())]
    taken["volumes"] = (*volumes, *(mount for mount in mounts if isinstance(mount, texts.Volume)))
    taken["tmpfs"] = (*tmpfs, *(mount for mount in mounts if isinstance(mount, texts.Tmpfs)))
    taken["disks"] = tuple(texts.disk(text, cwd=cwd) for text in taken.get("disks", ()))
    taken["ulimits"] = tuple(texts.ulimit(text) for text in taken.get("ulimits", ()))
    options = RunOptions(**taken)
    _check(options)
    return options


def exec_options(document: Mapping[str, object]) -> ExecOptions:
    """Options of an exec from what a client sent.  Raises InvalidArgumentError."""
    options = ExecOptions(**_taken(ExecOptions, document))
    texts.user(options.user)
    _check_workdir(options.workdir)
    _check_args(options.args)
    if not options.args:
        raise InvalidArgumentError("no command to execute: give one after the container's name")
    return options


def _taken(cls: type, document: Mapping[str, object]) -> dict[str, Any]:
    known = [each.name for each in fields(cls)]
    for name in document:
        if name not in known:
            import difflib

            typed = [*(each for each in known if each not in _TYPED.values()), *_TYPED, "mounts"]
            near = difflib.get_close_matches(str(name), typed, n=1)
            raise InvalidArgumentError(f"unknown option '{name}'" + (f": did you mean '{near[0]}'?" if near else ""))
    return {name: _READERS[name](value, name) for name, value in document.items() if value is not None}


def _check(options: RunOptions) -> None:
    texts.user(options.user)
    _check_workdir(options.workdir)
    _check_args((*options.args, *(options.entrypoint or ())))
    paths = [disk.path for disk in options.disks]
    for path in paths:
        if paths.count(path) > 1:
            raise InvalidArgumentError(f"two devices claim the path '{path}': give each one of its own")
    if options.memory_bytes is not None and options.memory_bytes < LEAST_MEMORY:
        raise InvalidArgumentError(f"memory '{options.memory_bytes}' is too little: give at least '6m'")
    if options.shm_bytes is not None and options.shm_bytes < 4096:
        raise InvalidArgumentError(f"shm_size '{options.shm_bytes}' is too little: give at least '4k'")
    if options.cpus and not (math.isfinite(options.cpus) and 0.01 <= options.cpus <= 1024):
        raise InvalidArgumentError(f"cpus '{options.cpus}' is out of range: give 0.01 to 1024, or 0 for no limit")
    if options.cpu_shares != 0:
        _bounded("cpu_shares", options.cpu_shares, 2, 262_144)
    _bounded("pids_limit", options.pids_limit, -1, 4_194_304)
    _bounded("oom_score_adj", options.oom_score_adj, -1000, 1000)
    if options.cpuset_cpus and not re.fullmatch(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*", options.cpuset_cpus):
        raise InvalidArgumentError(f"cpuset_cpus '{options.cpuset_cpus}' is not understood: write for example '0-2,4'")
    for what, name in (("hostname", options.hostname), ("domainname", options.domainname)):
        if name and not re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,62}[A-Za-z0-9_])?", name):
            raise InvalidArgumentError(
                f"{what} '{name}' is not valid: use letters, digits, '.', '-' and '_', at most 64"
            )
    for name in options.sysctls:
        if not re.fullmatch(r"[a-z0-9_]+([./][A-Za-z0-9_-]+)+", name):
            raise InvalidArgumentError(f"sysctl '{name}' is no name of one: write for example 'net.core.somaxconn'")


def _check_workdir(workdir: str) -> None:
    if workdir and (not workdir.startswith("/") or "\0" in workdir):
        raise InvalidArgumentError(f"working directory '{workdir}' has to be an absolute path")


def _check_args(args: tuple[str, ...]) -> None:
    for text in args:
        if "\0" in text:
            raise InvalidArgumentError(f"argument '{text}' contains a zero byte")


def _bounded(name: str, value: int | None, low: int, high: int) -> None:
    if value is not None and not low <= value <= high:
        raise InvalidArgumentError(f"{name} '{value}' is out of range: give {low} to {high}")


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise InvalidArgumentError(f"option '{name}' has to be a text")
    return value


def _texts(value: object, name: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or len(value) > MOST_TEXTS:
        raise InvalidArgumentError(f"option '{name}' has to be a list of texts")
    return tuple(_text(item, name) for item in value)


def _flag(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise InvalidArgumentError(f"option '{name}' has to be true or false")
    return value


def _number(value: object, name: str) -> int:
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,18}", value):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidArgumentError(f"option '{name}' is '{value}' but has to be a whole number")
    return value


def _decimal(value: object, name: str) -> float:
    if isinstance(value, str) and re.fullmatch(r"[0-9]{0,9}\.?[0-9]{1,9}", value):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e9:
        raise InvalidArgumentError(f"option '{name}' is '{value}' but has to be a number")
    return float(value)


def _size(value: object, name: str) -> int:
    what = next(typed for typed, each in _TYPED.items() if each == name)
    return texts.size(value, what) if isinstance(value, str) else _number(value, what)


def _numbers(value: object, name: str) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or len(value) > 65_536:
        raise InvalidArgumentError(f"option '{name}' has to be a list of numbers")
    numbers = tuple(_number(item, name) for item in value)
    for number in numbers:
        _bounded(name, number, 0, 2**31 - 1)
    return numbers


def _mapping(value: object, name: str) -> dict[str, str]:
    if isinstance(value, list | tuple):
        pairs = [text.partition("=") for text in _texts(value, name)]
        for key, _, _ in pairs:
            if not key:
                raise InvalidArgumentError(f"option '{name}' has an entry without a name")
        return {key: content for key, _, content in pairs}
    if not isinstance(value, dict):
        raise InvalidArgumentError(f"option '{name}' has to map names to texts")
    return {_text(key, name): _text(content, name) for key, content in value.items()}


def _signal(value: object, name: str) -> int:
    return signals.parse(str(_number(value, name)) if isinstance(value, int) else _text(value, name))


_READERS: dict[str, Callable[[object, str], object]] = {
    "args": _texts,
    "entrypoint": _texts,
    "env": _texts,
    "client_env": _mapping,
    "workdir": _text,
    "user": _text,
    "groups": _numbers,
    "tty": _flag,
    "hostname": _text,
    "domainname": _text,
    "read_only": _flag,
    "tmpfs": _texts,
    "volumes": _texts,
    "disks": _texts,
    "memory_bytes": _size,
    "cpus": _decimal,
    "cpu_shares": _number,
    "cpuset_cpus": _text,
    "pids_limit": _number,
    "shm_bytes": _size,
    "oom_score_adj": _number,
    "ulimits": _texts,
    "sysctls": _mapping,
    "cap_add": _texts,
    "cap_drop": _texts,
    "privileged": _flag,
    "no_new_privileges": _flag,
    "seccomp": _text,
    "labels": _mapping,
    "stop_signal": _signal,
}
