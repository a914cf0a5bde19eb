"""`exec` by the verb itself: what its options give a program in the guest, beside what runc's give one here."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.harness.cli import TIMEOUT
from tests.harness.runc import Runc

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.harness.bundles import Runtime

#: what a program is told of its user, capabilities, directory and environment
TELL = "grep -E '^(Uid|Gid|Groups|Cap...|NoNewPrivs):' /proc/self/status; pwd; echo \"$A,$B,$PATH\""
#: each changes one thing, and the last several at once
OPTIONS = (
    (),
    ("-u", "1000"),
    ("--user", "1000:1001"),
    ("-g", "7", "-g", "9"),
    ("--cap", "CAP_NET_ADMIN", "--cap", "CAP_SYS_TIME"),
    ("--no-new-privs",),
    ("--cwd", "/tmp"),
    ("-e", "A=b c", "-e", "B=", "-e", "PATH=/bin:/other"),
    ("-u", "1000:1000", "-g", "10", "--cap", "CAP_NET_RAW", "--no-new-privs", "--cwd", "/etc", "-e", "A=x"),
)


@pytest.fixture
def runc(tmp_path: Path) -> Iterator[Runc]:
    made = Runc(tmp_path)
    yield made
    made("delete", "--force", "one")


def test_options_of_exec_are_seen_by_its_program_as_with_runc(runtime: Runtime, runc: Runc, box_rootfs: Path) -> None:
    bundle = runtime.bundle("one", box_rootfs, "sleep", "100000")
    document = json.loads((bundle / "config.json").read_text())
    # What the flag adds, the container must not have.
    document["process"].update(noNewPrivileges=False, env=["PATH=/bin", "A=a", "B=b"])
    document["process"]["user"]["additionalGids"] = [5]
    (bundle / "config.json").write_text(json.dumps(document))
    runtime.create("one", bundle)
    runc.create("one", document)
    for start in (runtime.ok, runc):
        start("start", "one")
    for options in OPTIONS:
        said = [call("exec", *options, "one", "sh", "-c", TELL) for call in (runtime.ok, runc)]
        assert said[0] == said[1], options


def test_a_paused_container_takes_a_process_that_goes_on_with_it(runtime: Runtime, box_rootfs: Path) -> None:
    runtime.create("one", runtime.bundle("one", box_rootfs, "sleep", "100000"))
    runtime.ok("start", "one")
    runtime.ok("pause", "one")
    assert "paused" in runtime.refused("exec", "--ignore-paused=false", "one", "true")
    output, pid_file = runtime.scratch / "out", runtime.scratch / "exec.pid"
    reading, writing = os.pipe()
    argv = runtime.argv("exec", "--ignore-paused", "--detach", "--pid-file", str(pid_file), "one")
    with output.open("wb") as stdout:
        program = ("sh", "-c", "read x; echo $x; exit 3")
        subprocess.run([*argv, *program], stdin=reading, stdout=stdout, timeout=TIMEOUT, check=True, env={})
    os.close(reading)
    assert runtime.state("one")["status"] == "paused"
    os.write(writing, b"later\n")
    assert "read x" in runtime.ok("ps", "one")
    assert output.read_bytes() == b""
    runtime.ok("resume", "one")
    assert os.waitstatus_to_exitcode(os.waitpid(int(pid_file.read_text()), 0)[1]) == 3
    assert output.read_bytes() == b"later\n"
    os.close(writing)
