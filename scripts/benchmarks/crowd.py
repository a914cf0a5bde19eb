"""Several pods at once."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from scripts.benchmarks import processes
from scripts.benchmarks.rows import Row, measurement

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scripts.benchmarks.workplace import Workplace

PODS = 8


@measurement(
    Row("start_pod", "s", "vmsandbox run -d: one pod, until its container runs", against="cold_boot_floor"),
    Row("start_8_pods", "s", "the same for 8 pods asked for at once, until all run", against="start_pod"),
    most_runs=3,
    warm_up=False,
)
def start_8_pods(place: Workplace) -> Mapping[str, float]:
    return {"start_pod": _start(place, 1), "start_8_pods": _start(place, PODS)}


def _start(place: Workplace, pods: int) -> float:
    """Seconds from the first request until all of them are answered."""
    image = place.image
    names = [f"crowd-{number}" for number in range(pods)]
    with ExitStack() as stack:
        for name in names:
            stack.callback(place.remove_quietly, name)
        commands = [place.command("run", "-d", "--name", name, image, "sleep", "1000000") for name in names]
        return processes.run_together(commands)
