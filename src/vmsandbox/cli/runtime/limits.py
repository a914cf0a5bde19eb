"""`pause`, `resume` and `update`: a container that goes on with other limits, or does not for a while."""

from __future__ import annotations

from vmsandbox.cli.runtime import known
from vmsandbox.cli.runtime.options import VALUE, parse
from vmsandbox.errors import InvalidArgumentError, InvalidStateError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmsandbox.cli.runtime.main import Options

#: option -> (part, member) of LinuxResources
NUMBERS = {
    "blkio-weight": ("blockIO", "weight"),
    "cpu-period": ("cpu", "period"),
    "cpu-quota": ("cpu", "quota"),
    "cpu-share": ("cpu", "shares"),
    "cpu-burst": ("cpu", "burst"),
    "cpu-idle": ("cpu", "idle"),
    "memory": ("memory", "limit"),
    "memory-reservation": ("memory", "reservation"),
    "memory-swap": ("memory", "swap"),
    "pids-limit": ("pids", "limit"),
}
TEXTS = {"cpuset-cpus": ("cpu", "cpus"), "cpuset-mems": ("cpu", "mems")}
REFUSED = ("cpu-rt-period", "cpu-rt-runtime", "kernel-memory", "kernel-memory-tcp", "l3-cache-schema", "mem-bw-schema")
UNITS = {"b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def pause_verb(options: Options, argv: list[str]) -> int:
    return _change(options, argv, "pause", into="paused")


def resume_verb(options: Options, argv: list[str]) -> int:
    return _change(options, argv, "resume", into="running")


def _change(options: Options, argv: list[str], verb: str, *, into: str) -> int:
    given = parse(argv, {})
    roots = options.roots()
    container = known.find(roots, known.one(given.positional))
    wanted = {"pause": "container not running", "resume": "container not paused"}[verb]
    try:
        known.ask(roots, container, {"verb": verb}, stopped=wanted, reached=lambda each: each.status() == into)
    except InvalidStateError:
        raise known.StoppedError(wanted) from None
    return 0


def update_verb(options: Options, argv: list[str]) -> int:
    names = {**dict.fromkeys((*NUMBERS, *REFUSED, *TEXTS), VALUE), "resources": VALUE}
    given = parse(argv, names, short={"r": "resources"})
    roots = options.roots()
    container = known.find(roots, known.one(given.positional))
    for name in REFUSED:
        if given.text(name) not in ("", "0"):
            raise UnsupportedError(f"'--{name}' is not supported: the guest's kernel cannot apply it")
    resources: dict[str, Any] = {}
    if given.given("resources"):
        resources = known.read_document(given.text("resources"), what="resources")
    for name, (part, member) in NUMBERS.items():
        if given.text(name):
            resources.setdefault(part, {})[member] = _number(name, given.text(name))
    for name, (part, member) in TEXTS.items():
        if given.text(name):
            resources.setdefault(part, {})[member] = given.text(name)
    if not resources:
        raise InvalidArgumentError("nothing to update: give '--resources' or a limit")
    known.ask(roots, container, {"verb": "update-resources", "resources": resources}, stopped="container not running")
    return 0


def _number(option: str, text: str) -> int:
    sign, digits = (-1, text[1:]) if text.startswith("-") else (1, text)
    factor = 1
    if option.startswith("memory") and digits[-1:].lower() in UNITS:
        factor, digits = UNITS[digits[-1].lower()], digits[:-1]
    if not digits.isascii() or not digits.isdigit() or len(digits) > 18:
        raise InvalidArgumentError(f"invalid value for {option}: '{text[:32]}'")
    return sign * int(digits) * factor
