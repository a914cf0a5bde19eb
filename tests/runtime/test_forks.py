"""Engines' pods that are forks of a machine that stands still: in cgroups of their own, and like any other."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.harness.parents import await_offers
from vmsandbox import cgroups

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness.bundles import Runtime

pytestmark = pytest.mark.cloned


@pytest.fixture
def forking(runtime: Runtime, box_rootfs: Path) -> Iterator[Runtime]:
    """A runtime whose next pods are forks: one was there, and a parent was made for those that follow."""
    runtime.config = None
    bundle = runtime.bundle("first", box_rootfs, "sleep", "1000")
    runtime.create("first", bundle)
    runtime.ok("start", "first")  # which founds the nursery
    runtime.create("second", bundle)  # whose supervisor finds one to wish for a parent
    await_offers(runtime.root)
    for name in ("first", "second"):
        runtime.ok("delete", "-f", name)
    yield runtime
    runtime.remove_all()


def pod(runtime: Runtime, container: str) -> dict[str, object]:
    """The document of a container's pod."""
    found: dict[str, object] = json.loads(Path(runtime.root, "c", container, "sandbox.json").read_text())
    return found


def test_a_pod_is_a_fork_and_its_machine_is_in_its_cgroup(forking: Runtime, box_rootfs: Path) -> None:
    path = f"/vmsandbox-forked-{os.getpid()}"
    linux = {**json.loads((forking.scratch / "first" / "config.json").read_text())["linux"], "cgroupsPath": path}
    bundle = forking.bundle("own", box_rootfs, "sleep", "1000", linux=linux)
    forking.create("own", bundle)
    document = pod(forking, "own")
    assert document["boot"] == "fork"
    machine = document["vm"]["pid"]  # type: ignore[index]
    for place in cgroups.directories(path, "own"):
        if os.path.isdir(place):
            assert str(machine) in Path(place, "cgroup.procs").read_text().split()
    assert os.getpriority(os.PRIO_PROCESS, machine) == 0
    forking.ok("start", "own")
    assert forking.ok("exec", "own", "sh", "-c", "echo $0 in $(cat /proc/1/comm)") == "sh in sleep\n"
    assert forking.state("own")["status"] == "running"
    forking.ok("delete", "-f", "own")
    assert not any(os.path.isdir(place) for place in cgroups.directories(path, "own"))


def test_what_a_fork_s_root_file_system_gets_is_on_the_host(forking: Runtime, box_rootfs: Path) -> None:
    writer = ("sh", "-c", "echo of a fork > /written")
    bundle = forking.bundle("writer", box_rootfs, *writer, root={"path": str(box_rootfs)})
    forking.create("writer", bundle)
    assert pod(forking, "writer")["boot"] == "fork"
    forking.ok("start", "writer")
    forking.await_status("writer", "stopped")
    forking.ok("delete", "writer")
    written = box_rootfs / "written"
    assert written.read_text() == "of a fork\n"
    written.unlink()


def test_a_fork_s_supervisor_that_is_killed_is_replaced(forking: Runtime, box_rootfs: Path) -> None:
    forking.create("kept", forking.bundle("kept", box_rootfs, "sleep", "1000"))
    forking.ok("start", "kept")
    before = forking.supervisor()
    before.kill()
    after = forking.supervisor(other_than=before.pid)
    assert after.pid != before.pid
    assert pod(forking, "kept")["boot"] == "fork"
    assert forking.ok("exec", "kept", "echo", "still there") == "still there\n"
