"""Where the time of a run went, from what was seen of its pod.  Pure.

The phases follow each other without gap or overlap from the start of the client to its end:

=============  ========================================================================================
client         until the client starts the supervisor
supervisor     until QEMU is about to be executed
qemu           QEMU's own start, taken from the bare boot: nothing outside tells when the vCPU starts
firmware       from there to the moment the guest kernel's clock starts
kernel         until the agent's process is started
agent          until the agent has answered the first request
container      until the container's process has ended (created, started, run, its end noticed)
teardown       until the client ends, everything released
=============  ========================================================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from scripts.benchmarks.watch import Seen

NAMES = ("client", "supervisor", "qemu", "firmware", "kernel", "agent", "container", "teardown")
#: what the pod's directory gets when a supervisor is started, and when QEMU is about to be
SUPERVISOR_FILE = "supervisor.log"
QEMU_FILE = "vm/qmp.sock"


def split(seen: Sequence[Seen], *, started: float, ended: float, qemu: float | None = None) -> dict[str, float]:
    """The phases of a run in seconds; what cannot be told from `seen` is left out.

    `qemu` is how long QEMU needs until its vCPU starts.
    """
    pod = next((item.path for item in seen if "/" not in item.path), None)
    if pod is None:
        return {}
    spawned = _first(seen, lambda item: item.path == f"{pod}/{SUPERVISOR_FILE}")
    executed = _first(seen, lambda item: item.path == f"{pod}/{QEMU_FILE}")
    ready = _first(seen, lambda item: item.path == f"{pod}/sandbox.json" and _status(item) == "ready")
    stopped = _first(seen, lambda item: f"{pod}/containers/" in item.path and _status(item) == "stopped")
    booted = guest_clock(ready)
    marks: list[tuple[str, float | None]] = [
        ("client", _time(spawned)),
        ("supervisor", _time(executed)),
        ("qemu", executed.time + qemu if executed is not None and qemu is not None else None),
        ("firmware", booted.get("start")),
        ("kernel", booted.get("agent")),
        ("agent", _time(ready)),
        ("container", _time(stopped)),
        ("teardown", ended),
    ]
    found: dict[str, float] = {}
    before: float | None = started
    for name, mark in marks:
        if before is not None and mark is not None:
            found[name] = mark - before
        before = mark
    return found


def guest_clock(ready: Seen | None) -> dict[str, float]:
    """When the guest's clock started and when its agent's process did, in the host's time.

    The guest says how old it was when it answered; the host knows when that was.
    """
    phases: dict[str, Any] = (ready.document or {}).get("phases", {}) if ready is not None else {}
    age, agent = phases.get("guest_answered"), phases.get("guest_kernel")
    if ready is None or age is None or agent is None:
        return {}
    start = ready.time - age
    return {"start": start, "agent": start + agent}


def _first(seen: Sequence[Seen], wanted: Callable[[Seen], bool]) -> Seen | None:
    return next((item for item in seen if wanted(item)), None)


def _status(item: Seen) -> str:
    return str((item.document or {}).get("status"))


def _time(item: Seen | None) -> float | None:
    return None if item is None else item.time
