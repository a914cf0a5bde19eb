"""The host's cgroup of a container: where engines look for what it uses.

The stand-in and, for a pod's first container, everything of its virtual machine are in it.  A container's limits are
never written there: they hold inside the guest, and here they would kill the machine.  Stdlib only: the thin client
makes and removes them, a supervisor that takes a pod over enters the pod's.
"""

from __future__ import annotations

import os
import time

from vmsandbox.errors import InvalidBundleError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

#: is there where systemd runs
SYSTEMD = "/run/systemd/system"
#: where systemd has containers of which nothing is said
SLICE, PREFIX = "system.slice", "vmsandbox"
#: seconds for the kernel to forget processes that have ended
REMOVE_TIMEOUT = 5.0
#: of making a directory whose parent others remove
ATTEMPTS = 5


def _hierarchies() -> dict[str, str]:
    """Where each hierarchy is mounted: ``memory``, ``cpu,cpuacct``, ``name=systemd``, or empty for v2."""
    found: dict[str, str] = {}
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            left, _, right = line.rstrip("\n").partition(" - ")
            kind, _, options = right.split(" ", 2)
            point = left.split(" ")[4]
            if kind == "cgroup2":
                found.setdefault("", point)
            elif kind == "cgroup":
                for controller in options.split(","):
                    found.setdefault(controller, point)
    return found


def _of(process: str) -> dict[str, str]:
    """Where a process is in each hierarchy."""
    own = {}
    with open(f"/proc/{process}/cgroup", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            for controller in controllers.split(","):
                own[controller] = path
    return own


def systemd_runs() -> bool:
    return os.path.isdir(SYSTEMD)


def unit_path(path: str, container_id: str) -> str:
    """The path of the cgroup that ``slice:prefix:name`` stands for: ``/a.slice/a-b.slice/prefix-name.scope``.

    An empty `path`, and an empty slice, stand for the defaults.
    """
    parts = (path or f"{SLICE}:{PREFIX}:{container_id}").split(":")
    if len(parts) != 3 or "/" in path or not parts[2]:
        raise InvalidBundleError(
            f"'linux.cgroupsPath' is '{path}': with '--systemd-cgroup' it has to be like 'slice:prefix:name'"
        )
    above, prefix, name = parts[0] or SLICE, parts[1], parts[2]
    stem = above.removesuffix(".slice")
    words = stem.split("-")
    if stem == above or (stem != "-" and not all(words)):
        raise InvalidBundleError(f"'linux.cgroupsPath' is '{path}': '{above}' is no name of a slice of systemd's")
    nested = [] if stem == "-" else ["-".join(words[: count + 1]) + ".slice" for count in range(len(words))]
    unit = name if name.endswith(".slice") else f"{prefix}-{name}.scope"
    return "/" + "/".join([*nested, unit])


def directories(path: str, container_id: str, *, systemd: bool = False) -> list[str]:
    """The directories of a container in every hierarchy, for `linux.cgroupsPath` (empty: one named by the id).

    With `systemd` that is a unit of systemd's, whose cgroup is made as any other, without asking it.
    """
    if ".." in path.split("/") or "\0" in path:
        raise InvalidBundleError(f"'linux.cgroupsPath' is '{path}', which is no path of a cgroup")
    if systemd:
        path = unit_path(path, container_id)
    elif path.count(":") == 2 and not path.startswith("/"):
        raise InvalidBundleError(
            f"'linux.cgroupsPath' is '{path}', which is for systemd: configure the engine for 'cgroupfs'"
        )
    mounted = _hierarchies()
    found: list[str] = []
    for controller, own in _of("self").items():
        point = mounted.get(controller)
        if point is None:
            continue
        if path.startswith("/"):
            place = f"{point}/{path.strip('/')}"
        else:
            place = f"{point}/{own.strip('/')}/{path.strip('/') or container_id}"
        place = os.path.normpath(place)
        if place != point and place not in found:
            found.append(place)
    return found


class Made:
    """The directories that a container has, and those above them that were missing."""

    __slots__ = ("above", "places")

    def __init__(self, places: list[str], above: list[str]) -> None:
        self.places = places
        #: outermost first
        self.above = above


def make(places: Iterable[str]) -> Made:
    """Make the directories; what this machine does not let us have is left out."""
    made = Made([], [])
    for place in places:
        try:
            made.above += _make(place)
        except OSError:
            continue  # a hierarchy that is read-only, or kept by somebody else
        made.places.append(place)
    return made


def _make(place: str) -> list[str]:
    """Make a directory and those above it; answers which of the latter were missing."""
    for _ in range(ATTEMPTS - 1):
        try:
            return _make_once(place)
        except FileNotFoundError:
            continue  # the last container below a parent took it away just now
    return _make_once(place)


def _make_once(place: str) -> list[str]:
    missing = []
    above = place
    while not os.path.isdir(above):
        missing.append(above)
        above = os.path.dirname(above)
    for one in reversed(missing):
        try:
            os.mkdir(one, 0o755)
        except FileExistsError:
            pass
        # Without processors and memory nothing can enter a cpuset of v1.
        for name in ("cpuset.cpus", "cpuset.mems"):
            source, target = f"{os.path.dirname(one)}/{name}", f"{one}/{name}"
            if os.path.exists(f"{one}/cpuset.sched_load_balance") and os.path.exists(source):
                with open(source) as file:
                    value = file.read().strip()
                with open(target, "r+") as file:
                    if not file.read().strip():
                        file.write(value)
    return missing[:0:-1]


def enter(places: Iterable[str]) -> None:
    """Put this process into the cgroup in every hierarchy that takes it.

    The kernel takes some 20 ms for the first.
    """
    for place in places:
        try:
            with open(f"{place}/cgroup.procs", "w") as file:
                file.write("0")
        except OSError:
            continue


def bring(pid: int) -> None:
    """Put another process where this one is, in every hierarchy in which it is elsewhere."""
    own, others = _of("self"), _of(str(pid))
    mounted = _hierarchies()
    for place in {
        f"{mounted[name]}{path}": None for name, path in own.items() if name in mounted and others.get(name) != path
    }:
        with open(f"{place}/cgroup.procs", "w") as file:
            file.write(str(pid))


def leave() -> None:
    """Put this process where it is in nobody's way: into the root of every hierarchy that takes it."""
    enter(dict.fromkeys(_hierarchies().values()))


def remove(places: Iterable[str], above: Iterable[str] = ()) -> None:
    """Remove the directories once nothing is in them any more, and what was made `above` them if that is empty.

    What others put there stays.
    """
    deadline = time.monotonic() + REMOVE_TIMEOUT
    for place in places:
        while True:
            try:
                os.rmdir(place)
            except FileNotFoundError:
                break
            except OSError:
                if time.monotonic() < deadline:
                    time.sleep(0.01)
                    continue
            break
    for place in above:
        try:
            os.rmdir(place)
        except OSError:
            continue  # somebody else's container is below it
