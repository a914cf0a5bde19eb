"""Our OCI runtime beside runc and crun: by its own verbs, under containerd and under podman.

The engines run in namespaces of their own, as those of the tests do, and reach all three runtimes the same way.  In
every round each of them does the same thing, so that a ratio compares like with like.  Templates are there, as on a
machine that has been used before.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from scripts.benchmarks import memory, processes
from scripts.benchmarks.processes import CommandError
from scripts.benchmarks.rows import MissingError, Row, measurement
from scripts.benchmarks.workplace import PARENT_TIME, PARENT_TIMEOUT
from tests.harness import daemons
from tests.harness.engines import BOX, Engines
from vmsandbox import documents
from vmsandbox.cli.runtime.static import default_spec

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from scripts.benchmarks.workplace import Workplace

RUNTIMES = ("vmsandbox", "runc", "crun")
IDLE = ("sleep", "1000000")
CROWDS = (1, 2, 4, 8)
#: where the parents of an engine's pods are
PARENTS = {"containerd": "/run/containerd/runc/default/o", "podman": "/run/vmsandbox/o"}
#: process of a pod -> how its command line begins
PARTS = {
    "qemu": "qemu-system",
    "virtiofsd": "virtiofsd",
    "supervisor": "vmsandbox supervisor",
    "stand_in": "vmsandbox stand-in",
    "starter": "vmsandbox starter",
    "keeper": "vmsandbox parent",
    "shim": "containerd-shim",
}
_numbers = count(1)


def _rows(name: str, text: str) -> tuple[Row, Row, Row]:
    """Rows of one thing done by each runtime; the ratio is to crun's."""
    return (
        Row(name, "s", f"{text}, with our runtime", against=f"{name}.crun"),
        Row(f"{name}.runc", "s", f"{text}, with runc", against=f"{name}.crun"),
        Row(f"{name}.crun", "s", f"{text}, with crun"),
    )


def _named(name: str, seconds: Mapping[str, float]) -> Mapping[str, float]:
    return {name if runtime == "vmsandbox" else f"{name}.{runtime}": value for runtime, value in seconds.items()}


# ---------------------------------------------------------------- the runtimes alone


class Alone:
    """The three command lines, each with a state directory of its own, and a bundle."""

    def __init__(self, place: Workplace) -> None:
        _ = place.template
        self._place = place
        self.bundle = place.directory / "runtime-bundle"
        self.bundle.mkdir()
        spec = default_spec()
        # crun 1.8 knows no later one.
        spec["ociVersion"] = "1.0.2"
        spec["process"].update(args=["true"], terminal=False)
        spec["root"].update(path=str(place.rootfs), readonly=True)
        (self.bundle / "config.json").write_text(json.dumps(spec))

    def argv(self, runtime: str, *words: str) -> list[str]:
        place = self._place
        if runtime == "vmsandbox":
            program = Path(place.command("version")[0]).with_name("vmsandbox-runtime")
            roots = ["--root", place.roots.run_dir, "--data-root", place.roots.data_dir]
            return [str(program), *roots, *words]
        return [place.tool(runtime), "--root", str(place.directory / runtime), *words]

    def run(self, runtime: str, *words: str) -> float:
        return processes.run(self.argv(runtime, *words)).seconds

    def await_parent(self) -> None:
        """Have a machine that our pods are forked from."""
        deadline = time.monotonic() + PARENT_TIMEOUT
        while not self._forked():
            if time.monotonic() > deadline:
                raise MissingError("no machine could be forked")
            time.sleep(PARENT_TIME)

    def _forked(self) -> bool:
        """Whether another pod is a fork; if not, it wishes for a machine that the next ones are forked from."""
        name = f"bench-first-{next(_numbers)}"
        self.run("vmsandbox", "create", "--bundle", str(self.bundle), name)
        document = documents.read(str(Path(self._place.roots.by_container_dir, name, "sandbox.json")))
        self.run("vmsandbox", "start", name)
        self.run("vmsandbox", "delete", "--force", name)
        return bool(document["boot"] == "fork")


_alone = cache(Alone)


@measurement(*_rows("runtime_cycle", "create, start and delete of 'true'"))
def runtime_cycle(place: Workplace) -> Mapping[str, float]:
    alone, seconds = _alone(place), {}
    alone.await_parent()
    for runtime in RUNTIMES:
        name = f"bench-cycle-{next(_numbers)}"
        seconds[runtime] = alone.run(runtime, "create", "--bundle", str(alone.bundle), name)
        seconds[runtime] += alone.run(runtime, "start", name)
        seconds[runtime] += alone.run(runtime, "delete", "--force", name)
    return _named("runtime_cycle", seconds)


@measurement(*_rows("runtime_state", "state of a created container"))
def runtime_state(place: Workplace) -> Mapping[str, float]:
    alone = _alone(place)
    return _named(
        "runtime_state", {runtime: alone.run(runtime, "state", _created(place, runtime)) for runtime in RUNTIMES}
    )


@cache
def _created(place: Workplace, runtime: str) -> str:
    alone, name = _alone(place), f"bench-state-{next(_numbers)}"
    alone.run(runtime, "create", "--bundle", str(alone.bundle), name)
    stack = ExitStack()
    stack.callback(_delete, alone, runtime, name)
    place.keep(stack)
    return name


def _delete(alone: Alone, runtime: str, name: str) -> None:
    with suppress(CommandError):
        alone.run(runtime, "delete", "--force", name)


# ---------------------------------------------------------------- under engines


@cache
def _engines(place: Workplace) -> Engines:
    """podman and containerd with an image, in namespaces that end with the benchmark."""
    for tool in ("podman", "conmon", "containerd", "ctr", "runc", "crun", "catatonit", "unshare", "nsenter"):
        place.tool(tool)
    _ = place.template
    scratch = place.directory / "engines"
    scratch.mkdir()
    made = Engines(scratch, Path(place.roots.data_dir), forks=True)
    stack = ExitStack()
    stack.callback(made.stop)
    place.keep(stack)
    try:
        made.start()
        made.import_images()
        daemons.start_containerd(made)
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        raise MissingError(f"engines do not work here: {error}") from error
    return made


def _timed(engines: Engines, *words: str) -> float:
    return processes.run(engines.argv(*words), environment=engines.environment).seconds


def _await_parent(engines: Engines, engine: str, *words: str) -> None:
    """Have a machine that the engine's pods are forked from; `words` run one of them to its end."""
    deadline = time.monotonic() + PARENT_TIMEOUT
    while not [*engines.inside(PARENTS[engine]).glob("*/offer.json")]:
        if time.monotonic() > deadline:
            raise MissingError(f"no machine could be forked for {engine}")
        for _ in range(2):
            _timed(engines, *words)
        time.sleep(PARENT_TIME)


def _binary(engines: Engines, runtime: str) -> str:
    return str(engines.runtime) if runtime == "vmsandbox" else str(shutil.which(runtime))


@measurement(*_rows("ctr_run", "ctr run --rm of 'true'"))
def ctr_run(place: Workplace) -> Mapping[str, float]:
    engines, seconds = _engines(place), {}
    _await_parent(engines, "containerd", *_ctr_run(engines, "vmsandbox", "true"))
    for runtime in RUNTIMES:
        seconds[runtime] = _timed(engines, *_ctr_run(engines, runtime, "true"))
    return _named("ctr_run", seconds)


def _ctr_run(engines: Engines, runtime: str, *words: str) -> list[str]:
    return ["ctr", "run", "--rm", "--runc-binary", _binary(engines, runtime), BOX, f"run-{next(_numbers)}", *words]


@measurement(*_rows("ctr_exec", "ctr task exec of 'true'"))
def ctr_exec(place: Workplace) -> Mapping[str, float]:
    engines, seconds = _engines(place), {}
    for runtime in RUNTIMES:
        name = _task(place, runtime)
        seconds[runtime] = _timed(engines, "ctr", "task", "exec", "--exec-id", f"e{next(_numbers)}", name, "true")
    return _named("ctr_exec", seconds)


@cache
def _task(place: Workplace, runtime: str) -> str:
    """An idle task, there until the engines end."""
    engines, name = _engines(place), f"idle-{runtime}"
    if runtime == "vmsandbox":
        _await_parent(engines, "containerd", *_ctr_run(engines, runtime, "true"))
    _timed(engines, "ctr", "run", "-d", "--runc-binary", _binary(engines, runtime), BOX, name, *IDLE)
    return name


@measurement(*_rows("podman_run.engine", "podman run --rm --network none of 'true'"))
def podman_run(place: Workplace) -> Mapping[str, float]:
    engines = _engines(place)
    words = ("run", "--rm", "--network", "none", BOX, "true")
    _await_parent(engines, "podman", "podman", "--runtime", "vmsandbox", *words)
    seconds = {runtime: _timed(engines, "podman", "--runtime", runtime, *words) for runtime in RUNTIMES}
    return _named("podman_run.engine", seconds)


@measurement(*_rows("podman_exec.engine", "podman exec of 'true'"))
def podman_exec(place: Workplace) -> Mapping[str, float]:
    engines = _engines(place)
    seconds = {runtime: _timed(engines, "podman", "exec", _podman_idle(place, runtime), "true") for runtime in RUNTIMES}
    return _named("podman_exec.engine", seconds)


@cache
def _podman_idle(place: Workplace, runtime: str) -> str:
    engines, name = _engines(place), f"idle-{runtime}"
    _timed(engines, "podman", "--runtime", runtime, "run", "-d", "--network", "none", "--name", name, BOX, *IDLE)
    return name


# ---------------------------------------------------------------- several at once, and what they occupy


@measurement(
    *(
        Row(
            f"engine_pods.{number}",
            "s",
            f"ctr run -d, {number} asked for at once, until all run",
            against=None if number == 1 else "engine_pods.1",
        )
        for number in CROWDS
    ),
    Row("engine_pss", "MiB", f"memory of an idle pod of containerd among {CROWDS[-1]}, all its processes"),
    *(Row(f"engine_pss.{part}", "MiB", f"what of that is {part}'s") for part in PARTS),
    most_runs=2,
    warm_up=False,
)
def engine_pods(place: Workplace) -> Mapping[str, float]:
    engines, found = _engines(place), {}
    _await_parent(engines, "containerd", *_ctr_run(engines, "vmsandbox", "true"))
    for number in CROWDS:
        with _running(engines, number) as (seconds, pids):
            found[f"engine_pods.{number}"] = seconds
            if number == CROWDS[-1]:
                found |= _footprint(pids, number)
    return found


@contextmanager
def _running(engines: Engines, number: int) -> Iterator[tuple[float, set[int]]]:
    """Seconds until so many pods run, and their processes."""
    names = [f"crowd-{next(_numbers)}" for _ in range(number)]
    before = set(_pids()) - _origin("containerd")
    binary = _binary(engines, "vmsandbox")
    commands = [engines.argv("ctr", "run", "-d", "--runc-binary", binary, BOX, name, *IDLE) for name in names]
    # `run_together` gives its own environment on.
    os.environ["CONTAINERD_ADDRESS"] = daemons.CONTAINERD
    try:
        seconds = processes.run_together(commands)
        yield seconds, set(_pids()) - before
    finally:
        for name in names:
            engines("ctr", "task", "rm", "-f", name)
            engines("ctr", "container", "rm", name)


def _origin(engine: str) -> set[int]:
    """What the pods of an engine are forked from, and who keeps it."""
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            lock = os.readlink(f"/proc/{process.pid}/fd/3")
            if " ".join(process.cmdline()).startswith(PARTS["keeper"]) and lock.startswith(PARENTS[engine]):
                found |= {process.pid, *(child.pid for child in process.children())}
    return found


def _pids() -> list[int]:
    """The processes of this machine that may be a pod's."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if any(_part(process, start) for start in PARTS.values()):
                found.append(process.pid)
    return found


def _part(process: psutil.Process, start: str) -> bool:
    line = " ".join(process.cmdline())
    program, blank, rest = line.partition(" ")
    return f"{program.rpartition('/')[2]}{blank}{rest}".startswith(start)


def _footprint(pids: set[int], number: int) -> dict[str, float]:
    whole = memory.footprint(pids)
    found = {"engine_pss": whole.total_mib / number}
    for part, start in PARTS.items():
        kib = 0
        for pid in pids:
            with suppress(psutil.Error):
                if _part(psutil.Process(pid), start):
                    kib += whole.pss.get(pid, 0)
        found[f"engine_pss.{part}"] = kib / 1024 / number
    return found
