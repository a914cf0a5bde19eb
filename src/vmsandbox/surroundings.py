"""What a process passes on to its children, beside descriptors and environment.

A supervisor that somebody else has started must be where its client would have started it.
"""

from __future__ import annotations

import os
import resource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")
#: beginnings of names of variables: where programs and temporary files are, how they are loaded, and our own
_INFLUENTIAL = ("PATH", "TMPDIR", "LD_", "PYTHON", "MALLOC", "CNI_", "VMSANDBOX_", "GRPC_")


def of(pid: int, *, grouped: bool = True) -> list[object]:
    """Root, limits, namespaces and scheduling of a process, and where `grouped` its control groups; of JSON's types.

    How many descriptors it may open now is left out: a supervisor takes as many as it may have at most.
    """
    process = f"/proc/{pid}"
    root = os.stat(f"{process}/root")
    with open(f"{process}/oom_score_adj") as score:
        texts = [cgroups_of(pid) if grouped else "", score.read()]
    names = [name for name in dir(resource) if name.startswith("RLIMIT_")]
    limits = [[*resource.prlimit(pid, getattr(resource, name))][name == "RLIMIT_NOFILE" :] for name in names]
    places = [os.readlink(f"{process}/ns/{name}") for name in _NAMESPACES]
    scheduling = [sorted(os.sched_getaffinity(pid)), os.getpriority(os.PRIO_PROCESS, pid)]
    return [root.st_dev, root.st_ino, texts, limits, places, scheduling]


def cgroups_of(pid: int) -> str:
    """Where a process is in each hierarchy, as the kernel says it."""
    with open(f"/proc/{pid}/cgroup") as groups:
        return groups.read()


def influential(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that change what a supervisor does; shells note many others for themselves."""
    return {name: value for name, value in environment.items() if name.startswith(_INFLUENTIAL)}


def change_of(path: str) -> list[int] | None:
    """What is different after a file was changed; None if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [found.st_ino, found.st_size, found.st_mtime_ns]
