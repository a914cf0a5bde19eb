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
UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50}


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
    for name in REFUSED:
        if given.text(name) not in ("", "0"):
            raise UnsupportedError(f"'--{name}' is not supported: the guest's kernel cannot apply it")
    roots = options.roots()
    container = known.find(roots, known.one(given.positional))
    resources: dict[str, Any] = {}
    if given.text("resources"):
        # As with runc, other options mean nothing then.
        resources = known.read_document(given.text("resources"), what="resources")
    else:
        for name, (part, member) in NUMBERS.items():
            if given.text(name):
                resources.setdefault(part, {})[member] = _number(name, given.text(name))
        for name, (part, member) in TEXTS.items():
            if given.text(name):
                resources.setdefault(part, {})[member] = given.text(name)
    known.ask(roots, container, {"verb": "update-resources", "resources": resources}, stopped="container not running")
    return 0


def _number(option: str, text: str) -> int:
    """A whole number; one of bytes may have a unit and, with it, a fraction: ``1.5g``, ``64MiB``."""
    wrong = InvalidArgumentError(f"invalid value for {option}: '{text[:32]}'")
    if option.startswith("memory") and text != "-1":
        digits = text.lower().removesuffix("b").removesuffix("i")
        unit = digits[-1:] if digits[-1:] in UNITS else ""
        whole, point, fraction = digits.removesuffix(unit).removesuffix(" ").partition(".")
        if not _is_number(whole) or (point and not _is_number(fraction)):
            raise wrong
        return int(whole) * UNITS[unit] + int(fraction or "0") * UNITS[unit] // int("1" + "0" * len(fraction))
    if not _is_number(text.removeprefix("-")):
        raise wrong
    return int(text)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 18
