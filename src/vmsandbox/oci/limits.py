"""LinuxResources as the guest's cgroup v2 can apply them."""

from __future__ import annotations

from typing import Any

from vmsandbox.errors import InvalidBundleError, UnsupportedError

#: what the files of cgroup v2 are named after
_CONTROLLERS = {"cgroup", "cpu", "cpuset", "hugetlb", "io", "memory", "misc", "pids", "rdma"}


def guest_resources(given: dict[str, Any]) -> dict[str, Any]:
    """LinuxResources as the guest can apply them; zeros and nulls mean nothing, as engines write them.

    An `idle` or `burst` of 0 means just that: no engine writes it without being told to.
    Host cpusets are left out: they say on which of the host's processors a container may run, not on which of the
    guest's.  Device numbers are still the host's.
    """
    made: dict[str, Any] = {}
    if given.get("devices"):
        made["devices"] = given["devices"]
    memory = {key: value for key, value in (given.get("memory") or {}).items() if value not in (None, 0, False)}
    for name in ("kernel", "kernelTCP", "useHierarchy", "checkBeforeUpdate"):
        memory.pop(name, None)
    if "disableOOMKiller" in memory:
        raise UnsupportedError(
            "'linux.resources.memory.disableOOMKiller' is not supported: cgroup v2 has no such thing"
        )
    if "swappiness" in memory:
        raise UnsupportedError("'linux.resources.memory.swappiness' is not supported: cgroup v2 has no such thing")
    if memory.get("swap") is not None and memory["swap"] >= 0 and not memory.get("limit"):
        del memory["swap"]
    cpu = {
        key: value
        for key, value in (given.get("cpu") or {}).items()
        if value not in (None, 0, "") or (key == "idle" and value == 0)
    }
    for name in ("cpus", "mems"):
        cpu.pop(name, None)
    for name in ("realtimeRuntime", "realtimePeriod"):
        if name in cpu:
            raise UnsupportedError(f"'linux.resources.cpu.{name}' is not supported: cgroup v2 has no such thing")
    pids = {key: value for key, value in (given.get("pids") or {}).items() if value not in (None, 0)}
    unified = dict(given.get("unified") or {})
    for name in unified:
        if "/" in name or name.partition(".")[0] not in _CONTROLLERS:
            raise InvalidBundleError(
                f"'linux.resources.unified' names '{name}', which is no file of cgroup v2: one of a controller's, such "
                "as 'memory.high', is wanted"
            )
    burst = (given.get("cpu") or {}).get("burst")
    cpu.pop("burst", None)
    if burst is not None:
        # crun 1.8 does not know it. What is in `unified` is written last, so that the quota it goes with is there.
        unified.setdefault("cpu.max.burst", str(burst))
    if pids.get("limit", 0) < 0:
        # crun 1.8 would write the number, which the kernel does not take.
        del pids["limit"]
        unified.setdefault("pids.max", "max")
    block_io = {key: value for key, value in (given.get("blockIO") or {}).items() if value not in (None, 0, [])}
    if "leafWeight" in block_io:
        raise UnsupportedError("'linux.resources.blockIO.leafWeight' is not supported: cgroup v2 has no such thing")
    named = (("memory", memory), ("cpu", cpu), ("pids", pids), ("blockIO", block_io))
    made.update({name: part for name, part in named if part})
    pages = [entry for entry in given.get("hugepageLimits") or [] if entry.get("limit")]
    if pages:
        made["hugepageLimits"] = pages
    network = {key: value for key, value in (given.get("network") or {}).items() if value not in (None, 0, [])}
    for name, part in (("network", network), ("rdma", given.get("rdma"))):
        if part:
            raise UnsupportedError(f"'linux.resources.{name}' is not supported: the guest's kernel cannot apply it")
    if unified:
        made["unified"] = unified
    return made
