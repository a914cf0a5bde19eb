"""The hook that is run in the guest, from the container's files: what it is told, and what follows if it fails."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from tests.harness.boxes import make_rootfs
from tests.harness.members import Members

if TYPE_CHECKING:
    from pathlib import Path

    from tests.harness.bundles import Runtime


def test_a_hook_inside_that_fails_ends_the_container_and_its_program_is_never_run(
    runtime: Runtime, tmp_path: Path
) -> None:
    rootfs = make_rootfs(tmp_path / "rootfs")
    members = Members(runtime, rootfs)
    output = runtime.scratch / "out"

    def hooked(document: dict[str, Any]) -> None:
        inside = {"path": "/bin/sh", "args": ["sh", "-c", "cat > /tmp/told; exit 3"]}
        after = {"path": "/bin/sh", "args": ["sh", "-c", f"cat > {tmp_path}/after"]}
        document["hooks"] = {"startContainer": [inside], "poststart": [after]}

    with output.open("wb") as stdout:
        pid = runtime.create("one", members.bundle("one", hooked, "sh", "-c", "echo ran"), stdout=stdout)
    # As with crun, which does not wait for it.
    runtime.ok("start", "one")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    runtime.await_status("one", "stopped")
    assert output.read_bytes() == b""
    # What crun tells in the guest, and what is told on the host.
    told = json.loads((rootfs / "tmp/told").read_text())
    assert (told["id"], told["status"], told["bundle"], "annotations" in told) == ("one", "starting", "/", False)
    told = json.loads((tmp_path / "after").read_text())
    assert (told["id"], told["status"], told["bundle"]) == ("one", "running", str(runtime.scratch / "one"))
    assert told["pid"] in (0, pid)  # it may have ended before
    runtime.ok("delete", "one")
    # In the foreground its end is told, and by whom.
    done = runtime("run", "--bundle", str(members.bundle("two", hooked, "sh", "-c", "echo ran")), "two")
    assert (done.code, done.stdout) == (1, "")
    assert done.stderr == "error executing hook `/bin/sh` (exit code: 3)\n"
    # What fails before is told as if there were no hook.
    assert '"nosuch"' in runtime.refused("run", "--bundle", str(members.bundle("three", hooked, "nosuch")), "three")
    assert members.remains_alone()
