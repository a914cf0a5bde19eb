"""Hot-plug: how long until a container has more than it started with."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

from scripts.benchmarks.rows import MissingError, Row, measurement
from scripts.benchmarks.workplace import IDLE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scripts.benchmarks.workplace import Workplace


@measurement(
    Row("hotplug_block", "s", "image and writable layer: plugged in, found and mounted", against="cold_boot_floor"),
    most_runs=3,
    warm_up=False,
)
def hotplug_block(place: Workplace) -> Mapping[str, float]:
    """In a pod that was made without a container: one made for its container has both disks from its start."""
    pod = "bench-hotplug"
    place.vmsandbox("pod", "create", "--network", "none", place.pod_template, "--name", pod)
    with ExitStack() as stack:
        stack.callback(place.vmsandbox, "pod", "rm", "-f", pod)
        name, _ = place.start_pod(*IDLE, options=("--pod", pod))
        phases = json.loads(place.vmsandbox("inspect", name).output)[0].get("phases") or {}
        return {"hotplug_block": float(phases["attach"]) + float(phases["guest_storage"])}


@measurement(
    Row("hotplug_memory", "s", "vmsandbox update --memory 1g, until the guest has it", against="cold_boot_floor"),
    most_runs=3,
    warm_up=False,
)
def hotplug_memory(place: Workplace) -> Mapping[str, float]:
    """A pod of its own each time: what was once plugged in comes back sooner."""
    name, _ = place.start_pod(*IDLE, options=(place.template,))
    with ExitStack() as stack:
        stack.callback(place.remove_quietly, name)
        return {"hotplug_memory": place.vmsandbox("update", "--memory", "1g", name).seconds}


@measurement(
    Row("hotplug_cpu", "s", "vmsandbox update --cpus 2, until the guest uses it", against="cold_boot_floor"),
    most_runs=3,
    warm_up=False,
)
def hotplug_cpu(place: Workplace) -> Mapping[str, float]:
    if len(os.sched_getaffinity(0)) < 2:
        raise MissingError("a pod has no more vCPUs than the host, and this one has one")
    name, _ = place.start_pod(*IDLE, options=(place.template,))
    with ExitStack() as stack:
        stack.callback(place.remove_quietly, name)
        return {"hotplug_cpu": place.vmsandbox("update", "--cpus", "2", name).seconds}
