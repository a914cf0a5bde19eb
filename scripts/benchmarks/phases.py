"""Where the time of a run went, from what was seen of its pod.  Pure.

The phases follow each other without gap or overlap from the start of the client to its end:

=============  ========================================================================================
client         until the client starts the supervisor
supervisor     until QEMU is about to be executed
qemu           QEMU's own start, taken from the bare boot: nothing outside tells when the vCPU starts
firmware       from there to the moment the guest kernel's clock starts
kernel         until the agent's first line: kernel, initramfs and the start of the interpreter
agent          until the agent has answered the first request
container      until the container's process has ended (created, started, run, its end noticed)
teardown       until the client ends, everything released
=============  ========================================================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from scripts.benchmarks.watch import Seen

BOOT = ("client", "supervisor", "qemu", "firmware", "kernel", "agent", "container", "teardown")
#: a clone has no boot: `clone` is from QEMU's execution until the agent has answered
CLONE = ("client", "supervisor", "clone", "container", "teardown")
#: what the pod's directory gets when a supervisor is started, and when QEMU is about to be
SUPERVISOR_FILE = "supervisor.log"
QEMU_FILE = "vm/qmp.sock"


class Span(NamedTuple):
    """When the client was started, and how long it lasted."""

    started: float
    seconds: float


def of_boot(seen: Sequence[Seen], span: Span, *, qemu: float | None = None) -> dict[str, float]:
    """The phases of a run in seconds; what cannot be told from `seen` is left out.

    `qemu` is how long QEMU needs until its vCPU starts.
    """
    marks = _marks(seen, span)
    executed = marks.get("supervisor")
    if executed is not None and qemu is not None:
        marks["qemu"] = executed + qemu
    return _between(BOOT, marks, span)


def of_clone(seen: Sequence[Seen], span: Span) -> dict[str, float]:
    """The phases of a run whose pod is a clone."""
    marks = _marks(seen, span)
    if "agent" in marks:
        marks["clone"] = marks["agent"]
    return _between(CLONE, marks, span)


def _marks(seen: Sequence[Seen], span: Span) -> dict[str, float]:
    """When each phase ended, as far as it was seen."""
    pod = next((item.path for item in seen if "/" not in item.path), None)
    if pod is None:
        return {}
    ready = _first(seen, lambda item: item.path == f"{pod}/sandbox.json" and _status(item) == "ready")
    found = {
        "client": _first(seen, lambda item: item.path == f"{pod}/{SUPERVISOR_FILE}"),
        "supervisor": _first(seen, lambda item: item.path == f"{pod}/{QEMU_FILE}"),
        "agent": ready,
        "container": _first(seen, lambda item: f"{pod}/containers/" in item.path and _status(item) == "stopped"),
    }
    marks = {name: item.time for name, item in found.items() if item is not None}
    return {**marks, **guest_clock(ready), "teardown": span.started + span.seconds}


def _between(names: Sequence[str], marks: Mapping[str, float], span: Span) -> dict[str, float]:
    found: dict[str, float] = {}
    before: float | None = span.started
    for name in names:
        mark = marks.get(name)
        if before is not None and mark is not None:
            found[name] = mark - before
        before = mark
    return found


def guest_clock(ready: Seen | None) -> dict[str, float]:
    """When the guest's clock started and when its agent's first line ran, in the host's time.

    The guest says how old it was when it answered; the host knows when that was.
    """
    phases: dict[str, Any] = (ready.document or {}).get("phases", {}) if ready is not None else {}
    age, agent = phases.get("guest_answered"), phases.get("guest_kernel")
    if ready is None or age is None or agent is None:
        return {}
    start = ready.time - age
    return {"firmware": start, "kernel": start + agent}


def _first(seen: Sequence[Seen], wanted: Callable[[Seen], bool]) -> Seen | None:
    return next((item for item in seen if wanted(item)), None)


def _status(item: Seen) -> str:
    return str((item.document or {}).get("status"))
