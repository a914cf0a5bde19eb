"""Runs whose pod comes out of a template: forked from a clone of it that stands still, or cloned."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.benchmarks import phases, processes
from scripts.benchmarks.pods import shares, watched_run
from scripts.benchmarks.rows import MissingError, Row, measurement

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scripts.benchmarks.workplace import Workplace

#: seconds a machine may take to be made ready
READY_TIMEOUT = 60.0


@measurement(
    Row("run_template", "s", "vmsandbox run --rm IMAGE true, forked", against="cold_boot_floor", compared=True),
    *(
        Row(f"run_template.{phase}", "s", text, against="run_template")
        for phase, text in zip(
            phases.CLONE,
            (
                "of it the client, until it starts the supervisor",
                "of it the supervisor, until QEMU is forked",
                "of it the fork, until its agent has answered",
                "of it the container: created, run, its end noticed",
                "of it taking everything down",
            ),
            strict=True,
        )
    ),
    Row("run_template.our_cpu", "s", "CPU time of client, supervisor and stand-in", against="podman_cpu_per_run"),
)
def run_template(place: Workplace) -> Mapping[str, float]:
    place.await_parent()
    ended, seen = watched_run(place, place.template)
    found = phases.of_clone(seen, phases.Span(ended.started, ended.seconds))
    return {
        "run_template": ended.seconds,
        **{f"run_template.{phase}": seconds for phase, seconds in found.items()},
        "run_template.our_cpu": shares(ended.reaped)["host_cpu_per_run"],
    }


@measurement(Row("run_template_virtiofs", "s", "the same with a directory shared", against="cold_boot_floor"))
def run_template_virtiofs(place: Workplace) -> Mapping[str, float]:
    options = place.sharing
    place.await_parent(*options)
    ended, _ = watched_run(place, place.template, *options)
    return {"run_template_virtiofs": ended.seconds}


@measurement(
    Row("run_clone", "s", "the same where nothing can be forked, cloned", against="cold_boot_floor"),
    Row("run_clone.vm_cpu", "s", "CPU time of QEMU for that", against="cold_boot_floor.cpu"),
    Row("run_clone_virtiofs", "s", "the same with a directory shared", against="cold_boot_floor"),
    Row("run_clone_first", "s", "and when nothing ran within a minute before it", against="cold_boot_floor"),
)
def run_clone(place: Workplace) -> Mapping[str, float]:
    with place.without_forks():
        plain, _ = watched_run(place, place.template)
        sharing, _ = watched_run(place, place.template, *place.sharing)
        first, _ = watched_run(place, place.template, first=True)
    return {
        "run_clone": plain.seconds,
        "run_clone.vm_cpu": shares(plain.reaped)["run_cold.vm_cpu"],
        "run_clone_virtiofs": sharing.seconds,
        "run_clone_first": first.seconds,
    }


@measurement(
    Row("run_spare", "s", "vmsandbox run --rm IMAGE true, in a machine that was ready", against="cold_boot_floor")
)
def run_spare(place: Workplace) -> Mapping[str, float]:
    """In a run root of its own, whose processes end before they make another machine ready beside other rows."""
    _ = place.template
    with tempfile.TemporaryDirectory(prefix="s-", dir=place.directory) as root:
        config = Path(root, "config.toml")
        config.write_text('[sandbox]\nspares = 1\nforks = false\n[network]\ndefault = "none"\n')
        program, *words = place.command("run", "--network", "", "--rm", place.image, "true")
        words[words.index("--root") + 1] = root
        command = [program, "--config", str(config), *words]
        before = set(processes.children())
        try:
            processes.run(command)
            _appeared(Path(root, "r"))
            return {"run_spare": processes.run(command).seconds}
        finally:
            processes.end(set(processes.children()) - before)


def _appeared(directory: Path) -> None:
    """Wait until a machine is ready and at rest."""
    deadline = time.monotonic() + READY_TIMEOUT
    while not any(not path.suffix for path in directory.glob("*")):
        if time.monotonic() > deadline:
            raise MissingError("no machine was made ready")
        time.sleep(0.1)
    time.sleep(0.5)
