"""Whether a container's program can be executed, decided by looking and not by the words of an error.

The verdict is the kernel's: the file must be there, be a regular file, have an executable bit for the user, and begin
like something the kernel can execute, as must the interpreter it names.  What cannot be judged is left to crun.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Any

from vmsandbox_agent.errors import CommandNotExecutableError, CommandNotFoundError
from vmsandbox_agent.syscalls import open_in_root

if TYPE_CHECKING:
    from collections.abc import Sequence

_HEAD = 256
_INTERPRETERS_DEEP = 5


def check(root: int, process: dict[str, Any]) -> None:
    """Judge the program of an OCI process in the root directory `root`.

    Raises CommandNotFoundError or CommandNotExecutableError; nothing if it can be executed or cannot be judged.
    """
    arguments = process.get("args") or [""]
    program = str(arguments[0])
    if not program:
        raise CommandNotFoundError("the command is empty")
    identity = _Identity(process.get("user") or {})
    cwd = str(process.get("cwd") or "/")
    if "/" in program:
        _check_file(root, os.path.join(cwd, program), program, identity)
        return
    unusable: CommandNotExecutableError | None = None
    for directory in _search_path(process.get("env") or []):
        try:
            _check_file(root, os.path.join(cwd, directory, program), program, identity)
        except CommandNotFoundError:
            continue
        except CommandNotExecutableError as error:
            unusable = unusable or error
            continue
        return
    raise unusable or CommandNotFoundError(f"command '{program}' is not in the container's PATH")


class _Identity:
    def __init__(self, user: dict[str, Any]) -> None:
        self.uid = int(user.get("uid") or 0)
        self.gids = {int(user.get("gid") or 0), *(int(gid) for gid in user.get("additionalGids") or [])}

    def may_execute(self, status: os.stat_result) -> bool:
        if self.uid == 0:
            return bool(status.st_mode & 0o111)
        if status.st_uid == self.uid:
            return bool(status.st_mode & 0o100)
        if status.st_gid in self.gids:
            return bool(status.st_mode & 0o010)
        return bool(status.st_mode & 0o001)


def _search_path(environment: Sequence[str]) -> list[str]:
    """Where crun looks: in the last PATH of several, nowhere without one, in the root where it has an empty place."""
    paths = [str(entry)[5:] for entry in environment if str(entry).startswith("PATH=")]
    return [directory or "/" for directory in paths[-1].split(":")] if paths else []


def _check_file(root: int, path: str, program: str, identity: _Identity, depth: int = 0) -> None:
    try:
        fd = open_in_root(root, path, os.O_PATH)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise CommandNotFoundError(f"command '{program}' does not exist in the container") from None
        if error.errno == errno.EACCES:
            raise CommandNotExecutableError(f"command '{program}' cannot be reached: permission denied") from None
        return  # a magic link, a loop: for crun to judge
    try:
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            raise CommandNotExecutableError(f"command '{program}' is a directory")
        if not stat.S_ISREG(status.st_mode):
            raise CommandNotExecutableError(f"command '{program}' is not a regular file")
        if not identity.may_execute(status) and not _has_acl(fd):
            raise CommandNotExecutableError(f"command '{program}' is not executable: permission denied")
        head = _head(fd)
    finally:
        os.close(fd)
    if head is None or head.startswith(b"\x7fELF") or depth >= _INTERPRETERS_DEEP:
        return
    if not head.startswith(b"#!"):
        if not _has_foreign_formats():
            raise CommandNotExecutableError(f"command '{program}' is not executable: exec format error")
        return
    words = head[2:].split(b"\n", 1)[0].strip().split(None, 1)
    interpreter = os.fsdecode(words[0]) if words else ""
    try:
        _check_file(root, interpreter or "/", program, identity, depth + 1)
    except (CommandNotFoundError, CommandNotExecutableError):
        raise CommandNotExecutableError(
            f"command '{program}' needs '{interpreter}', which cannot be executed"
        ) from None


def _has_acl(fd: int) -> bool:
    try:
        os.getxattr(f"/proc/self/fd/{fd}", "system.posix_acl_access")
    except OSError:
        return False
    return True


def _head(fd: int) -> bytes | None:
    try:
        reading = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return os.read(reading, _HEAD)
    except OSError:
        return None
    finally:
        os.close(reading)


def _has_foreign_formats() -> bool:
    """Whether somebody registered formats other than ELF and scripts with the kernel."""
    try:
        names = os.listdir("/proc/sys/fs/binfmt_misc")
    except OSError:
        return False
    return bool({*names} - {"register", "status"})
