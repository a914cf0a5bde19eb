"""What a container costs without a virtual machine: crun and podman, on the same root file system.

Both are used as they come, with state of their own below the temporary directory.  crun refuses the hybrid layout of
control groups (version 1 with version 2 beside it): `main` has then unmounted the latter in a mount namespace of the
benchmark's own.  podman gets no network, because a pod of ours has none either.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from scripts.benchmarks import memory, processes
from scripts.benchmarks.processes import CommandError
from scripts.benchmarks.rows import MissingError, Row, measurement

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from scripts.benchmarks.workplace import Workplace

PODMAN_IMAGE = "localhost/bench"
#: no systemd, no AppArmor, no journal; limits that need no more than an ordinary root's rights
PODMAN_CONFIGURATION = """\
[containers]
apparmor_profile = ""
log_driver = "k8s-file"
default_ulimits = ["nofile=1024:4096", "nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "crun"
"""
_numbers = count(1)


@measurement(Row("python_start", "s", "python3 -I -c pass: what a client in Python costs at least"))
def python_start(_place: Workplace) -> Mapping[str, float]:
    return {"python_start": processes.run([sys.executable, "-I", "-c", "pass"]).seconds}


@measurement(Row("crun_run", "s", "crun run of 'true', natively", against="cold_boot_floor"))
def crun_run(place: Workplace) -> Mapping[str, float]:
    crun = place.tool("crun")
    bundle = place.directory / "bundle"
    if not bundle.exists():
        _make_bundle(place, crun, bundle)
    state = str(place.directory / "crun")
    argv = [crun, "--root", state, "run", "--bundle", str(bundle), f"bench-{os.getpid()}-{next(_numbers)}"]
    return {"crun_run": processes.run(argv).seconds}


def _make_bundle(place: Workplace, crun: str, bundle: Path) -> None:
    root = place.rootfs
    bundle.mkdir()
    try:
        subprocess.run([crun, "spec"], cwd=bundle, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise MissingError(f"crun cannot make a spec: {error.stderr.strip()}") from error
    path = bundle / "config.json"
    spec = json.loads(path.read_text())
    spec["process"].update(args=["true"], terminal=False)
    spec["root"].update(path=str(root), readonly=True)
    path.write_text(json.dumps(spec))


@dataclass(frozen=True)
class Podman:
    """podman with an image, a configuration and state of the benchmark's own."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]

    def run(self, *words: str, settle: bool = False) -> processes.Ended:
        return processes.run([*self.argv, *words], environment=self.environment, settle=settle)


_podmen: WeakKeyDictionary[Workplace, Podman] = WeakKeyDictionary()


def podman(place: Workplace) -> Podman:
    """The one podman of this workplace, its image imported."""
    if place in _podmen:
        return _podmen[place]
    program = place.tool("podman")
    place.tool("crun")
    place.tool("conmon")
    directory = place.directory / "podman"
    directory.mkdir()
    configuration = directory / "containers.conf"
    configuration.write_text(PODMAN_CONFIGURATION + f'tmp_dir = "{directory}/tmp"\n')
    found = Podman(
        (program, "--root", str(directory / "root"), "--runroot", str(directory / "run")),
        {**os.environ, "CONTAINERS_CONF": str(configuration), "TMPDIR": str(directory)},
    )
    archive = directory / "rootfs.tar"
    subprocess.run(["tar", "-C", str(place.rootfs), "-cf", str(archive), "."], check=True)
    try:
        found.run("import", str(archive), PODMAN_IMAGE)
    except CommandError as error:
        raise MissingError(f"podman does not work here: {error}") from error
    _podmen[place] = found
    stack = ExitStack()
    stack.callback(_clear, found)
    place.keep(stack)
    return found


def _clear(found: Podman) -> None:
    """Unmount and remove what podman holds."""
    for words in (("rm", "-a", "-f", "-t", "0"), ("rmi", "-a", "-f")):
        with contextlib.suppress(CommandError):
            found.run(*words, settle=True)


@measurement(
    Row("podman_run", "s", "podman run --rm --network none of 'true', natively with crun", against="cold_boot_floor"),
    Row("podman_cpu_per_run", "s", "CPU time of podman, conmon and crun for that"),
)
def podman_run(place: Workplace) -> Mapping[str, float]:
    ended = podman(place).run("run", "--rm", "--network", "none", PODMAN_IMAGE, "true", settle=True)
    return {"podman_run": ended.seconds, "podman_cpu_per_run": sum(one.total for one in ended.reaped)}


@measurement(
    Row("podman_exec", "s", "podman exec of 'true', natively with crun", against="cold_boot_floor"),
    Row("pss_podman", "MiB", "memory of conmon and an idle container of podman"),
)
def podman_exec(place: Workplace) -> Mapping[str, float]:
    name, pids = _idle_container(place)
    ended = podman(place).run("exec", name, "true")
    return {"podman_exec": ended.seconds, "pss_podman": memory.footprint(pids).total_mib}


_idle: WeakKeyDictionary[Workplace, tuple[str, set[int]]] = WeakKeyDictionary()


def _idle_container(place: Workplace) -> tuple[str, set[int]]:
    if place not in _idle:
        before = set(processes.children())
        runner = podman(place)
        runner.run("run", "-d", "--name", "bench-idle", "--network", "none", PODMAN_IMAGE, "sleep", "1000000")
        started = set(processes.children()) - before
        _idle[place] = ("bench-idle", processes.descendants(started))
    return _idle[place]
