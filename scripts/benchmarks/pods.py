"""What our own verbs cost: runs, execs, and a pod that does nothing."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.benchmarks import memory, phases, processes
from scripts.benchmarks.rows import Row, measurement
from scripts.benchmarks.watch import Watch
from scripts.benchmarks.workplace import COLD

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scripts.benchmarks.processes import Ended, Reaped
    from scripts.benchmarks.watch import Seen
    from scripts.benchmarks.workplace import Workplace

#: seconds over which an idle pod is observed
IDLE_SECONDS = 5.0
#: ends when it is told to
OBEDIENT = ("sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.05; done")


@measurement(
    Row("run_cold", "s", "vmsandbox run --rm IMAGE true, booted", against="cold_boot_floor", compared=True),
    *(
        Row(f"run_cold.{phase}", "s", text, against="run_cold")
        for phase, text in zip(
            phases.BOOT,
            (
                "of it the client, until it starts the supervisor",
                "of it the supervisor, until QEMU is executed",
                "of it QEMU's own start",
                "of it the firmware",
                "of it kernel and initramfs, until the agent is executed",
                "of it the agent, until it has answered",
                "of it the container: created, run, its end noticed",
                "of it taking everything down",
            ),
            strict=True,
        )
    ),
    Row("run_cold.vm_cpu", "s", "CPU time of QEMU for that", against="cold_boot_floor.cpu"),
    Row(
        "host_cpu_per_run",
        "s",
        "CPU time of client, supervisor and stand-in for that, without QEMU",
        against="podman_cpu_per_run",
        compared=True,
    ),
    Row("host_cpu_per_run.client", "s", "of it client and stand-in", against="host_cpu_per_run"),
    Row("host_cpu_per_run.supervisor", "s", "of it the supervisor", against="host_cpu_per_run"),
)
def run_cold(place: Workplace) -> Mapping[str, float]:
    ended, seen = watched_run(place, COLD)
    found = phases.of_boot(seen, phases.Span(ended.started, ended.seconds), qemu=place.notes.get("qemu"))
    return {
        "run_cold": ended.seconds,
        **{f"run_cold.{phase}": seconds for phase, seconds in found.items()},
        **shares(ended.reaped),
    }


def watched_run(place: Workplace, *options: str, first: bool = False) -> tuple[Ended, list[Seen]]:
    """A `run --rm` of `true`, and what was seen of its pod.

    The nursery of a run before it is there, as for whoever runs more than one in a minute, unless it is the `first`.
    """
    image = place.image
    if first:
        place.end_nursery()
    else:
        place.vmsandbox("run", "--rm", place.template, image, "true")
        place.await_nursery()
    sandboxes = Path(place.roots.sandboxes_dir)
    sandboxes.mkdir(mode=0o711, parents=True, exist_ok=True)
    with Watch(sandboxes) as watch:
        ended = place.vmsandbox("run", "--rm", *options, image, "true", settle=True)
    return ended, watch.seen


def shares(reaped: list[Reaped]) -> dict[str, float]:
    """CPU seconds in a run: our own processes, and the virtual machine.

    QEMU is the child of the supervisor, which was left to us; what that waited for is QEMU's.  The client
    waited for nothing but the stand-in.
    """
    client, *others = reaped
    machine = sum(other.children for other in others)
    supervisor = sum(other.total for other in others) - machine
    return {
        "run_cold.vm_cpu": machine,
        "host_cpu_per_run": client.total + supervisor,
        "host_cpu_per_run.client": client.total,
        "host_cpu_per_run.supervisor": supervisor,
    }


@measurement(Row("exec", "s", "vmsandbox exec CONTAINER true", against="podman_exec", compared=True))
def exec_(place: Workplace) -> Mapping[str, float]:
    name, _ = place.idle_pod
    return {"exec": place.vmsandbox("exec", name, "true").seconds}


@measurement(Row("client_ps", "s", "vmsandbox ps: a verb without a VM", against="python_start", compared=True))
def client_ps(place: Workplace) -> Mapping[str, float]:
    place.idle_pod  # noqa: B018 - there is something to list
    return {"client_ps": place.vmsandbox("ps").seconds}


@measurement(
    Row("pss_pod", "MiB", "memory of everything of an idle pod that was booted", against="pss_podman"),
    Row("pss_pod.guest", "MiB", "of it the guest's memory, as far as it is mapped", against="pss_pod"),
    Row("pss_pod.unmapped", "MiB", "of it the guest's memory that is not mapped", against="pss_pod"),
    Row("pss_pod.qemu", "MiB", "of it QEMU itself: translated code, the kernel's file, libraries", against="pss_pod"),
    Row("pss_pod.supervisor", "MiB", "of it the supervisor", against="pss_pod"),
    Row("pss_pod.standin", "MiB", "of it the container's stand-in", against="pss_pod"),
    most_runs=3,
)
def pss_pod(place: Workplace) -> Mapping[str, float]:
    _, pids = place.idle_pod
    found = memory.footprint(pids)
    parts = {"guest": found.files, "unmapped": found.unmapped, "qemu": -found.files}
    for pid, kib in found.pss.items():
        part = role(processes.read_stat(pid).name)
        if part is not None:
            parts[part] = parts.get(part, 0) + kib
    return {"pss_pod": found.total_mib, **{f"pss_pod.{part}": kib / 1024 for part, kib in parts.items()}}


def role(name: str) -> str | None:
    """Which part of a pod a process is, by its name in /proc."""
    parts = {"qemu-system": "qemu", "vmsandbox-super": "supervisor", "vmsandbox-stand": "standin"}
    return next((part for start, part in parts.items() if name.startswith(start)), None)


@measurement(Row("idle_cpu", "%", "host CPU of an idle pod, in percent of a core"), most_runs=3, warm_up=False)
def idle_cpu(place: Workplace) -> Mapping[str, float]:
    _, pids = place.idle_pod
    before = processes.cpu_seconds(pids)
    time.sleep(IDLE_SECONDS)
    return {"idle_cpu": 100 * (processes.cpu_seconds(pids) - before) / IDLE_SECONDS}


@measurement(
    Row("stop_and_delete", "s", "vmsandbox stop and rm of a container that obeys", against="cold_boot_floor"),
    most_runs=5,
)
def stop_and_delete(place: Workplace) -> Mapping[str, float]:
    name, _ = place.start_pod(*OBEDIENT, options=(place.template,))
    with ExitStack() as stack:
        stack.callback(place.remove, name)
        began = time.monotonic()
        place.vmsandbox("stop", name)
        place.vmsandbox("rm", name)
        seconds = time.monotonic() - began
        stack.pop_all()
    return {"stop_and_delete": seconds}
