"""Why crun refused, decided by looking and not by its words, which name the guest's paths and what was called.

Looked for only after crun has failed, so that nothing here costs a start that succeeds.  What a user can change has a
name: a destination, a working directory, a limit.  What cannot be seen is left to crun's words.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmsandbox_agent.errors import CommandNotExecutableError, CommandNotFoundError, InvalidArgumentError
from vmsandbox_agent.storage import parse_options
from vmsandbox_agent.syscalls import (
    MS_BIND,
    UMOUNT_NOFOLLOW,
    LinuxCalls,
    begin_namespaces_with_sysctls,
    open_in_root,
)

if TYPE_CHECKING:
    from vmsandbox_agent.syscalls import SystemCalls

#: beside the types of a mode: nothing is there, and nothing can be made there
_NOTHING, _NO_WAY = 0, -1
NR_OPEN = Path("/proc/sys/fs/nr_open")
FILESYSTEMS = Path("/proc/filesystems")
#: types of mounts that are no file system's
_NOT_FILESYSTEMS = {"", "none", "bind", "cgroup"}
#: file systems of which each mount is one of its own, so that trying options changes no other
_SEPARATE = {"tmpfs", "ramfs", "devpts", "sysfs", "mqueue", "hugetlbfs"}
#: options of a tmpfs that are crun's own
_CRUN_OPTIONS = {"tmpcopyup", "copy-symlink"}
#: a control group to try values in
_TRIAL = ".trial"


def of_container(
    root: int,
    spec: dict[str, Any],
    *,
    group: Path,
    scratch: Path,
    out_of_memory: bool = False,
    calls: SystemCalls | None = None,
) -> None:
    """Raise what is wrong with a container in the root directory `root`; nothing if nothing can be seen.

    `group` is the directory of control groups that its own would have been in, `scratch` a directory that can be made,
    and `out_of_memory` tells that something of it was killed for want of some.
    """
    linux = spec.get("linux") or {}
    resources = linux.get("resources") or {}
    if out_of_memory:
        limit = (resources.get("memory") or {}).get("limit")
        raise InvalidArgumentError(
            f"'linux.resources.memory.limit' ('--memory') is {limit}, which is too little to make the container: "
            "raise it"
        )
    mounts = [entry for entry in spec.get("mounts") or [] if isinstance(entry, dict)]
    for number, mount in enumerate(mounts):
        _look_at_mount(root, mount, mounts[:number])
        if mount.get("type") in _SEPARATE:
            _try_options(mount, scratch, calls or LinuxCalls())
    _look_at_paths(root, linux, mounts)
    of_resources(resources, group=group)
    _try_sysctls(linux.get("sysctl") or {})
    process = spec.get("process") or {}
    cwd = str(process.get("cwd") or "/")
    kind = _kind(root, cwd, mounts)
    if kind not in (None, _NOTHING, stat.S_IFDIR):  # crun makes what is not there
        raise InvalidArgumentError(_about_cwd(cwd, kind))
    _look_at_limits(process)


def of_process(root: int, process: dict[str, Any], linux: dict[str, Any]) -> None:
    """The same of a process that is added to the container with this root directory and section ``linux``, with
    docker's codes.
    """
    cwd = str(process.get("cwd") or "/")
    kind = _kind(root, cwd, [])
    if kind not in (None, stat.S_IFDIR):
        refusal = CommandNotFoundError if kind == _NOTHING else CommandNotExecutableError
        raise refusal(_about_cwd(cwd, kind))
    _look_at_limits(process)
    _look_at_ids(process.get("user") or {}, linux)


def of_resources(resources: dict[str, Any], *, group: Path) -> None:
    """Raise for a file of `unified` that control groups do not have, or that does not take what is to be written."""
    unified = resources.get("unified") or {}
    if not unified or not group.is_dir():
        return
    for name in unified:
        if "/" in name or not (group / name).exists():
            raise InvalidArgumentError(
                f"'linux.resources.unified' names '{name}', which the guest's control groups do not have: leave it out"
            )
    trial = group / _TRIAL
    trial.mkdir()
    try:
        for name, value in unified.items():
            try:
                fd = os.open(trial / name, os.O_WRONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # no directory of the kernel's
            try:
                os.write(fd, str(value).encode())
            except OSError as error:
                raise InvalidArgumentError(
                    f"'linux.resources.unified' sets '{name}' to '{value}', which the guest's kernel refuses: "
                    f"{error.strerror}"
                ) from error
            finally:
                os.close(fd)
    finally:
        trial.rmdir()


def _look_at_ids(user: dict[str, Any], linux: dict[str, Any]) -> None:
    """Raise for an id that the container's user namespace, if it has one, does not have."""
    asked = {"uid": ("uidMappings", [user.get("uid")]), "gid": ("gidMappings", [user.get("gid")])}
    asked["additionalGids"] = ("gidMappings", user.get("additionalGids") or [])
    for member, (name, ids) in asked.items():
        mappings = [(int(each["containerID"]), int(each["size"])) for each in linux.get(name) or []]
        mapped = [range(start, start + size) for start, size in mappings]
        missing = [one for one in ids if mapped and not any(int(one or 0) in each for each in mapped)]
        if missing:
            raise InvalidArgumentError(
                f"'process.user.{member}' is {missing[0]}, which the container's 'linux.{name}' does not have: choose "
                "another"
            )


def _look_at_paths(root: int, linux: dict[str, Any], mounts: list[dict[str, Any]]) -> None:
    """Raise for a path that cannot be there, since a part of it is no directory."""
    asked = [(name, path) for name in ("maskedPaths", "readonlyPaths") for path in linux.get(name) or []]
    asked += [("devices", device.get("path")) for device in linux.get("devices") or []]
    for name, path in asked:
        if _kind(root, str(path), mounts) == _NO_WAY:
            raise InvalidArgumentError(f"'linux.{name}' names '{path}', a part of which is not a directory: correct it")


def _try_sysctls(settings: dict[str, str]) -> None:
    """Ask the kernel what it takes; by a thread, which can have namespaces that the agent does not have."""
    failed: list[tuple[str, OSError]] = []

    def body() -> None:
        try:
            begin_namespaces_with_sysctls()
        except OSError:
            return
        for name, value in settings.items():
            try:
                Path("/proc/sys", *name.split(".")).write_text(str(value))
            except OSError as error:
                failed.append((name, error))

    if settings:
        thread = threading.Thread(target=body, name="trial of sysctls")
        thread.start()
        thread.join()
    for name, error in failed:
        raise InvalidArgumentError(
            f"'linux.sysctl' sets '{name}' to '{settings[name]}', which the guest's kernel refuses: {error.strerror}"
        ) from error


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
    if kind not in _NOT_FILESYSTEMS and kind not in _filesystems():
        raise InvalidArgumentError(
            f"cannot mount {kind} at '{destination}': the guest's kernel has no such file system: leave it out"
        )
    if kind == "proc" and os.path.dirname(os.path.normpath(destination)) != "/":
        raise InvalidArgumentError(
            f"cannot mount proc at '{destination}': the guest's crun takes a place right below '/' only"
        )
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


def _filesystems() -> set[str]:
    return {line.split()[-1] for line in FILESYSTEMS.read_text().splitlines() if line}


def _try_options(mount: dict[str, Any], scratch: Path, calls: SystemCalls) -> None:
    """Ask the kernel what it takes of a file system's options; which there are depends on it."""
    kind = str(mount.get("type"))
    given = parse_options(str(option) for option in mount.get("options") or []).data
    scratch.mkdir()
    try:
        for option in given:
            if option in _CRUN_OPTIONS:
                continue
            try:
                calls.mount(kind, str(scratch), kind, 0, option)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    return
                raise InvalidArgumentError(
                    f"cannot mount {kind} at '{mount.get('destination')}': the guest's kernel refuses option "
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
