"""Why crun refused, decided by looking and not by its words, which name the guest's paths and what was called.

Looked for only after crun has failed, so that nothing here costs a start that succeeds.  What a user can change has a
name: a destination, a working directory, a limit.  What cannot be seen is left to crun's words.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmsandbox_agent.errors import CommandNotExecutableError, CommandNotFoundError, InvalidArgumentError
from vmsandbox_agent.storage import parse_options
from vmsandbox_agent.syscalls import MS_BIND, UMOUNT_NOFOLLOW, LinuxCalls, open_in_root

if TYPE_CHECKING:
    from vmsandbox_agent.syscalls import SystemCalls

#: beside the types of a mode: nothing is there, and nothing can be made there
_NOTHING, _NO_WAY = 0, -1
NR_OPEN = Path("/proc/sys/fs/nr_open")
#: options of a tmpfs that are crun's own
_CRUN_OPTIONS = {"tmpcopyup", "copy-symlink"}


def of_container(
    root: int, spec: dict[str, Any], *, group: Path, scratch: Path, calls: SystemCalls | None = None
) -> None:
    """Raise what is wrong with a container in the root directory `root`; nothing if nothing can be seen.

    `group` is the directory of control groups that its own would have been in, `scratch` a directory that can be made.
    """
    mounts = [entry for entry in spec.get("mounts") or [] if isinstance(entry, dict)]
    for number, mount in enumerate(mounts):
        _look_at_mount(root, mount, mounts[:number])
        if mount.get("type") == "tmpfs":
            _try_options(mount, scratch, calls or LinuxCalls())
    of_resources((spec.get("linux") or {}).get("resources") or {}, group=group)
    process = spec.get("process") or {}
    cwd = str(process.get("cwd") or "/")
    kind = _kind(root, cwd, mounts)
    if kind not in (None, _NOTHING, stat.S_IFDIR):  # crun makes what is not there
        raise InvalidArgumentError(_about_cwd(cwd, kind))
    _look_at_limits(process)


def of_process(root: int, process: dict[str, Any]) -> None:
    """The same of a process that is added to the container with this root directory, with docker's codes."""
    cwd = str(process.get("cwd") or "/")
    kind = _kind(root, cwd, [])
    if kind not in (None, stat.S_IFDIR):
        refusal = CommandNotFoundError if kind == _NOTHING else CommandNotExecutableError
        raise refusal(_about_cwd(cwd, kind))
    _look_at_limits(process)


def of_resources(resources: dict[str, Any], *, group: Path) -> None:
    """Raise for a file of `unified` that control groups do not have."""
    if not group.is_dir():
        return
    for name in resources.get("unified") or {}:
        if "/" in name or not (group / name).exists():
            raise InvalidArgumentError(
                f"'linux.resources.unified' names '{name}', which the guest's control groups do not have: leave it out"
            )


def _about_cwd(cwd: str, kind: int | None) -> str:
    words = "no such file or directory" if kind == _NOTHING else "not a directory"
    return f"cannot enter working directory '{cwd}' ('--workdir', 'process.cwd'): {words}: choose another"


def _look_at_limits(process: dict[str, Any]) -> None:
    for limit in process.get("rlimits") or []:
        kind, soft, hard = str(limit.get("type")), int(limit.get("soft") or 0), int(limit.get("hard") or 0)
        name = kind.removeprefix("RLIMIT_").lower()
        if soft > hard:
            raise InvalidArgumentError(
                f"limit '{name}' ('--ulimit', 'process.rlimits') is {soft}, above its hard limit {hard}: lower it"
            )
        with suppress(OSError, ValueError):
            most = int(NR_OPEN.read_text())
            if kind == "RLIMIT_NOFILE" and hard > most:
                raise InvalidArgumentError(
                    f"limit '{name}' ('--ulimit', 'process.rlimits') can be at most {most} in the guest, which is its "
                    f"'fs.nr_open': ask for no more"
                )


def _look_at_mount(root: int, mount: dict[str, Any], before: list[dict[str, Any]]) -> None:
    destination, kind = str(mount.get("destination")), str(mount.get("type") or "")
    options = parse_options(str(option) for option in mount.get("options") or [])
    there = _kind(root, destination, before)
    is_bind = kind == "bind" or bool(options.flags & MS_BIND)
    wanted: int | None = stat.S_IFDIR
    if is_bind:
        try:
            wanted = stat.S_IFMT(os.stat(str(mount.get("source"))).st_mode)
        except OSError:
            wanted = None
    if there is not None and wanted is not None:
        _compare(destination, there, wanted, what="a directory" if is_bind else kind)


def _compare(destination: str, there: int, wanted: int, *, what: str) -> None:
    advice = "choose another destination"
    if there == _NO_WAY:
        raise InvalidArgumentError(f"cannot mount at '{destination}': a part of it is not a directory: {advice}")
    if there == _NOTHING or (there == stat.S_IFDIR) == (wanted == stat.S_IFDIR):
        return
    if wanted == stat.S_IFDIR:
        raise InvalidArgumentError(f"cannot mount {what} at '{destination}': that is not a directory: {advice}")
    raise InvalidArgumentError(f"cannot mount a file at '{destination}': that is not a file: {advice}")


def _try_options(mount: dict[str, Any], scratch: Path, calls: SystemCalls) -> None:
    """Ask the kernel what it takes of a tmpfs' options; which there are depends on it."""
    given = parse_options(str(option) for option in mount.get("options") or []).data
    scratch.mkdir()
    try:
        for option in given:
            if option in _CRUN_OPTIONS:
                continue
            try:
                calls.mount("tmpfs", str(scratch), "tmpfs", 0, option)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    return
                raise InvalidArgumentError(
                    f"cannot mount tmpfs at '{mount.get('destination')}': the guest's kernel refuses option "
                    f"'{option}': correct it"
                ) from error
            calls.umount(str(scratch), UMOUNT_NOFOLLOW)
    finally:
        scratch.rmdir()


def _kind(root: int, path: str, mounts: list[dict[str, Any]]) -> int | None:
    """What is at `path` in a container with these `mounts`: the type of its mode, or that there is nothing or no way,
    since a part of the path is no directory; None where that cannot be seen from here.
    """
    path = os.path.normpath(path)
    covering = [mount for mount in mounts if _is_below(path, os.path.normpath(str(mount.get("destination"))))]
    if covering:
        mount = covering[-1]
        if str(mount.get("type")) != "bind":
            return None
        path = os.path.relpath(path, os.path.normpath(str(mount["destination"])))
        try:
            root = os.open(str(mount.get("source")), os.O_PATH | os.O_CLOEXEC)
        except OSError:
            return None
    try:
        return _kind_in(root, path)
    finally:
        if covering:
            os.close(root)


def _kind_in(root: int, path: str) -> int | None:
    if path == ".":
        return stat.S_IFMT(os.fstat(root).st_mode)
    try:
        fd = open_in_root(root, path, os.O_PATH)
    except OSError as error:
        return {errno.ENOENT: _NOTHING, errno.ENOTDIR: _NO_WAY}.get(error.errno or 0)
    try:
        return stat.S_IFMT(os.fstat(fd).st_mode)
    finally:
        os.close(fd)


def _is_below(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")
