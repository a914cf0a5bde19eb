"""The process that forks the supervisors of engines' pods, and keeps nothing of the engine."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.harness.bundles import Runtime
from tests.harness.cli import TIMEOUT
from tests.harness.nurseries import await_nursery, nursery, origin
from vmsandbox import cgroups

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.cloned


@pytest.fixture
def elsewhere() -> Iterator[list[str]]:
    """Cgroups that an engine calls the runtime in; removing them fails as long as somebody is in one."""
    made = cgroups.make(cgroups.directories(f"/vmsandbox-engine-{os.getpid()}", ""))
    yield made.places
    for place in reversed(made.places):
        if os.path.isdir(place):
            os.rmdir(place)


def test_supervisors_come_out_of_a_nursery_wherever_their_engine_calls_from(
    elsewhere: list[str], runtime: Runtime, data_root: Path, box_rootfs: Path
) -> None:
    bundle = runtime.bundle("bundle", box_rootfs, "sleep", "1000")
    enter = "".join(f"echo $$ > {place}/cgroup.procs; " for place in elsewhere)
    inside = Runtime(runtime.scratch, data_root, inside=["sh", "-c", f'{enter}exec "$@"', "sh"])
    inside.create("first", bundle)
    inside.ok("start", "first")
    await_nursery(runtime.root)
    pid = nursery(runtime.root)
    runtime.create("second", bundle)
    assert origin(runtime.supervisor_of("second")) == origin(pid)
    for place in elsewhere:
        assert Path(place, "cgroup.procs").read_text() == ""
    places = json.loads(Path(runtime.root, "c", "second", "containers", "second.json").read_text())["cgroups"]
    for place in places:
        assert str(runtime.supervisor_of("second")) in Path(place, "cgroup.procs").read_text().split()
    runtime.ok("start", "second")
    assert runtime.state("second")["status"] == "running"


def test_a_nursery_has_none_of_the_descriptors_that_an_engine_leaks(runtime: Runtime, box_rootfs: Path) -> None:
    bundle = runtime.bundle("bundle", box_rootfs, "true")
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    leaked = os.fstat(writing).st_ino
    runtime.create("leaking", bundle)
    argv = runtime.argv("start", "leaking")
    null = subprocess.DEVNULL
    subprocess.run(argv, stdin=null, stdout=null, stderr=null, pass_fds=(writing,), env={}, timeout=TIMEOUT, check=True)
    os.close(writing)
    os.close(reading)
    await_nursery(runtime.root)
    pid = nursery(runtime.root)
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert f"pipe:[{leaked}]" not in [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
