"""Cgroups by the names of systemd's units, where systemd seems to run: what tells that it does is mounted."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from tests.harness.bundles import Runtime, edited
from tests.harness.cli import TIMEOUT

QUIET = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
#: in a mount namespace of its own
RUNNING = 'mount -t tmpfs none /run/systemd && mkdir /run/systemd/system && exec "$@"'


def test_a_container_is_in_the_cgroup_of_a_unit_below_its_slice(
    runtime: Runtime, data_root: Path, box_rootfs: Path
) -> None:
    slice_ = f"vmsandboxtest-{os.getpid()}.slice"
    place = f"/vmsandboxtest.slice/{slice_}/vs-one.scope"
    bundle = runtime.bundle("one", box_rootfs, "sleep", "1000")
    edited(bundle, lambda document: document["linux"].update(cgroupsPath=f"{slice_}:vs:one"))
    create = ("create", "--bundle", str(bundle), "one")
    assert "which is for systemd" in runtime.refused(*create)
    refused = runtime("--systemd-cgroup", *create)
    assert (refused.code, "no systemd runs here" in refused.stderr) == (1, True)

    inside = Runtime(runtime.scratch, data_root, inside=["unshare", "--mount", "sh", "-c", RUNNING, "sh"])
    # What is created has the caller's streams, and would keep pipes open.
    subprocess.run(inside.argv("--systemd-cgroup", *create), check=True, timeout=TIMEOUT, **QUIET)
    pid = inside.state("one")["pid"]
    found = [line.split(":", 2)[2] for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
    assert place in found
    (document,) = runtime.root.glob("s/*/containers/one.json")
    made = json.loads(document.read_text())["cgroups"]
    assert made
    assert all(each.endswith(place) and os.path.isdir(each) for each in made)
    runtime.ok("delete", "--force", "one")
    assert not any(os.path.exists(each.removesuffix(f"/{slice_}/vs-one.scope")) for each in made)
