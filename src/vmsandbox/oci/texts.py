"""The little languages of options: sizes, limits, volumes, mounts, users, variables.

They are understood here, on the supervisor's side, so that the thin client passes on what the user typed.  Every
function raises InvalidArgumentError that quotes the text it did not understand.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmsandbox.errors import InvalidArgumentError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: RLIM_INFINITY
UNLIMITED = 2**64 - 1
_UNITS = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40, "p": 2**50}
_ULIMITS = frozenset(
    [
        "as",
        "core",
        "cpu",
        "data",
        "fsize",
        "locks",
        "memlock",
        "msgqueue",
        "nice",
        "nofile",
        "nproc",
        "rss",
        "rtprio",
        "rttime",
        "sigpending",
        "stack",
    ]
)
_PRIVATE = ("rprivate", "private")
_PROPAGATING = ("rshared", "shared", "rslave", "slave")
_TMPFS_FLAGS = frozenset(
    [
        "ro",
        "rw",
        "exec",
        "noexec",
        "suid",
        "nosuid",
        "dev",
        "nodev",
        "sync",
        "async",
        "atime",
        "noatime",
        "diratime",
        "nodiratime",
        "relatime",
        "norelatime",
        "strictatime",
        "nostrictatime",
        "mand",
        "nomand",
    ]
)
_TMPFS_VALUES = re.compile(
    r"(size|nr_blocks|nr_inodes)=[0-9]+[kKmMgG%]?|mode=[0-7]{1,4}|(uid|gid)=[0-9]{1,10}|mpol=[\w:,=-]+"
)


@dataclass(frozen=True, kw_only=True)
class Ulimit:
    """A resource limit under its POSIX name, e.g. ``RLIMIT_NOFILE``."""

    type: str
    soft: int
    hard: int


@dataclass(frozen=True, kw_only=True)
class Volume:
    """A file or directory of the host to be seen at `destination`."""

    source: str
    destination: str
    read_only: bool = False
    #: make the directory on the host if it is missing (``-v`` does, ``--mount`` does not)
    create: bool = False


@dataclass(frozen=True, kw_only=True)
class Tmpfs:
    """Memory at `destination`; `options` are mount options."""

    destination: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Disk:
    """A block device or raw file of the host to be a block device at `path` in the container."""

    source: str
    path: str
    #: of "rwm", as for the device cgroup; without "w" the disk itself is read-only
    access: str = "rwm"

    @property
    def read_only(self) -> bool:
        return "w" not in self.access


def disk(text: str, *, cwd: str = "/") -> Disk:
    """``SOURCE[:PATH][:ACCESS]``; a relative source is below `cwd`, without a path it is the source's own."""
    what = f"device '{text}'"
    source, *rest = text.split(":")
    access = "rwm"
    if rest and re.fullmatch("[rwm]{1,3}", rest[-1]):
        access = rest.pop()
        if len(set(access)) != len(access):
            raise InvalidArgumentError(f"{what} has access '{access}': write each of 'r', 'w' and 'm' once")
    if len(rest) > 1 or not source:
        raise InvalidArgumentError(f"{what} is not understood: write SOURCE[:PATH][:rwm]")
    path = _source(source, cwd, what)
    return Disk(source=path, path=destination(rest[0] if rest else path, what), access=access)


def size(text: str, what: str) -> int:
    """Bytes of ``64m``, ``1.5g``, ``512KiB`` or ``4096``; `what` names the option in the error."""
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([bkmgtp]?)(?:i?b)?", text.strip().lower())
    value = float(match[1]) * _UNITS[match[2]] if match else -1.0
    if not match or value > 2**62:
        raise InvalidArgumentError(f"{what} '{text}' is not a size: write for example '512m' or '2g'")
    return int(match[1]) * _UNITS[match[2]] if "." not in match[1] else int(value)


def ulimit(text: str) -> Ulimit:
    """``NAME=SOFT[:HARD]``; -1 is unlimited."""
    match = re.fullmatch(r"([a-z]+)=(-1|[0-9]{1,19})(?::(-1|[0-9]{1,19}))?", text)
    if not match:
        raise InvalidArgumentError(f"ulimit '{text}' is not understood: write for example 'nofile=1024:4096'")
    name, soft, hard = match[1], _limit(match[2]), _limit(match[3] or match[2])
    if name not in _ULIMITS:
        raise InvalidArgumentError(f"ulimit '{text}' names an unknown limit '{name}'")
    if soft > hard:
        raise InvalidArgumentError(f"ulimit '{text}' has a soft limit above its hard limit")
    return Ulimit(type=f"RLIMIT_{name.upper()}", soft=soft, hard=hard)


def _limit(text: str) -> int:
    return UNLIMITED if text == "-1" else min(int(text), UNLIMITED)


def destination(text: str, what: str) -> str:
    """The destination of `what`: an absolute, normalised path in the container that is not its root."""
    path = posixpath.normpath(text) if text else ""
    path = "/" + path.lstrip("/") if path.startswith("/") else path
    if not path.startswith("/") or "\0" in path:
        raise InvalidArgumentError(f"destination '{text}' of {what} has to be an absolute path")
    if path == "/":
        raise InvalidArgumentError(f"destination '{text}' of {what} cannot be the root directory")
    return path


def volume(text: str, *, cwd: str = "/") -> Volume:
    """``SRC:DST[:OPTIONS]`` with a path as source; a relative one (``./x``) is below `cwd`."""
    parts = text.split(":")
    if not 2 <= len(parts) <= 3 or not parts[0]:
        raise InvalidArgumentError(f"volume '{text}' is not understood: write SOURCE:DESTINATION[:ro]")
    if not parts[0].startswith(("/", "./", "../")) and parts[0] not in (".", ".."):
        raise InvalidArgumentError(
            f"volume '{text}' names no path: named volumes do not exist here, write './{parts[0]}' for a directory"
        )
    source = _source(parts[0], cwd, f"volume '{text}'")
    given = parts[2].split(",") if len(parts) == 3 else []
    if "ro" in given and "rw" in given:
        raise InvalidArgumentError(f"volume '{text}' is both 'ro' and 'rw': give one of them")
    for option in given:
        if option not in ("ro", "rw"):
            _check_propagation(option, f"volume '{text}'")
    where = destination(parts[1], f"volume '{text}'")
    return Volume(source=source, destination=where, read_only="ro" in given, create=True)


def mount(text: str, *, cwd: str = "/") -> Volume | Tmpfs:
    """``type=bind,source=SRC,target=DST[,readonly]`` or ``type=tmpfs,target=DST[,tmpfs-size=..][,tmpfs-mode=..]``."""
    what = f"mount '{text}'"
    values: dict[str, str] = {}
    for item in text.split(","):
        key, equals, value = item.partition("=")
        name = {"src": "source", "dst": "target", "destination": "target", "ro": "readonly"}.get(key, key)
        if name in values:
            raise InvalidArgumentError(f"{what} gives '{key}' twice")
        if not equals and name != "readonly":
            raise InvalidArgumentError(f"{what} has '{item}' where KEY=VALUE is expected")
        values[name] = value if equals else "true"
    kind = values.pop("type", "bind")
    if kind not in ("bind", "tmpfs"):
        raise InvalidArgumentError(f"{what} is of type '{kind}': known are 'bind' and 'tmpfs'")
    where = destination(values.pop("target", ""), what)
    read_only = _truth(values.pop("readonly", "false"), what)
    made: Volume | Tmpfs
    if kind == "bind":
        _check_propagation(values.pop("bind-propagation", "rprivate"), what)
        source = _source(values.pop("source", ""), cwd, what)
        made = Volume(source=source, destination=where, read_only=read_only)
    else:
        options = ["ro"] if read_only else []
        if "tmpfs-size" in values:
            options.append(f"size={size(values.pop('tmpfs-size'), f'size of {what}')}")
        if "tmpfs-mode" in values:
            options.append(f"mode={values.pop('tmpfs-mode')}")
        made = tmpfs(":".join((where, ",".join(options))) if options else where)
    if values:
        raise InvalidArgumentError(f"{what} has unknown '{next(iter(values))}'")
    return made


def tmpfs(text: str) -> Tmpfs:
    """``DST[:OPTIONS]``, options separated by commas."""
    where, _, rest = text.partition(":")
    options = tuple(option for option in rest.split(",") if option)
    for option in options:
        if option not in _TMPFS_FLAGS and not _TMPFS_VALUES.fullmatch(option):
            raise InvalidArgumentError(f"tmpfs '{text}' has unknown option '{option}'")
    return Tmpfs(destination=destination(where, f"tmpfs '{text}'"), options=options)


def _source(text: str, cwd: str, what: str) -> str:
    if not text or "\0" in text:
        raise InvalidArgumentError(f"{what} has no source")
    return posixpath.normpath(posixpath.join(cwd, text))


def _check_propagation(option: str, what: str) -> None:
    if option in _PROPAGATING:
        raise UnsupportedError(f"{what}: '{option}' mounts cannot cross into a virtual machine: use 'rprivate'")
    if option not in _PRIVATE:
        raise InvalidArgumentError(f"{what} has unknown option '{option}'")


def _truth(text: str, what: str) -> bool:
    if text.lower() in ("true", "1"):
        return True
    if text.lower() in ("false", "0"):
        return False
    raise InvalidArgumentError(f"{what}: 'readonly' is '{text}' but has to be 'true' or 'false'")


def user(text: str) -> str:
    """``USER[:GROUP]`` by name or number, checked for form; which names exist only the guest knows."""
    name, _, group = text.partition(":")
    for part in (name, group):
        if part.isascii() and part.isdigit() and int(part[:20]) >= 2**31:
            raise InvalidArgumentError(f"user '{text}' is out of range: ids are below {2**31}")
    if text and (not name or ":" in group or text.endswith(":") or re.search(r"[\s\x00]", text)):
        raise InvalidArgumentError(f"user '{text}' is not understood: write USER, UID, USER:GROUP or UID:GID")
    return text


def environment(
    image: Sequence[str], options: Sequence[str], *, client: Mapping[str, str], base: Sequence[str] = ()
) -> list[str]:
    """Variables in order of first appearance; later sources win by name.

    ``KEY=VALUE`` sets (the value may hold ``=``); a lone ``KEY`` takes the client's value, or removes the variable if
    the client has none.
    """
    merged: dict[str, str] = {}
    for entries, source in ((base, "default"), (image, "image"), (options, "option")):
        for entry in entries:
            key, equals, value = entry.partition("=")
            if not key or "\0" in entry:
                where = " of the image" if source == "image" else ""
                raise InvalidArgumentError(f"environment variable '{entry}'{where} is not of the form KEY=VALUE")
            if equals:
                merged[key] = value
            elif source == "option" and key in client:
                merged[key] = client[key]
            else:
                merged.pop(key, None)
    return [f"{key}={value}" for key, value in merged.items()]
