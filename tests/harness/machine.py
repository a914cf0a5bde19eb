"""What a machine has, as far as engines and our runtime could leave something on it, to be compared later."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

CGROUPS = Path("/sys/fs/cgroup")
#: directories of engines where runc and crun leave what was empty before; the harness removes them in the end
PARENTS = ("docker", "default", "k8s.io", "libpod_parent", "pods-of-tests")
#: made by CNI for the first pod, for all
BRIDGES = {"pods0"}
KINDS = ("cgroup", "ipc", "mnt", "net", "pid", "uts")
#: of the machine's own, that nothing in the engines' namespaces may reach
DIRECTORIES = ("/run", "/etc/docker", "/etc/cni/net.d", "/etc/containers", "/etc/containerd", "/var/lib")

Found = dict[str, set[str]]


def found(init: int, files: Iterable[str], owned: Iterable[Path]) -> Found:
    """What there is in the namespaces of the process `init`, and on the machine outside of them.

    `files` are what runtimes know of containers, `owned` directories that everything of the tests' own is below.
    """
    ours = [str(path) for path in owned]
    processes = list(inside(init))
    return {
        "process": {f"{process.pid} {process.name()}" for process in processes},
        "namespace": {
            f"{kind} {target}" for process in processes for kind in KINDS if (target := _link(process.pid, kind))
        },
        "mount": set(Path(f"/proc/{init}/mounts").read_text().splitlines()),
        "socket": {line.split()[-1] for line in Path(f"/proc/{init}/net/unix").read_text().splitlines() if "/" in line},
        "interface": {
            line.partition(":")[0].strip() for line in Path(f"/proc/{init}/net/dev").read_text().splitlines()[2:]
        }
        - BRIDGES,
        "cgroup": {str(path) for path in cgroups() if not _is_podmans_own(path)},
        "loop device": {
            f"{path.parent.parent.name} {backing}"
            for path in Path("/sys/block").glob("loop*/loop/backing_file")
            if any((backing := path.read_text()).startswith(place) for place in ours)
        },
        "file": {*files, *_named()},
    }


def inside(init: int) -> Iterator[psutil.Process]:
    """The processes in the pid namespace of `init`, and in those below it."""
    for process in psutil.process_iter():
        try:
            if init == process.pid or init in [parent.pid for parent in process.parents()]:
                yield process
        except psutil.NoSuchProcess:
            continue


def _link(pid: int, kind: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/{kind}")
    except OSError:
        return ""


def _named() -> Iterator[str]:
    """What has a name like ours or the engines' in directories that others use as well."""
    for directory in filter(os.path.isdir, DIRECTORIES):
        for name in os.listdir(directory):
            if name.startswith(("vmsandbox", "docker", "cni", "containers")):
                yield f"{directory}/{name}"


def cgroups() -> Iterator[Path]:
    """Every cgroup that an engine has made for a container."""
    for controller in CGROUPS.iterdir():
        for parent in PARENTS:
            yield from (path for path in (controller / parent).glob("**") if path != controller / parent)


def _is_podmans_own(path: Path) -> bool:
    """Whether it is the empty group of a pod, which podman forgets in the one hierarchy that has no controller."""
    if path.parent != CGROUPS / "systemd/libpod_parent" or path.name.startswith("libpod-"):
        return False
    return not any(entry.is_dir() for entry in path.iterdir())


def remove_cgroups(before: Collection[str]) -> None:
    """Remove what engines that were killed have left of cgroups, and their parents once nothing is below them."""
    for path in sorted(cgroups(), key=lambda path: len(path.parts), reverse=True):
        if str(path) not in before:
            _remove(path)
    for controller in CGROUPS.iterdir():
        for parent in PARENTS:
            _remove(controller / parent)


def _remove(path: Path) -> None:
    try:
        path.rmdir()
    except OSError:
        return  # somebody else's, and in use


def added(before: Found, after: Found) -> list[str]:
    """What is there now and was not before."""
    return [f"{kind} {each}" for kind in after for each in sorted(after[kind] - before.get(kind, set()))]
