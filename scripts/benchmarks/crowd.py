"""Several pods at once."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from scripts.benchmarks import memory, processes
from scripts.benchmarks.rows import Row, measurement
from scripts.benchmarks.workplace import IDLE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from scripts.benchmarks.workplace import Workplace

PODS = 8


@measurement(
    Row("start_pod", "s", "vmsandbox run -d: one pod, until its container runs", against="cold_boot_floor"),
    Row("start_8_pods", "s", f"the same for {PODS} asked for at once, until all run", against="start_pod"),
    Row("pss_pod_block", "MiB", f"memory of an idle pod among {PODS}, private", against="pss_podman"),
    most_runs=3,
    warm_up=False,
)
def start_8_pods(place: Workplace) -> Mapping[str, float]:
    with running(place, 1) as (one, _):
        pass
    with running(place, PODS) as (all_of_them, pids):
        found = memory.footprint(pids).total_mib / PODS
    return {"start_pod": one, "start_8_pods": all_of_them, "pss_pod_block": found}


@measurement(
    Row("pss_pod_virtiofs", "MiB", f"memory of an idle pod among {PODS} that share directories", against="pss_podman"),
    most_runs=1,
    warm_up=False,
)
def pss_pod_virtiofs(place: Workplace) -> Mapping[str, float]:
    with running(place, PODS, *place.sharing) as (_, pids):
        return {"pss_pod_virtiofs": memory.footprint(pids).total_mib / PODS}


@contextmanager
def running(place: Workplace, pods: int, *options: str) -> Iterator[tuple[float, set[int]]]:
    """Seconds from the first request until all pods run, and their processes, with what they are forked from."""
    origin = place.await_parent(*options)
    options = (place.template, *options)
    image = place.image
    names = [f"crowd-{number}" for number in range(pods)]
    before = processes.descendants(set(processes.children()))
    with ExitStack() as stack:
        for name in names:
            stack.callback(place.remove_quietly, name)
        seconds = processes.run_together(
            [place.command("run", "-d", "--name", name, *options, image, *IDLE) for name in names]
        )
        yield seconds, processes.descendants(set(processes.children())) - before | origin
