"""What the caller of a verb is: one in a directory that is gone, with descriptors of its own, and a subreaper."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import psutil

from tests.harness.cli import TIMEOUT
from tests.harness.members import Members

if TYPE_CHECKING:
    from pathlib import Path

    from tests.harness.bundles import Runtime

#: leaves its directory without a name, and goes on with descriptors that nobody meant to pass on
GONE = 'mkdir "$0" && cd "$0" && rmdir "$0" && exec "$@" 5>&"$LEAKED" 7>&"$LEAKED"'


def test_every_verb_works_where_its_directory_is_gone_and_keeps_no_descriptor(
    runtime: Runtime, box_rootfs: Path
) -> None:
    reading, writing = os.pipe()
    environment = {**os.environ, "LEAKED": str(writing)}
    place, output = runtime.scratch / "gone", runtime.scratch / "out"

    def call(*words: str) -> str:
        with output.open("w+b") as stdout:
            argv = ["bash", "-c", GONE, str(place), *runtime.argv(*words)]
            subprocess.run(
                argv,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stdout,
                pass_fds=[writing],
                timeout=TIMEOUT,
                check=False,
            )
            stdout.seek(0)
            return stdout.read().decode()

    bundle = runtime.bundle("one", box_rootfs, "sleep", "100000")
    steps = {
        ("create", "--bundle", str(bundle), "one"): "",
        ("state", "one"): '"status": "created"',
        ("start", "one"): "",
        ("list",): " running ",
        ("ps", "one"): "sleep 100000",
        ("exec", "one", "pwd"): "/\n",
        ("exec", "--detach", "one", "sleep", "100000"): "",
        ("events", "--stats", "one"): '"type":"stats"',
        ("pause", "one"): "",
        ("resume", "one"): "",
        ("update", "--pids-limit", "99", "one"): "",
        ("spec", "--bundle", str(runtime.scratch)): "",
        ("features",): "ociVersionMin",
        ("checkpoint", "one"): "checkpoint is not supported",
        ("--version",): "spec: ",
        ("kill", "one", "KILL"): "",
    }
    for words, expected in steps.items():
        said = call(*words)
        assert (expected in said) if expected else said == "", (words, said)
    assert runtime.ok("list", "--format", "json")
    runtime.await_status("one", "stopped")
    assert call("delete", "one") == ""
    assert call("run", "--detach", "--bundle", str(bundle), "one") == ""
    # All that lives on is without them.
    os.close(writing)
    os.set_blocking(reading, False)
    assert os.read(reading, 1) == b""
    os.close(reading)
    assert runtime.state("one")["status"] == "running"


def test_stand_ins_are_the_children_of_the_callers_subreaper(runtime: Runtime, box_rootfs: Path) -> None:
    """Of this process, which is one; the command that made them has ended."""
    pid = runtime.create("one", runtime.bundle("one", box_rootfs, "sleep", "100000"))
    runtime.ok("start", "one")
    pid_file = runtime.scratch / "exec.pid"
    argv = runtime.argv("exec", "--detach", "--pid-file", str(pid_file), "one", "sh", "-c", "exit 6")
    subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=TIMEOUT, check=True, env={})
    other = int(pid_file.read_text())
    assert [psutil.Process(each).ppid() for each in (pid, other)] == [os.getpid()] * 2
    assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 6
    runtime.ok("kill", "one", "KILL")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 137


def test_a_pod_goes_on_without_its_first_container_until_its_members_end(runtime: Runtime, box_rootfs: Path) -> None:
    """Killed or removed by force: who runs is not disturbed, and nobody joins any more."""
    members = Members(runtime, box_rootfs)
    members.start("one", lambda _: None)
    runtime.ok("kill", "pause", "KILL")
    assert os.waitstatus_to_exitcode(os.waitpid(members.pid, 0)[1]) == 137
    runtime.await_status("pause", "stopped")
    assert runtime.ok("exec", "one", "echo", "there") == "there\n"
    late = members.bundle("late", lambda _: None, "true")
    assert "its first container has ended" in runtime.refused("create", "--bundle", str(late), "late")
    runtime.ok("delete", "pause")
    assert runtime.ok("list", "-q").split() == ["one"]
    assert runtime.ok("exec", "one", "echo", "there") == "there\n"
    assert "'pause' is not known" in runtime.refused("create", "--bundle", str(late), "late")
    runtime.ok("delete", "--force", "one")
    assert runtime.leftovers() == []


def test_a_first_container_that_runs_can_be_removed_by_force(runtime: Runtime, box_rootfs: Path) -> None:
    members = Members(runtime, box_rootfs)
    pid = members.start("one", lambda _: None)
    runtime.ok("delete", "--force", "pause")
    assert (runtime.state("one")["pid"], runtime.state("one")["status"]) == (pid, "running")
    runtime.ok("kill", "one", "KILL")
    runtime.await_status("one", "stopped")
    runtime.ok("delete", "one")
    assert runtime.leftovers() == []
