"""Seccomp: from a profile in docker's format to the section of a runtime spec.

A profile has rules that depend on the container's capabilities; what remains of them here is for x86-64 with its
32-bit programs.  x32 is left out: libseccomp then kills a program that uses it, and compiling the filter, which
happens in the guest for every container, costs a third less.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vmsandbox
from vmsandbox.errors import InvalidArgumentError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Sequence

DEFAULT = "default"
MOST_BYTES = 4 * 1024 * 1024
#: names under which docker's profiles know this architecture
_ARCH = ("amd64", "x86_64")
_ARCHITECTURES = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]
#: kernels older than this are not booted: `minKernel` up to it is fulfilled
_KERNEL = (5, 10)
_ACTIONS = frozenset(
    [
        "SCMP_ACT_ALLOW",
        "SCMP_ACT_ERRNO",
        "SCMP_ACT_KILL",
        "SCMP_ACT_KILL_PROCESS",
        "SCMP_ACT_KILL_THREAD",
        "SCMP_ACT_LOG",
        "SCMP_ACT_TRACE",
        "SCMP_ACT_TRAP",
    ]
)
_EPERM = 1
_OPERATORS = frozenset(f"SCMP_CMP_{name}" for name in ["NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"])


def section(profile: str, capabilities: Sequence[str]) -> dict[str, Any]:
    """``linux.seccomp`` for `profile` (``default`` or the path of a file) and a container's capabilities.

    Raises NotFoundError if the file does not exist and InvalidArgumentError if it is no profile.
    """
    path = default_file() if profile == DEFAULT else Path(profile)
    # By its time, too: a supervisor lives long, and a profile may be edited.
    try:
        stamp = path.stat().st_mtime_ns
    except FileNotFoundError:
        raise NotFoundError(f"seccomp profile '{profile}' does not exist") from None
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(f"cannot read seccomp profile '{profile}': {_reason(error)}") from error
    found: dict[str, Any] = json.loads(_section(path, stamp, tuple(capabilities)))
    return found


def default_file() -> Path:
    """The profile that belongs to this installation or checkout."""
    package = Path(vmsandbox.__file__).resolve().parent
    candidates = (package / "configs" / "seccomp.json", package.parents[1] / "configs" / "seccomp.json")
    for path in candidates:
        if path.is_file():
            return path
    raise NotFoundError(f"the installation is incomplete: '{candidates[0]}' is missing: reinstall vmsandbox")


@lru_cache(maxsize=16)
def _section(path: Path, stamp: int, capabilities: tuple[str, ...]) -> str:
    """The section as text, so that no two specs share an object."""
    return json.dumps(resolved(_read(path), capabilities, name=str(path)))


def _read(path: Path) -> object:
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise InvalidArgumentError(f"seccomp profile '{path}' is larger than {MOST_BYTES} bytes")
        return json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"cannot read seccomp profile '{path}': {_reason(error)}") from error


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text[:1].lower() + text[1:]


def resolved(profile: object, capabilities: Sequence[str], *, name: str = "profile") -> dict[str, Any]:
    """The section of a spec that a parsed profile amounts to.  Raises InvalidArgumentError naming the entry."""
    if not isinstance(profile, dict):
        raise InvalidArgumentError(f"seccomp profile '{name}' is not an object")
    document: dict[str, Any] = {"defaultAction": _action(profile.get("defaultAction"), name, "defaultAction")}
    if profile.get("defaultErrnoRet") is not None:
        document["defaultErrnoRet"] = _errno(profile["defaultErrnoRet"], name, "defaultErrnoRet")
    document["architectures"] = list(_ARCHITECTURES)
    plain: dict[tuple[str, int | None], dict[str, None]] = {}
    conditional: list[dict[str, Any]] = []
    rules = profile.get("syscalls") or []
    if not isinstance(rules, list):
        raise InvalidArgumentError(f"seccomp profile '{name}': 'syscalls' is not a list")
    for index, rule in enumerate(rules):
        where = f"syscalls[{index}]"
        if not isinstance(rule, dict):
            raise InvalidArgumentError(f"seccomp profile '{name}': '{where}' is not an object")
        if not _applies(rule, capabilities, name, where):
            continue
        names = _names(rule, name, where)
        action = _action(rule.get("action"), name, f"{where}.action")
        errno = None if rule.get("errnoRet") is None else _errno(rule["errnoRet"], name, f"{where}.errnoRet")
        arguments = _args(rule["args"], name, where) if rule.get("args") else []
        if _outcome(action, errno) == _outcome(document["defaultAction"], document.get("defaultErrnoRet")):
            continue  # libseccomp refuses a rule that says what the default says anyway
        if arguments:
            entry: dict[str, Any] = {"names": names, "action": action, "args": arguments}
            conditional.append(entry if errno is None else {**entry, "errnoRet": errno})
        else:
            plain.setdefault((action, errno), {}).update(dict.fromkeys(names))
    document["syscalls"] = [
        {"names": list(names), "action": action, **({} if errno is None else {"errnoRet": errno})}
        for (action, errno), names in plain.items()
        if names
    ] + conditional
    return document


def _outcome(action: str, errno: int | None) -> tuple[str, int | None]:
    return action, _EPERM if errno is None and action == "SCMP_ACT_ERRNO" else errno


def _applies(rule: dict[str, Any], capabilities: Sequence[str], name: str, where: str) -> bool:
    """A rule needs all the capabilities it includes and none of those it excludes."""
    includes, excludes = (_filter(rule.get(key), name, f"{where}.{key}") for key in ("includes", "excludes"))
    if not all(cap in capabilities for cap in includes["caps"]) or any(cap in capabilities for cap in excludes["caps"]):
        return False
    if includes["arches"] and not any(arch in _ARCH for arch in includes["arches"]):
        return False
    if any(arch in _ARCH for arch in excludes["arches"]):
        return False
    return all(_reached(version, name, where) for version in includes["minKernel"]) and not any(
        _reached(version, name, where) for version in excludes["minKernel"]
    )


def _filter(value: object, name: str, where: str) -> dict[str, list[str]]:
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise InvalidArgumentError(f"seccomp profile '{name}': '{where}' is not an object")
    found = {"caps": value.get("caps") or [], "arches": value.get("arches") or [], "minKernel": []}
    if value.get("minKernel"):
        found["minKernel"] = [value["minKernel"]]
    for key, texts in found.items():
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InvalidArgumentError(f"seccomp profile '{name}': '{where}.{key}' is not understood")
    return found


def _reached(version: str, name: str, where: str) -> bool:
    match = re.fullmatch(r"(\d{1,4})\.(\d{1,4})", version)
    if not match:
        raise InvalidArgumentError(f"seccomp profile '{name}': minKernel '{version}' of '{where}' is not understood")
    return (int(match[1]), int(match[2])) <= _KERNEL


def _names(rule: dict[str, Any], name: str, where: str) -> list[str]:
    names = rule.get("names") or ([rule["name"]] if rule.get("name") else [])
    if not isinstance(names, list) or not all(
        isinstance(each, str) and re.fullmatch(r"\w{1,64}", each) for each in names
    ):
        raise InvalidArgumentError(f"seccomp profile '{name}': '{where}.names' is not a list of system calls")
    return names


def _action(value: object, name: str, where: str) -> str:
    if not isinstance(value, str) or value not in _ACTIONS:
        raise InvalidArgumentError(f"seccomp profile '{name}': '{where}' is '{value}', which is no known action")
    return value


def _errno(value: object, name: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 4095:
        raise InvalidArgumentError(f"seccomp profile '{name}': '{where}' is '{value}', which is no error number")
    return value


def _args(value: object, name: str, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise InvalidArgumentError(f"seccomp profile '{name}': '{where}.args' is not a list")
    return [_arg(item, name, f"{where}.args[{index}]") for index, item in enumerate(value)]


def _arg(value: object, name: str, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or value.get("op") not in _OPERATORS:
        raise InvalidArgumentError(f"seccomp profile '{name}': '{where}' has no known operator")
    numbers = {key: value.get(key, 0) for key in ("index", "value", "valueTwo")}
    for key, number in numbers.items():
        highest = 5 if key == "index" else 2**64 - 1
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= highest:
            raise InvalidArgumentError(f"seccomp profile '{name}': '{where}.{key}' is '{number}', out of range")
    return {**numbers, "op": value["op"]}
