"""A container's user, looked up in its own /etc/passwd and /etc/group.

Both files belong to the image: they are opened so that no symlink leads out of the rootfs, read up to a limit, and
lines that do not parse are passed over.  The rules are docker's: a numeric user needs no entry, a name does;
an explicit group replaces the supplementary groups; the primary group is always among them.
"""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

from vmsandbox_agent.errors import InvalidArgumentError
from vmsandbox_agent.syscalls import open_in_root

_LIMIT = 4 * 1024 * 1024
_ID_MAX = 2**31 - 1


class User(NamedTuple):
    """Who a process runs as; `home` is "" without an entry in /etc/passwd."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


def resolve(root: int, user: str) -> User:
    """Look up "name", "uid", "name:group" or "uid:gid" below the directory `root`; InvalidArgumentError if unknown."""
    name, _, group = user.partition(":")
    uid, gid, home, login = 0, 0, "", ""
    number = _number(name)
    entry = _passwd_entry(root, name, 0 if not name else number)
    if entry is not None:
        login, uid, gid, home = entry
    elif number is not None:
        uid = number
    elif name:
        raise InvalidArgumentError(f"user '{name}' is not in the container's /etc/passwd")
    if group:
        gid = _group_id(root, group)
        return User(uid, gid, (gid,), home)
    member_of = [number for _, number, members in _groups(root) if login and login in members]
    return User(uid, gid, tuple(dict.fromkeys([gid, *member_of])), home)


def home_of(root: int, uid: int) -> str:
    """The home directory of a uid, "/" if it has none."""
    entry = _passwd_entry(root, "", uid)
    return (entry[3] if entry else "") or "/"


def name_of(root: int, uid: int) -> str:
    """The login name of a uid, the number if it has none."""
    entry = _passwd_entry(root, "", uid)
    return entry[0] if entry else str(uid)


def _number(text: str) -> int | None:
    if not (text.isascii() and text.isdigit()):
        return None
    number = int(text[:11])
    if number > _ID_MAX:
        raise InvalidArgumentError(f"id '{text[:20]}' is larger than {_ID_MAX}")
    return number


def _passwd_entry(root: int, name: str, uid: int | None) -> tuple[str, int, int, str] | None:
    for fields in _lines(root, "/etc/passwd"):
        if len(fields) < 6:
            continue
        try:
            entry_uid, entry_gid = int(fields[2]), int(fields[3])
        except ValueError:
            continue
        if not (0 <= entry_uid <= _ID_MAX and 0 <= entry_gid <= _ID_MAX):
            continue
        if entry_uid == uid if uid is not None else fields[0] == name:
            return fields[0], entry_uid, entry_gid, fields[5]
    return None


def _group_id(root: int, group: str) -> int:
    number = _number(group)
    for name, gid, _ in _groups(root):
        if gid == number if number is not None else name == group:
            return gid
    if number is None:
        raise InvalidArgumentError(f"group '{group}' is not in the container's /etc/group")
    return number


def _groups(root: int) -> list[tuple[str, int, list[str]]]:
    groups = []
    for fields in _lines(root, "/etc/group"):
        if len(fields) >= 4 and fields[2].isascii() and fields[2].isdigit() and int(fields[2][:11]) <= _ID_MAX:
            groups.append((fields[0], int(fields[2]), fields[3].split(",")))
    return groups


def _lines(root: int, path: str) -> list[list[str]]:
    try:
        fd = open_in_root(root, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return []
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return []
        data = bytearray()
        while len(data) < _LIMIT:
            more = os.read(fd, _LIMIT - len(data))
            if not more:
                break
            data += more
    except OSError:
        return []
    finally:
        os.close(fd)
    text = data.decode(errors="surrogateescape")
    return [line.strip().split(":") for line in text.split("\n") if line.strip() and not line.startswith("#")]
