"""What can be seen of a running container's resources, and changed: pause, stats, processes, limits.

Every verb takes the container, the pod and the request, and answers what its client prints.
"""

from __future__ import annotations

import asyncio
import functools
import json
from typing import TYPE_CHECKING, Any

from vmsandbox.errors import InvalidArgumentError
from vmsandbox.oci import options
from vmsandbox.oci.compose import CPU_PERIOD
from vmsandbox.supervisor import agreement, processors
from vmsandbox.supervisor.sandbox import Demand
from vmsandbox.supervisor.translation import translating

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from vmsandbox.config.model import SandboxSettings
    from vmsandbox.oci.options import RunOptions
    from vmsandbox.supervisor.container import Container
    from vmsandbox.supervisor.sandbox import Sandbox
    from vmsandbox_protocol import agent_pb2 as pb

MIB = 1 << 20
#: seconds a request for the next OOM kill may last: its client may be gone
OOM_TIMEOUT = 5.0
#: of a control group that was given none
WEIGHT = "100"
#: what `update` takes, by the names of `oci.options`
CHANGEABLE = frozenset({"cpus", "memory", "pids_limit", "cpu_shares", "cpuset_cpus"})


async def pause(container: Container, sandbox: Sandbox, _request: dict[str, Any]) -> dict[str, Any]:
    """Freeze every process of the container."""
    async with container.lock:
        container.require("pause")
        pausing = functools.partial(sandbox.agent.pause, container.id)
        await agreement.changed(sandbox.agent, container, pausing, into="paused")
        container.advance("pause")
    return {}


async def resume(container: Container, sandbox: Sandbox, _request: dict[str, Any]) -> dict[str, Any]:
    """Let a paused container go on."""
    async with container.lock:
        container.require("resume")
        resuming = functools.partial(sandbox.agent.resume, container.id)
        await agreement.changed(sandbox.agent, container, resuming, into="running")
        container.advance("resume")
    return {}


async def top(container: Container, sandbox: Sandbox, _request: dict[str, Any]) -> dict[str, Any]:
    """The container's processes, by their pids inside."""
    container.require("top")
    rows = await sandbox.agent.processes(container.id)
    inside = {row.guest_pid: row.pid for row in rows}
    return {"processes": [_process(row, inside) for row in rows]}


def _process(row: pb.ProcessRow, inside: dict[int, int]) -> dict[str, Any]:
    return {
        "pid": row.pid,
        "parent_pid": inside.get(row.parent_pid, 0),
        "guest_pid": row.guest_pid,
        "uid": row.uid,
        "user": row.user,
        "state": row.state,
        "cpu_ms": row.cpu_ms,
        "rss_kib": row.rss_kib,
        "start_time_ns": row.start_time_ns,
        "tty": row.tty,
        "command": row.command,
        "exec": row.exec_id,
    }


async def stats(container: Container, sandbox: Sandbox, _request: dict[str, Any]) -> dict[str, Any]:
    """One reading of the container's counters; a client that wants rates takes two."""
    container.require("stats")
    read = await sandbox.agent.stats(container.id)
    with translating():
        memory = await sandbox.vm.memory()
    plain = {field.name: getattr(read, field.name) for field in read.DESCRIPTOR.fields if field.name != "memory_stat"}
    return {
        "stats": {
            **plain,
            "memory_stat": dict(read.memory_stat),
            "pod_memory_bytes": (memory.base_mib + memory.plugged_mib) * MIB,
        }
    }


async def oom(container: Container, _sandbox: Sandbox, request: dict[str, Any]) -> dict[str, Any]:
    """How often the guest's kernel has killed for want of memory, once that is more than what was `seen`.

    Without `seen` it is answered at once, with it after `timeout` seconds or the container's end at the latest.
    """
    seen, timeout = request.get("seen"), request.get("timeout")
    if isinstance(seen, int) and isinstance(timeout, int | float):
        try:
            async with asyncio.timeout(max(0.0, min(float(timeout), OOM_TIMEOUT))):
                await container.oom_or_end(seen)
        except TimeoutError:
            pass
    return {"oom_kills": container.oom_kills}


# ---------------------------------------------------------------- limits


async def update(container: Container, sandbox: Sandbox, request: dict[str, Any]) -> dict[str, Any]:
    """Change limits while the container runs; answers what the machine has now and what it could not give back.

    The machine grows before the container may use more, and shrinks after it may use less.  Raises
    `InvalidArgumentError` for a memory limit below what the container holds, and leaves everything as it was.
    """
    chosen = changes(request)
    settings = sandbox.around.settings.sandbox
    processors.require_quota(chosen.cpus, settings)
    async with container.lock:
        container.require("update")
        before = container.demand()
        after = Demand(
            cpus=before.cpus if chosen.cpus is None else chosen.cpus,
            memory_mib=before.memory_mib if chosen.memory_bytes is None else -(-chosen.memory_bytes // MIB),
            host_cpus=before.host_cpus,
        )
        if chosen.memory_bytes is not None:
            _require_room(container, await sandbox.agent.stats(container.id), chosen.memory_bytes)
        await sandbox.give(container.id, wider(before, after, settings))
        try:
            processors.require_set(chosen.cpuset_cpus, online=sandbox.wanted_cpus(), settings=settings)
            await sandbox.agent.update_container(container.id, json.dumps(resources(chosen)).encode())
        except BaseException:
            await sandbox.give(container.id, before)
            raise
        known = container.document.setdefault("resources", {})
        known.update({"cpus": after.cpus, "memory": chosen.memory_bytes or known.get("memory") or 0})
        container.document.setdefault("options", {}).update(request["options"])
        container.save()
        await sandbox.give(container.id, after)
        return await _kept(sandbox)


def changes(request: dict[str, Any]) -> RunOptions:
    """The limits that an update asks for, checked."""
    given = request.get("options")
    if not isinstance(given, dict) or not given:
        raise InvalidArgumentError("nothing to update: give a limit, as '--memory 512m'")
    foreign = sorted(set(given) - CHANGEABLE)
    if foreign:
        raise InvalidArgumentError(f"option '{foreign[0]}' cannot be changed while a container exists")
    if given.get("cpuset_cpus") == "":
        raise InvalidArgumentError("cpuset_cpus '' names no vCPU: write for example '0-2,4'")
    return options.run_options(given)


def resources(chosen: RunOptions) -> dict[str, Any]:
    """OCI LinuxResources with only what changes."""
    changed: dict[str, Any] = {}
    cpu: dict[str, Any] = {}
    if chosen.cpus is not None:
        cpu.update(quota=max(1000, round(chosen.cpus * CPU_PERIOD)) if chosen.cpus else -1, period=CPU_PERIOD)
    if chosen.cpu_shares:
        cpu["shares"] = chosen.cpu_shares
    elif chosen.cpu_shares == 0:
        changed["unified"] = {"cpu.weight": WEIGHT}
    if chosen.cpuset_cpus:
        cpu["cpus"] = chosen.cpuset_cpus
    if cpu:
        changed["cpu"] = cpu
    if chosen.memory_bytes is not None:
        changed["memory"] = {"limit": chosen.memory_bytes}
    if chosen.pids_limit is not None:
        changed["pids"] = {"limit": chosen.pids_limit if chosen.pids_limit > 0 else -1}
    return changed


def _require_room(container: Container, read: pb.ContainerStats, limit: int) -> None:
    """Refuse a limit that the kernel could only keep by killing."""
    reclaimable = sum(read.memory_stat.get(name, 0) for name in ("active_file", "inactive_file", "slab_reclaimable"))
    held = read.memory_bytes - min(read.memory_bytes, reclaimable)
    if held > limit:
        raise InvalidArgumentError(
            f"{container} holds {-(-held // MIB)} MiB: a memory limit of {limit // MIB} MiB would kill it; "
            "free memory inside first or give more"
        )


def wider(before: Demand, after: Demand, settings: SandboxSettings) -> Demand:
    """What covers both demands, so that the machine is large enough all through a change."""

    def cpus(demand: Demand) -> float:
        return demand.cpus or settings.base_cpus

    def memory(demand: Demand) -> int:
        return demand.memory_mib or settings.default_container_memory_mib

    return Demand(
        cpus=max(before, after, key=cpus).cpus,
        memory_mib=max(before, after, key=memory).memory_mib,
        host_cpus=after.host_cpus,
    )


async def _kept(sandbox: Sandbox) -> dict[str, Any]:
    """What the machine has, and what of it nobody asks for any more."""
    with translating():
        memory, cpus = await sandbox.vm.memory(), await sandbox.vm.cpus()
    has, wanted = memory.base_mib + memory.plugged_mib, sandbox.wanted_memory_mib()
    return {
        "memory_mib": has,
        "memory_kept_mib": max(0, has - max(wanted, memory.base_mib)),
        "cpus": cpus.present,
        "cpus_kept": max(0, cpus.present - sandbox.wanted_cpus()),
    }


VERBS: dict[str, Callable[[Container, Sandbox, dict[str, Any]], Awaitable[dict[str, Any]]]] = {
    "pause": pause,
    "resume": resume,
    "top": top,
    "stats": stats,
    "oom": oom,
    "update": update,
}
